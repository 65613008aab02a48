#!/bin/bash
# transformers 5.23.0 (torch 2.13.0), model type `git`
#
# Behaviour: greedy generation of a batch of two left-padded prompts gives other tokens with the key-value cache
# than without it, for the padded prompt alone. The unpadded prompt, and the same short prompt generated in a
# batch of its own, agree with and without the cache. No warning is given.
#
# Why it is surprising: `use_cache` is documented as a matter of speed, left padding with an attention mask is
# what decoder-only generation asks for, and the model's own logits of a whole padded pass are right: only cached
# steps of padded rows differ, so a test of either feature alone passes.
#
# Seen: alone: cached == uncached True
#       in a batch, row 0 (padded): cached == uncached False
#       in a batch, row 1 (whole): cached == uncached True
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$tmp/lib" torch==2.13.0 transformers==5.23.0
cd "$tmp"
cat > show.py <<'PY'
import torch
from transformers import AutoModelForCausalLM, GitConfig

torch.manual_seed(0)
config = GitConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
model = AutoModelForCausalLM.from_config(config).eval()
with torch.no_grad():
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.normal_(0, 0.3)


def generate(ids, mask, cached):
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False, use_cache=cached)
    return out[:, ids.shape[1]:].tolist()


short, whole = [1, 17, 23, 42], [1, 55, 31, 77, 8, 64, 12, 91]
alone = [generate(torch.tensor([short]), torch.ones(1, 4, dtype=torch.long), cached)[0] for cached in (True, False)]
ids = torch.tensor([[0] * 4 + short, whole])
mask = torch.tensor([[0] * 4 + [1] * 4, [1] * 8])
cached, uncached = (generate(ids, mask, cached) for cached in (True, False))
same = [alone[0] == alone[1], cached[0] == uncached[0], cached[1] == uncached[1]]
print("alone: cached == uncached", same[0])
print("in a batch, row 0 (padded): cached == uncached", same[1])
print("in a batch, row 1 (whole): cached == uncached", same[2])
print(alone, cached, uncached)
assert same == [True, False, True]
PY
PYTHONPATH=$tmp/lib python3 -W ignore show.py
