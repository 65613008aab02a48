"""The one place that builds the arguments of a forward pass.

What a family's `forward` takes is read off its signature, so a new kind of argument (another name of the cache, images
beside the tokens) is added here and nowhere else.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from saepatch.errors import UserError
from saepatch.model.padding import Padding, positions_of
from saepatch.model.tokens import Tokens

CACHES = ("past_key_values", "cache_params")  # what `forward` calls the keys, values and states of earlier columns


class Forward:
    """The arguments that one Hugging Face causal LM takes."""

    def __init__(self, hf: nn.Module, padding: Padding) -> None:
        self.padding = padding
        self.config: Any = getattr(hf, "config", None)
        self.accepted = frozenset(inspect.signature(hf.forward).parameters)
        self.cache_name = next((name for name in CACHES if name in self.accepted), None)

    def arguments(self, tokens: Tokens, start: int = 0, last: bool = False, cache: Any = None) -> dict[str, Any]:
        """Keyword arguments of `forward`. Padded batches carry explicit positions, so either side gives one result.

        Args:
            tokens: The whole batch, with what the cache holds.
            start: First column that is run; those before it are in the cache.
            last: Only the last column's logits are needed; a family that cannot leave the others out gives them, too.
            cache: What holds the columns before `start`, and takes in the others; None: nothing is kept.

        Raises:
            UserError: the cache does not hold the columns before `start`, the model takes none, or the batch is padded
                where the model does not compute the same as without.
        """
        arguments: dict[str, Any] = {"input_ids": tokens.input_ids[:, start:], "use_cache": cache is not None}
        if tokens.padded:
            self.padding.check(tokens)
            arguments["attention_mask"] = tokens.attention_mask
            if "position_ids" in self.accepted and self.padding.first is not None:
                arguments["position_ids"] = positions_of(tokens, self.padding.first)[:, start:]
        if last and "logits_to_keep" in self.accepted:
            arguments["logits_to_keep"] = 1
        if cache is not None:
            if self.cache_name is None:
                raise UserError("the model takes no cache of keys and values: run it on whole rows")
            arguments[self.cache_name] = cache
        if (held := 0 if cache is None else columns_in(cache)) != start:
            raise UserError(f"the cache holds {held} columns, and the pass starts at column {start}")
        return arguments

    def new_cache(self) -> Any:
        """An empty cache that keeps all columns, sliding windows too: the masks cut them."""
        from transformers import DynamicCache

        own = DynamicCache(config=self.config)
        recurrent = any(hasattr(layer, "conv_states") for layer in own.layers)
        return own if recurrent else DynamicCache()


def cache_among(arguments: Mapping[str, Any]) -> Any:
    """The cache among the keyword arguments of a pass; None where there is none."""
    return next((arguments[name] for name in CACHES if arguments.get(name) is not None), None)


def columns_in(cache: Any) -> int:
    """How many columns a cache holds.

    Raises:
        UserError: it does not tell, for it holds recurrent states alone.
    """
    try:
        return int(cache.get_seq_length())
    except ValueError as error:
        raise UserError("a cache of recurrent states alone does not tell what it has read: use_cache=False") from error
