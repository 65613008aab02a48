#!/bin/bash
# transformers 5.23.0 (tokenizers as it requires)
#
# Behaviour: AutoTokenizer.from_pretrained, given a folder with a config.json of gpt2 or qwen2 and no tokenizer
# file at all, raises nothing and returns a tokenizer whose vocabulary holds its special token alone; every text
# is encoded as an empty list. For a folder of llama the same call raises an error.
#
# Why it is surprising: a folder into which a model was saved without its tokenizer is an everyday mistake. In
# most libraries it is an error by the time the tokenizer is loaded; here, for some model types, every
# prompt is the same empty prompt, and whether one is told depends on the type.
#
# Seen: gpt2 GPT2Tokenizer, 1 tokens, 'Hello world' -> []
#       qwen2 Qwen2Tokenizer, 1 tokens, 'Hello world' -> []
#       llama raises ValueError
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$tmp/lib" transformers==5.23.0
cd "$tmp"
cat > show.py <<'PY'
from transformers import AutoConfig, AutoTokenizer

seen = {}
for name in ("gpt2", "qwen2", "llama"):
    AutoConfig.for_model(name).save_pretrained(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        seen[name] = None
        print(name, "raises", type(error).__name__)
        continue
    seen[name] = tokenizer("Hello world", add_special_tokens=False)["input_ids"]
    print(f"{name} {type(tokenizer).__name__}, {len(tokenizer)} tokens, 'Hello world' -> {seen[name]}")
assert seen == {"gpt2": [], "qwen2": [], "llama": None}
PY
PYTHONPATH=$tmp/lib python3 -W ignore show.py
