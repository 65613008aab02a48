#!/bin/bash
# sae-lens 6.54.12 and eai-sparsify 1.3.3 (torch 2.13.0, transformers 5.23.0)
#
# Behaviour: sae-lens cannot load a folder that sparsify saves. With sparsify's default setting of the width (an
# expansion factor) it makes a dictionary of no latents and fails; with a given number of latents it fails on the
# decoder's shape; and where there are as many latents as dimensions it loads without a word, and reconstructs wrongly.
#
# Why it is surprising: sae-lens ships a loader for this format. It takes num_latents from cfg.json, which sparsify
# writes as 0 where the width follows from expansion_factor, and transposes W_dec, which sparsify already stores as
# [latents, dimensions], the shape that sae-lens uses, too.
#
# Seen: expansion_factor=4: RuntimeError, W_dec [8, 32] in the file, [0, 8] expected
#       num_latents=32: RuntimeError, W_dec [8, 32] in the file, [32, 8] expected
#       num_latents=8: loaded; reconstructions differ by 1.30, with W_dec transposed again by 0.01
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$tmp/lib" \
    eai-sparsify==1.3.3 sae-lens==6.54.12 torch==2.13.0 transformer-lens==3.9.0 transformers==5.23.0
cd "$tmp"
cat > show.py <<'PY'
import re

import torch
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader
from sparsify import SparseCoder, SparseCoderConfig

torch.manual_seed(0)
seen = {}
for setting in ({"expansion_factor": 4}, {"num_latents": 32}, {"num_latents": 8}):
    coder = SparseCoder(8, SparseCoderConfig(k=3, **setting))
    with torch.no_grad():
        coder.W_dec += 0.3 * torch.randn_like(coder.W_dec)
    name = "=".join(map(str, next(iter(setting.items()))))
    coder.save_to_disk(f"{name}/layers.5")
    x = torch.randn(5, 8)
    try:
        sae = SAE.load_from_disk(f"{name}/layers.5", converter=sparsify_disk_loader)
    except RuntimeError as error:
        found, expected = re.search(r"for W_dec: .*?(\[.*?\]).*?(\[.*?\])", str(error)).groups()
        seen[name] = (found, expected)
        print(f"{name}: RuntimeError, W_dec {found} in the file, {expected} expected")
        continue
    right = coder(x).sae_out
    as_loaded = (sae(x) - right).abs().max()
    sae.W_dec.data = sae.W_dec.data.T.contiguous()
    again = (sae(x) - right).abs().max()
    seen[name] = (bool(as_loaded > 1), bool(again < 0.05))
    print(f"{name}: loaded; reconstructions differ by {as_loaded:.2f}, with W_dec transposed again by {again:.2f}")
assert seen == {
    "expansion_factor=4": ("[8, 32]", "[0, 8]"),
    "num_latents=32": ("[8, 32]", "[32, 8]"),
    "num_latents=8": (True, True),
}, seen
PY
PYTHONPATH=$tmp/lib SPARSIFY_DISABLE_TRITON=1 python3 -W ignore show.py
