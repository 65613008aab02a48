#!/bin/bash
# sae-lens 6.54.12 (torch 2.13.0)
#
# Behaviour: TemporalSAE accepts use_error_term=True, in its constructor and as an attribute, and then returns its
# reconstruction as it would without: neither the error nor the hook points hook_sae_error and hook_sae_recons exist in
# its forward pass. For every other dictionary the same setting returns the input itself as long as nothing is edited
# (a gated one refuses the setting in training).
#
# Why it is surprising: the error term is what makes a spliced model equal the model, so that an ablated latent
# shows its own effect alone. Here the same script, with the same setting read back as True, measures the latent's
# effect plus that of the whole reconstruction error, and no base run says so unless it is compared with a run
# without the dictionary.
#
# Seen: standard: largest change with the error term below 1e-5, hooks with hook_sae_error
#       temporal: use_error_term is True, the output equals the one without it, changed by 2.7
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$tmp/lib" \
    sae-lens==6.54.12 torch==2.13.0 transformer-lens==3.9.0 transformers==5.23.0
cd "$tmp"
cat > show.py <<'PY'
import torch
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.temporal_sae import TemporalSAE, TemporalSAEConfig

torch.manual_seed(0)
x = torch.randn(1, 6, 16)
standard = StandardSAE(StandardSAEConfig(d_in=16, d_sae=64))
temporal = TemporalSAE(TemporalSAEConfig(d_in=16, d_sae=64, n_heads=2, bottleneck_factor=4, kval_topk=4))
with torch.no_grad():
    for sae in (standard, temporal):
        sae.use_error_term = False
        without = sae(x)
        sae.use_error_term = True
        output, hooks = sae.run_with_cache(x)
        changed = (output - x).abs().max().item()
        print(type(sae).__name__, "changed by", round(changed, 5), sorted(hooks))
        assert sae.use_error_term
        if sae is standard:
            assert changed < 1e-5 and "hook_sae_error" in hooks and (without - x).abs().max() > 1
        else:
            assert torch.equal(output, without) and changed > 1 and "hook_sae_error" not in hooks
    made = TemporalSAE(temporal.cfg, use_error_term=True)
    made.load_state_dict(temporal.state_dict())
    assert made.use_error_term and torch.equal(made(x), without)
print("use_error_term changes nothing in a temporal SAE")
PY
PYTHONPATH="$tmp/lib" python3 show.py
