#!/bin/bash
# transformer-lens 3.9.0 (transformers 5.23.0, torch 2.13.0)
#
# Behaviour: `TransformerBridge.boot_transformers(…, hf_model=model)` leaves the caller's Hugging Face model as it is.
# `bridge.enable_compatibility_mode()` then folds layer norms and centres weights in that very object, not in a copy:
# the caller's own `model` has another residual stream and other logits afterwards. No warning is given.
#
# Why it is surprising: the option is described as processing for the bridge. The log-probabilities of the caller's
# model stay the same, so comparing its predictions shows nothing, while a dictionary or probe that was trained on its
# residual stream now reads other values. A model saved or measured after the call is not the one that was loaded.
#
# Seen: after boot_transformers: relative change of logits 0.000, log-probabilities 0.000, residual stream 0.000
#       after enable_compatibility_mode: relative change of logits 0.064, log-probabilities 0.000, residual stream 0.184
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$tmp/lib" torch==2.13.0 transformers==5.23.0 transformer-lens==3.9.0
cd "$tmp"
cat > show.py <<'PY'
import sys, warnings, tempfile
warnings.simplefilter("ignore")
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformer_lens.model_bridge import TransformerBridge

torch.manual_seed(0)
words = {f"w{i}": i for i in range(50)} | {"<eos>": 50}
made = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
made.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", bos_token="<eos>", pad_token="<eos>")
model = GPT2LMHeadModel(GPT2Config(vocab_size=51, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=50, eos_token_id=50)).eval()
with torch.no_grad():
    for weight in model.parameters():
        weight.normal_(0, 0.3)  # layer norms too, as after training
tokens = torch.tensor([[50, 3, 14, 15, 9, 26]])


def seen():
    out = model(tokens, output_hidden_states=True)
    return out.logits, out.logits.log_softmax(-1), out.hidden_states[1]


def compare(name, then, now):
    logits, shares, stream = (float((b - a).norm() / a.norm()) for a, b in zip(then, now))
    print(f"{name}: relative change of logits {logits:.3f}, log-probabilities {shares:.3f}, residual stream {stream:.3f}")
    return logits, shares, stream


with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
    before = seen()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.config.architectures = ["GPT2LMHeadModel"]
    bridge = TransformerBridge.boot_transformers(folder, hf_model=model, tokenizer=tokenizer, device="cpu")
    booted = compare("after boot_transformers", before, seen())
    bridge.enable_compatibility_mode(disable_warnings=True)
    rewritten = compare("after enable_compatibility_mode", before, seen())
same = max(booted) < 1e-4
moved = rewritten[0] > 1e-3 and rewritten[1] < 1e-4 and rewritten[2] > 1e-2
sys.exit(0 if same and moved else 1)
PY
HF_HUB_OFFLINE=1 PYTHONPATH="$tmp/lib" python3 show.py 2>/dev/null
