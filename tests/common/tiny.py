"""Tiny random models of many families, a byte tokenizer and random dictionaries, made in milliseconds."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import adopt
from saepatch.model import families as layouts
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading.load import wrap_model
from saepatch.model.sites import Site

D_MODEL = 16
COMMON = {"hidden_size": D_MODEL, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
COMMON |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "mistral": COMMON | {"sliding_window": 4},
    "qwen2": COMMON,
    "qwen3": COMMON,
    "gemma2": COMMON | {"sliding_window": 4, "query_pre_attn_scalar": 4},
    "gemma3_text": COMMON | {"sliding_window": 4, "query_pre_attn_scalar": 4},
    "phi": COMMON | {"num_key_value_heads": 4},
    "gpt2": {"n_embd": D_MODEL, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gpt_neox": COMMON,
    "opt": COMMON | {"ffn_dim": 32, "word_embed_proj_dim": D_MODEL},
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so any text tokenises and one character is one token; BOS is added in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<bos>": 0, "<eos>": 1, "<pad>": 2} | {char: 3 + i for i, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


def tiny_model(family: str = "llama", seed: int = 0, **changes: Any) -> LanguageModel:
    """A random model of the family. Weights are large enough that every part of it matters to the logits.

    A copy of one that is made once a process, since what loading probes takes longer than most tests.
    """
    known = repr(FAMILIES.get(family)), repr(layouts.FAMILIES.get(family))  # tests change both
    key = (family, seed, repr(sorted(changes.items())), *known)
    if key not in _MADE:
        made = _new_model(family, seed, changes)
        _MADE[key] = made, torch.get_rng_state()
    made, state = _MADE[key]
    torch.set_rng_state(state)
    return deepcopy(made)


_MADE: dict[tuple[Any, ...], tuple[LanguageModel, torch.Tensor]] = {}


def _new_model(family: str, seed: int, changes: dict[str, Any]) -> LanguageModel:
    torch.manual_seed(seed)
    options = (
        FAMILIES.get(family, COMMON)
        | {"vocab_size": 259, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        | changes
    )
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.25)
            elif name.endswith("bias"):
                weight.normal_(0, 0.1)
    return wrap_model(hf, byte_tokenizer(), f"tiny-{family}")


def random_sae(architecture: str = "topk", d_in: int = D_MODEL, d_sae: int = 48, seed: int = 0, **changes: Any) -> Any:
    """A random sae_lens inference SAE."""
    from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "topk": (TopKSAE, TopKSAEConfig, {"k": 6}),
        "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {}),
        "standard": (StandardSAE, StandardSAEConfig, {}),
        "gated": (GatedSAE, GatedSAEConfig, {}),
    }
    sae_class, cfg_class, options = kinds[architecture]
    sae = sae_class(cfg_class(d_in=d_in, d_sae=d_sae, **(options | changes)))
    generator = torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return sae


def random_dictionary(site: str = "resid_post.1", architecture: str = "topk", **changes: Any) -> Dictionary:
    return adopt(random_sae(architecture, **changes), Site.parse(site), f"random {architecture}")


def save_model_and_sae(folder: Path) -> None:
    """`folder/model`, and `folder/saes` with a dictionary at resid_post.1: what commands are given."""
    model = tiny_model()
    model.hf.save_pretrained(folder / "model")
    model.tokenizer.save_pretrained(folder / "model")
    sae = random_sae(seed=1)
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    sae.save_model(folder / "saes" / "resid_post.1")
