#!/bin/bash
# transformers 5.23.0 (torch 2.13.0), model types of Qwen-VL (`qwen2_vl`, `qwen2_5_vl`, `qwen3_vl`)
#
# Behaviour: after any pass over a prompt with a picture, passes over plain text that continue from a key-value
# cache give other logits than before: the model keeps the offset of the picture's positions (`rope_deltas`) as an
# attribute, and adds it to the positions of every later pass on a cache that is given no position_ids.
#
# Why it is surprising: a forward pass is expected to depend on its arguments alone, the prompt without a cache is
# right all along, and no warning is given; a text alone, before any picture, is right on a cache too.
#
# Seen: text on a cache is the whole pass, before a picture: True
#                                            after a picture: False
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$tmp/lib" torch==2.13.0 transformers==5.23.0
cd "$tmp"
cat > show.py <<'PY'
import torch
from transformers import AutoModelForImageTextToText, DynamicCache, Qwen2VLConfig

torch.manual_seed(0)
text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 100, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=90, video_token_id=91,
    vision_start_token_id=92, vision_end_token_id=93)
model = AutoModelForImageTextToText.from_config(config).eval()
with torch.no_grad():
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.normal_(0, 0.3)


@torch.no_grad()
def last_logits(ids, cached):
    if not cached:
        return model(input_ids=ids).logits[0, -1]
    cache = DynamicCache()
    model(input_ids=ids[:, :4], past_key_values=cache, use_cache=True)
    return model(input_ids=ids[:, 4:], past_key_values=cache, use_cache=True).logits[0, -1]


words = torch.tensor([[5, 17, 23, 42, 31, 8]])
close = lambda: torch.allclose(last_logits(words, True), last_logits(words, False), atol=1e-4)
print("text on a cache is the whole pass, before a picture:", close())
ids = torch.tensor([[5, 92, *[90] * 8, 93, 7]])
with torch.no_grad():
    model(input_ids=ids, pixel_values=torch.randn(32, 96), image_grid_thw=torch.tensor([[1, 4, 8]]),
        mm_token_type_ids=(ids == 90).int())
print("                                     after a picture:", close())
PY
PYTHONPATH=$tmp/lib python3 -W ignore show.py
