#!/bin/bash
# sae-bench 0.6.0 (torch 2.13.0)
#
# Behaviour: the core evaluation's explained_variance depends on the scale of the activations: for the same relative
# reconstruction error it can be anything. In units seven times as small, the same activations and reconstructions
# get another figure.
#
# Why it is surprising: a share of variance has no unit. get_sparsity_and_variance_metrics takes mean_act_per_dimension
# of the squared activations, `flattened_sae_input.pow(2).mean(dim=0)`, joins the dimensions into one mean, and subtracts
# its square from the mean sum of squares. That is no variance; the mean of each dimension, squared and summed, is meant.
# The comment calls the other figure, explained_variance_legacy, the incorrect one.
#
# Seen: scale 0.01: explained_variance 0.900, 1 - FVU 0.898
#       scale 1.00: explained_variance 0.898, 1 - FVU 0.898
#       scale 7.00: explained_variance 0.555, 1 - FVU 0.898
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$tmp/lib" \
    sae-lens==6.54.12 tabulate==0.10.0 torch==2.13.0 transformer-lens==3.9.0 transformers==5.23.0
python3 -m pip install --quiet --disable-pip-version-check --no-deps --target "$tmp/lib" sae-bench==0.6.0
cd "$tmp"
cat > show.py <<'PY'
from types import SimpleNamespace

import torch
from sae_bench.evals.core.main import get_sparsity_and_variance_metrics

torch.manual_seed(0)
x = torch.randn(8, 16, 64) + 0.1
noise = 0.1**0.5 * torch.randn_like(x)
seen = []
for scale in (0.01, 1.0, 7.0):
    acts, near = scale * x, scale * (x + noise)
    sae = SimpleNamespace(
        cfg=SimpleNamespace(hook_name="h", hook_layer=0, hook_head_index=None, d_sae=64),
        device="cpu", encode=lambda a: a, decode=lambda f: near,
    )
    model = SimpleNamespace(run_with_cache=lambda *args, **kwargs: (None, {"h": acts}))
    store = SimpleNamespace(get_batch_tokens=lambda n: torch.zeros(8, 16, dtype=torch.long))
    metrics, _ = get_sparsity_and_variance_metrics(
        sae, model, store, 1, False, False, True, False, 8, {},
    )
    flat, off = acts.flatten(0, 1), (near - acts).flatten(0, 1)
    right = 1 - off.pow(2).sum() / (flat - flat.mean(0)).pow(2).sum()
    seen.append(metrics["explained_variance"])
    print(f"scale {scale:.2f}: explained_variance {metrics['explained_variance']:.3f}, 1 - FVU {right:.3f}")
assert max(seen) - min(seen) > 0.1
PY
PYTHONPATH=$tmp/lib python3 -W ignore show.py
