"""A tiny random model of any type that transformers knows: its default config, every size in it made small."""

import copy
from typing import Any

import torch
from tiny import byte_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCABULARY, LAYERS, WIDTH = 300, 4, 32
TYPES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})

# What configs call their sizes, behind the size that each gets.
_NAMES = [
    (
        WIDTH,
        """hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim lru_width encoder_embed_dim
        decoder_embed_dim projection_dim attention_hidden_size out_hidden_size cross_attention_hidden_size
        text_hidden_size emb_dim d_embed hidden_dim qformer_hidden_size moe_intermediate_size
        shared_expert_intermediate_size expert_ffn_hidden_size intermediate_size_mlp shared_intermediate_size
        moe_shared_expert_intermediate_size image_size""",
    ),
    (2 * WIDTH, """intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim mlp_dim ffn_hidden_size"""),
    (
        LAYERS,
        """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers
        num_encoder_layers depth num_blocks layers""",
    ),
    (
        4,
        """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads
        num_encoder_attention_heads num_local_experts num_experts n_routed_experts moe_num_experts num_routed_experts
        mamba_d_state state_size mamba_d_conv_state ssm_state_size mamba_state_dim""",
    ),
    (
        2,
        """num_key_value_heads num_kv_heads n_head_kv multi_query_group_num num_experts_per_tok num_experts_per_token
        moe_topk moe_k top_k_experts moe_top_k""",
    ),
    (
        8,
        """head_dim kv_channels attention_head_dim qk_head_dim d_kv qk_rope_head_dim qk_nope_head_dim v_head_dim
        mamba_n_heads mamba_d_head mamba_num_heads mamba_head_dim n_mamba_heads patch_size""",
    ),
    (16, "kv_lora_rank q_lora_rank index_head_dim"),
    (128, "max_position_embeddings n_positions n_ctx max_sequence_length max_seq_len"),
    (VOCABULARY, "vocab_size"),
    (1, "n_group topk_group"),
    (3, "num_channels"),
]
SIZES = {name: size for size, names in _NAMES for name in names.split()}
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
ROPE = {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "decoder_start_token_id": 0}

# What one type needs beside: keys of its config, those of its parts after a dot.
_HALVES = {"text_config.rope_parameters.mrope_section": [2, 1, 1]}
_HYBRID = ["linear_attention", "hybrid"] * (LAYERS // 2)
_SHARING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
_PER_LAYER = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blenderbot": {"encoder_layers": LAYERS},
    "codegen": {"rotary_dim": 4},
    "cohere_compass": {"text_config.rope_parameters": ROPE},
    "cohere_compass_text": {"rope_parameters": ROPE},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": _SHARING | _PER_LAYER | {"activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0]},
    "gemma4": {"text_config." + key: value for key, value in (_SHARING | _PER_LAYER).items()},
    "gemma4_text": _SHARING | _PER_LAYER,
    "gemma4_unified": {"text_config." + key: value for key, value in _SHARING.items()},
    "gemma4_unified_text": _SHARING,
    **dict.fromkeys(["glm4v", "glm46v", "glm_ocr", "glmga", "qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker"], _HALVES),
    **dict.fromkeys(["paddleocr_vl"], _HALVES),
    "glm4v_moe": {"text_config.rope_parameters.mrope_section": [1, 1, 0]},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2, "num_local_experts": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {
        "is_decoder": True, "attn_layers": ["local", "lsh"] * 2, "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 16], "attention_head_size": 8, "feed_forward_size": 64, "hash_seed": 0, "num_buckets": 2,
    },
    "step3p7": {"text_config.sliding_window": 4, "text_config.rope_parameters": ROPE["full_attention"]},
    "xlnet": {"d_head": 8},
    "xlstm": {"embedding_dim": WIDTH},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "zamba": {
        "layers_block_type": _HYBRID, "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": _HYBRID, "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4,
        "hybrid_layer_ids": [1, 3], "num_query_groups": 4, "kv_channels": 8, "mamba_headdim": 8, "n_mamba_heads": 8,
    },
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    return byte_tokenizer()


def _small(value: Any, key: str, layers: int | None = None) -> Any:
    if isinstance(value, dict):
        layers = next((value[name] for name in COUNTS if isinstance(value.get(name), int)), layers)
        inner = {name: _small(each, str(name), layers) for name, each in value.items() if not _past_the_last(name)}
        if inner.get("kv_lora_rank"):  # latent attention has keys and values for every head
            inner["num_key_value_heads"] = inner.get("num_attention_heads")
        return inner
    if key in TOKENS:
        return TOKENS[key]
    if key.endswith(("_token_id", "_token_index")) and isinstance(value, int):
        return 260 + sum(map(ord, key)) % 40
    if key == "head_dim" and value is None:
        return SIZES[key]
    if key == "mrope_section":
        return [2, 1, 1]
    if key in SIZES and isinstance(value, int) and not isinstance(value, bool) and value:
        return min(value, SIZES[key])
    if isinstance(value, list) and layers and len(value) == layers > LAYERS:  # one entry a layer
        entries = [_small(each, key) for each in value]
        kinds = list(dict.fromkeys(entries)) if all(isinstance(each, str) for each in entries) else entries
        return [kinds[layer % len(kinds)] for layer in range(LAYERS)]
    return value


def _past_the_last(key: Any) -> bool:
    """Whether a key of a config is the number of a layer that the small model has not."""
    return str(key).isdigit() and int(key) >= LAYERS


def tiny_config(model_type: str) -> Any:
    """The default config of a type, made small.

    Raises:
        Exception: whatever the library raises for sizes that do not go together.
    """
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    small = _small(default.to_dict(), "")
    for name in ("transformers_version", "architectures", "model_type"):
        small.pop(name, None)
    small |= TOKENS
    for key, value in OVERRIDES.get(model_type, {}).items():
        place, (*path, last) = small, key.split(".")
        for name in path:
            place = place[name]
        place[last] = copy.deepcopy(value)
    return config_class(**small)


def tiny_model(model_type: str) -> nn.Module:
    """A random model of a type, as its auto class makes it from a config; causal where there is such a class."""
    torch.manual_seed(0)
    causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    auto = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    hf = auto.from_config(tiny_config(model_type)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if weight.ndim > 1:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
            elif name.endswith("bias"):
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return hf
