"""Greedy decoding: always the token with the largest logit, whatever generation_config.json says."""

from collections.abc import Sequence
from typing import Any

# Every field of transformers' GenerationConfig that acts without sampling, at its neutral value. Fields that are not
# passed to `generate` are taken from the checkpoint, and chat models often set a repetition penalty.
NEUTRAL: dict[str, Any] = {
    # how the next token is chosen
    "do_sample": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "use_mtp": None,
    "token_healing": None,
    # changes to the logits
    "guidance_scale": None,
    "sequence_bias": None,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "min_length": 0,
    "min_new_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "watermarking_config": None,
    "renormalize_logits": None,
    # stopping criteria besides the end token and the length
    "max_time": None,
    "stop_strings": None,
    # what is returned
    "return_dict_in_generate": False,
}


def greedy_options(hf: Any, tokenizer: Any) -> dict[str, Any]:
    """Arguments of `generate`: the neutral fields that the installed transformers has, and the end tokens."""
    known = {name: value for name, value in NEUTRAL.items() if hasattr(hf.generation_config, name)}
    return known | {"eos_token_id": sorted(end_tokens(hf, tokenizer)) or None}


def end_tokens(hf: Any, tokenizer: Any) -> set[int]:
    """All tokens that end a text: the union over a checkpoint's files, which do not always agree."""
    ends: set[int] = set()
    for source in (getattr(hf, "generation_config", None), hf.config, tokenizer):
        stop: Any = getattr(source, "eos_token_id", None)
        ends |= set(stop) if isinstance(stop, Sequence) else {stop} if stop is not None else set()
    return ends
