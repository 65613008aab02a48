#!/bin/bash
# torch 2.13.0 (CPU), transformers 5.23.0
#
# Behaviour: with weights that need no gradient, the unembedding of the last position of a batch (`logits_to_keep=1`, that
# is `lm_head(hidden[:, -1:])`) runs as a batched product, aten::bmm, which reads the whole vocabulary matrix once for
# every prompt. With weights that need a gradient, or a contiguous slice, the same product is one aten::mm.
#
# Why it is surprising: requires_grad_(False) is what one does to make inference cheaper, and it has no bearing on the
# result. Here it chooses the kernel: nn.functional.linear folds a three-dimensional input into a matrix if it is
# contiguous or if the weight needs a gradient, and otherwise broadcasts the weight: 16 prompts read it 16 times.
#
# Seen: logits_to_keep=1, trainable weights:        mm
#       logits_to_keep=1, requires_grad_(False):    bmm
#       the same slice, contiguous, frozen weights: mm
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$tmp/lib" torch==2.13.0 transformers==5.23.0
cd "$tmp"
cat > show.py <<'PY'
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel

torch.manual_seed(0)
VOCABULARY = 5003  # tells the unembedding's product from all others
model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=VOCABULARY, tie_word_embeddings=False))
model.eval()
tokens = torch.randint(0, VOCABULARY, (16, 12))


def product(run):
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        run()
    shaped = seen.key_averages(group_by_input_shape=True)
    kernels = ("aten::mm", "aten::bmm", "aten::addmm")
    return {e.key for e in shaped if e.key in kernels and any(VOCABULARY in s for s in e.input_shapes if s)}


trainable = product(lambda: model(tokens, logits_to_keep=1))
model.requires_grad_(False)
frozen = product(lambda: model(tokens, logits_to_keep=1))
with torch.no_grad():
    hidden = model.transformer(tokens).last_hidden_state
contiguous = product(lambda: model.lm_head(hidden[:, -1:].contiguous()))
for name, seen in (
    ("logits_to_keep=1, trainable weights:", trainable),
    ("logits_to_keep=1, requires_grad_(False):", frozen),
    ("the same slice, contiguous, frozen weights:", contiguous),
):
    print(f"{name:43} {' '.join(kernel.removeprefix('aten::') for kernel in sorted(seen))}")
assert trainable == contiguous == {"aten::mm"}, (trainable, contiguous)
assert frozen == {"aten::bmm"}, frozen
PY
PYTHONPATH=$tmp/lib python3 -W ignore show.py
