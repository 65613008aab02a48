#!/bin/bash
# transformer-lens 3.9.0 (transformers 5.23.0, torch 2.13.0)
#
# Behaviour: `TransformerBridge.boot_transformers(…, hf_model=model, tokenizer=tokenizer)` with a tokenizer that has no
# special tokens gives the caller's own tokenizer object `<|endoftext|>` as BOS, EOS and padding, with a new id that the
# model's embedding does not have. The same call a second time, with the same tokenizer and another copy of the model,
# raises KeyError: 'name_or_path'.
#
# Why it is surprising: the first call succeeds without a warning, so that code which boots a bridge for every prompt
# length or seed works once. In between, everything else that holds the tokenizer has another BOS and padding id, which
# is out of the model's range, and one more token than it was made with.
#
# Seen: before: 50 tokens, BOS None; first boot: ok; after: 51 tokens, BOS <|endoftext|> = 50 of an embedding of 50 rows
#       second boot: KeyError 'name_or_path'
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$tmp/lib" torch==2.13.0 transformers==5.23.0 transformer-lens==3.9.0
cd "$tmp"
cat > show.py <<'PY'
import sys, warnings
warnings.simplefilter("ignore")
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformer_lens.model_bridge import TransformerBridge

made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)


def boot():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    try:
        TransformerBridge.boot_transformers("gpt2", hf_model=model, tokenizer=tokenizer)
    except KeyError as error:
        return f"KeyError {error}"
    return "ok"


before = (len(tokenizer), tokenizer.bos_token)
first = boot()
after = (len(tokenizer), tokenizer.bos_token, tokenizer.bos_token_id)
second = boot()
print(f"before: {before[0]} tokens, BOS {before[1]}; first boot: {first}; after: {after[0]} tokens, BOS {after[1]} = {after[2]} of an embedding of 50 rows")
print(f"second boot: {second}")
expected = before == (50, None) and first == "ok" and after == (51, "<|endoftext|>", 50) and second == "KeyError 'name_or_path'"
sys.exit(not expected)
PY
PYTHONPATH="$tmp/lib" HF_HUB_OFFLINE=1 python3 show.py
