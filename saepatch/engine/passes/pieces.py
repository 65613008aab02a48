"""Passes over long prompts in pieces: each piece runs on the keys and values of those before it."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from saepatch.model.language_model import LanguageModel, Tokens

PIECE = 4096  # positions


def next_logits_in_pieces(
    model: LanguageModel, tokens: Tokens, piece: int = PIECE, cache: Any = None
) -> Float[Tensor, "batch vocab"]:
    """Logits after prompts that end in the last column, from passes over `piece` columns at a time.

    Memory: keys and values of all columns, `2 · layers · columns · kv_heads · head_width` numbers for each prompt, and
    one piece's activations. Only the last column is unembedded. Models that do not continue from a cache run whole.
    """
    if tokens.width <= piece or not model.takes_cache or model.step_limit is not None:
        return model.call(tokens, last=True, cache=cache)[:, -1]
    cache = model.new_cache() if cache is None else cache
    for start in range(0, tokens.width, piece):
        logits = model.call(tokens.columns(start + piece), start, last=True, cache=cache)
    return logits[:, -1]
