"""The one place that builds the arguments of a forward pass.

What a family's `forward` takes is read off its signature, so a new kind of argument (another name of the cache, images
beside the tokens) is added here and nowhere else.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saepatch.errors import UserError
from saepatch.model.padding import FAILURES, Padding, positions_of
from saepatch.model.tokens import Tokens

CACHES = ("past_key_values", "cache_params")  # what `forward` calls the keys, values and states of earlier columns
STATES = ("state",)  # the same where it is not handed in empty: `generate` alone steps on it
_COLUMNS: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # that caches hold which do not tell


class Forward:
    """The arguments that one Hugging Face causal LM takes."""

    def __init__(self, hf: nn.Module, padding: Padding, step_limit: int | None) -> None:
        self.padding, self.step_limit = padding, step_limit
        self.config: Any = getattr(hf, "config", None)
        self.accepted = frozenset(inspect.signature(hf.forward).parameters)
        name = next((name for name in CACHES if name in self.accepted), None)
        self.cache_name = None if step_limit == 0 else name

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
                raise UserError("the model takes no cache that could be stepped on: run it on whole rows")
            arguments[self.cache_name] = cache
            if start and not tells_columns(cache) and "attention_mask" in arguments:
                arguments["attention_mask"] = tokens.attention_mask[:, start:]
        if start and self.step_limit is not None and tokens.width - start > self.step_limit:
            raise UserError(
                f"the model reads {self.step_limit} column at a time on a cache, not {tokens.width - start}"
            )
        if (held := 0 if cache is None else columns_in(cache)) != start:
            raise UserError(f"the cache holds {held} columns, and the pass starts at column {start}")
        return arguments

    def new_cache(self) -> Any:
        """An empty cache that keeps all columns, sliding windows too: the masks cut them."""
        from transformers import DynamicCache

        own = DynamicCache(config=self.config)
        recurrent = any(hasattr(layer, "conv_states") for layer in own.layers)
        return own if recurrent else DynamicCache()


def tells_columns(cache: Any) -> bool:
    """Whether a cache itself tells how many columns it holds; one of recurrent states alone does not."""
    try:
        cache.get_seq_length()
    except (ValueError, AttributeError):
        return False
    return True


def note_columns(cache: Any, columns: int) -> None:
    """Remember how many columns were read into a cache that does not tell."""
    if cache is not None and not tells_columns(cache):
        _COLUMNS[cache] = columns


@torch.no_grad()
def probe_steps(
    call: Callable[[Tokens, int, Any], Float[Tensor, "batch pos vocab"]], new_cache: Callable[[], Any], probe: Tokens
) -> int | None:
    """How many columns a pass may take in on a cache: any number (None), one, or none, so that it gives what whole rows
    give.

    Args:
        call: A forward pass from a column on, on a cache.
        new_cache: An empty cache.
        probe: One row.
    """
    logits = call(probe, 0, None)
    whole = logits.float()
    tolerance = (1e-3 if logits.dtype == torch.float32 else 5e-2) * float(whole.std())
    width, start = probe.width, probe.width - 3
    for limit, ends in ((None, [start, width]), (1, range(start, width + 1))):
        try:
            cache, read, parts = new_cache(), 0, []
            for end in ends:
                parts.append(call(probe.columns(end), read, cache))
                read = end
        except (*FAILURES, UserError):
            continue
        if float((torch.cat(parts, 1).float() - whole).abs().amax()) <= tolerance:
            return limit
    return 0


def cache_among(arguments: Mapping[str, Any]) -> Any:
    """The cache among the keyword arguments of a pass; None where there is none."""
    return next((arguments[name] for name in CACHES + STATES if arguments.get(name) is not None), None)


def columns_in(cache: Any) -> int:
    """How many columns a cache holds.

    Raises:
        UserError: it does not tell, for it holds recurrent states alone.
    """
    if tells_columns(cache):
        return int(cache.get_seq_length())
    layers = getattr(cache, "layers", None)
    if layers is not None and cache in _COLUMNS:
        return _COLUMNS[cache]
    if layers is None or any(any(getattr(layer, "has_previous_state", {}).values()) for layer in layers):
        raise UserError("a cache of recurrent states alone does not tell what it has read: use_cache=False")
    return 0
