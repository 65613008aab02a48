#!/bin/bash
# sae-lens 6.54.12 (torch 2.13.0, transformer-lens 3.9.0)
#
# Behaviour: with special tokens excluded from an evaluation (the default of run_evals), a sparse autoencoder
# that writes nothing but zeros does not get a score of 0: here its ce_loss_score and kl_div_score are
# negative. Without the exclusion both are exactly 0.
#
# Why it is surprising: the score compares two edited runs with the model's own. Excluding special tokens
# acts on one of them alone: the run through the autoencoder keeps the model's own activation at BOS, while the
# ablated run sets BOS to zero too. So the two ends of the scale are edited at different positions, and 0 is
# no longer "as bad as no dictionary". The shift is added to every dictionary's score, with a sign and size
# that are the model's; scores with and without the exclusion cannot be set side by side.
#
# Seen: [] kl_div_score 0.000 ce_loss_score 0.000
#       [0] kl_div_score -0.024 ce_loss_score -0.013 (after 400 training steps of the small model below)
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$tmp/lib" \
    sae-lens==6.54.12 torch==2.13.0 transformer-lens==3.9.0 transformers==5.23.0
cd "$tmp"
cat > show.py <<'PY'
import types
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.evals import get_downstream_reconstruction_metrics
from sae_lens.training.activation_scaler import ActivationScaler
from transformer_lens import HookedTransformer, HookedTransformerConfig

torch.manual_seed(0)
model = HookedTransformer(HookedTransformerConfig(n_layers=2, d_model=32, n_ctx=16, d_head=8, n_heads=4, d_vocab=50,
    act_fn="gelu", seed=0, init_weights=True))
sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=64))
sae.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
for weight in sae.parameters():
    weight.data.zero_()


def texts(n):
    """BOS, then an even walk round a ring of 49 tokens."""
    start, step = torch.randint(49, (n, 1)), torch.randint(1, 6, (n, 1))
    return torch.cat([torch.zeros(n, 1, dtype=torch.long), 1 + (start + step * torch.arange(11)) % 49], 1)


optimizer = torch.optim.Adam(model.parameters(), 3e-3)
for _ in range(400):
    optimizer.zero_grad()
    model(texts(64), return_type="loss").backward()
    optimizer.step()
tokens = texts(64)
store = types.SimpleNamespace(get_batch_tokens=lambda n: tokens)
x = model.run_with_cache(tokens)[1][sae.cfg.metadata.hook_name]
assert (sae(x) == 0).all()
scores = []
for ignored in ([], [0]):
    m = get_downstream_reconstruction_metrics(sae, model, store, ActivationScaler(), compute_kl=True, compute_ce_loss=True,
        n_batches=1, eval_batch_size_prompts=64, ignore_tokens=ignored)
    scores.append((m["kl_div_score"], m["ce_loss_score"]))
    print(ignored, "kl_div_score %.3f ce_loss_score %.3f" % scores[-1])
(plain_kl, plain_ce), (kept_kl, kept_ce) = scores
assert abs(plain_kl) < 1e-6 and abs(plain_ce) < 1e-6
assert abs(kept_kl) > 5e-3 and abs(kept_ce) > 5e-3
PY
PYTHONPATH=$tmp/lib python3 -W ignore show.py
