"""The one place that builds the arguments of a forward pass.

The arguments a family accepts are read from the signature of its `forward`: support for a new kind of argument
(another name for the cache, images) is added here and nowhere else.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saepatch.errors import UserError
from saepatch.model.inputs.padding import FAILURES, Padding, positions_of
from saepatch.model.inputs.tokens import Tokens
from saepatch.records.memory import check_memory

CACHES = ("past_key_values", "cache_params")  # names of the `forward` argument for the cache
STATES = ("state",)  # names for caches that cannot be passed in empty: only `generate` uses them
_COLUMNS: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # columns held by caches that do not report a length


class Forward:
    """Builds the arguments of one Hugging Face causal LM's `forward`."""

    def __init__(self, hf: nn.Module, padding: Padding, step_limit: int | None, last_alone: bool) -> None:
        self.padding, self.step_limit, self.last_alone = padding, step_limit, last_alone
        self.config: Any = getattr(hf, "config", None)
        self.accepted = frozenset(inspect.signature(hf.forward).parameters)
        name = next((name for name in CACHES if name in self.accepted), None)
        self.cache_name = None if step_limit == 0 else name
        # Some keep the offset of the last picture's positions, and add it to those of any later pass on a cache.
        self.own_offset = any(hasattr(module, "rope_deltas") for module in hf.modules())

    def arguments(self, tokens: Tokens, start: int = 0, last: int = 0, cache: Any = None) -> dict[str, Any]:
        """Keyword arguments of `forward`. Padded batches get explicit position ids, so that the side does not matter.

        Args:
            tokens: The whole batch, including columns that the cache holds already.
            start: First column to run; earlier columns are in the cache.
            last: Number of last columns whose logits are needed (0: all); families without `logits_to_keep` compute all
                of them.
            cache: Holds the columns before `start`, and is extended by the others; None: no cache.

        Raises:
            UserError: the cache does not hold the columns before `start`, the model takes no cache, the batch is padded
                on a side where padding changes the model's results, or the pass does not fit in memory.
        """
        check_attention(self.config, tokens.input_ids, start, tokens.padded)
        arguments: dict[str, Any] = {"input_ids": tokens.input_ids[:, start:], "use_cache": cache is not None}
        if tokens.padded:
            self.padding.check(tokens.attention_mask, cached=start > 0)
            arguments["attention_mask"] = tokens.attention_mask
        if (tokens.padded and "position_ids" in self.accepted and self.padding.first is not None) or self.own_offset:
            arguments["position_ids"] = positions_of(tokens, self.padding.first or 0)[:, start:]
        if tokens.images is not None:
            arguments |= tokens.images.arguments(start, self.accepted)
        if last and self.last_alone and "logits_to_keep" in self.accepted:
            arguments["logits_to_keep"] = int(last)
        if cache is not None:
            if self.cache_name is None:
                raise UserError("the model cannot continue from a cache: run it on whole rows")
            arguments[self.cache_name] = cache
            if start and not tells_columns(cache) and "attention_mask" in arguments:
                arguments["attention_mask"] = tokens.attention_mask[:, start:]
        if start and self.step_limit is not None and tokens.width - start > self.step_limit:
            raise UserError(
                f"with a cache the model reads {self.step_limit} column at a time, not {tokens.width - start}: "
                "pass fewer columns"
            )
        if (cached := 0 if cache is None else columns_in(cache)) != start:
            raise UserError(
                f"the cache holds {cached} columns, but the pass starts at column {start}: start after the cache"
            )
        return arguments

    def new_cache(self) -> Any:
        """An empty cache that keeps all columns even for sliding windows, which the attention masks apply."""
        from transformers import DynamicCache

        own = DynamicCache(config=self.config)
        recurrent = any(hasattr(layer, "conv_states") for layer in own.layers)
        return own if recurrent else DynamicCache()


def check_attention(config: Any, input_ids: Int[Tensor, "batch pos"], start: int, padded: bool) -> None:
    """Check that what attention holds of all pairs of columns fits in memory; devices but the CPU say so themselves.

    It holds scores of all heads in transformers' "eager", and in "sdpa" a mask, from which torch makes numbers (5 bytes
    an entry), unless the pass is plainly causal.

    Raises:
        UserError: it does not fit.
    """
    if input_ids.device.type != "cpu" or config is None:
        return
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kind, (rows, width) = getattr(text, "_attn_implementation", None), input_ids.shape
    entries, window = rows * width * (width - start), getattr(text, "sliding_window", None)
    windows = "sliding_attention" in (getattr(text, "layer_types", None) or ["sliding_attention"])
    heads = getattr(text, "num_attention_heads", 1)
    if kind == "eager":
        size = 4 * entries * (heads if isinstance(heads, int) else 1)
    elif kind == "sdpa" and (padded or start or (windows and isinstance(window, int) and window < width)):
        size = 5 * entries
    else:
        return
    check_memory(
        size,
        f"the attention scores or masks of a pass over {width:,} tokens",
        "shorten the prompts, give prompts of equal length, or sweep and attribute, which run long prompts in pieces "
        "(docs/long-prompts.md)",
    )


def tells_columns(cache: Any) -> bool:
    """Whether a cache reports how many columns it holds; a cache of only recurrent states does not."""
    try:
        cache.get_seq_length()
    except (ValueError, AttributeError):
        return False
    return True


def note_columns(cache: Any, columns: int) -> None:
    """Record how many columns were read into a cache that does not report its length."""
    if cache is not None and not tells_columns(cache):
        _COLUMNS[cache] = columns


@torch.no_grad()
def probe_steps(
    call: Callable[[Tokens, int, Any], Float[Tensor, "batch pos vocab"]], new_cache: Callable[[], Any], probe: Tokens
) -> int | None:
    """How many columns a pass with a cache may process with the same result as whole rows: any number (None), 1 or 0.

    Args:
        call: A forward pass of (tokens, first column, cache).
        new_cache: Makes an empty cache.
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
    """The cache among the keyword arguments of a pass, or None."""
    return next((arguments[name] for name in CACHES + STATES if arguments.get(name) is not None), None)


def columns_in(cache: Any) -> int:
    """Number of columns a cache holds.

    Raises:
        UserError: the number is unknown, since the cache holds only recurrent states.
    """
    if tells_columns(cache):
        return int(cache.get_seq_length())
    layers = getattr(cache, "layers", None)
    if layers is not None and cache in _COLUMNS:
        return _COLUMNS[cache]
    if layers is None or any(any(getattr(layer, "has_previous_state", {}).values()) for layer in layers):
        raise UserError("a cache of only recurrent states does not report how many columns it holds: use_cache=False")
    return 0
