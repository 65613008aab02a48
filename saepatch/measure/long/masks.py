"""Attention masks as rules: which keys a query sees, evaluated only where needed.

transformers passes a layer's mask to attention as one matrix of all queries and keys. Registered in place of the
function that builds it, `mask_rule` passes the function of two positions from which the matrix would be built.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saepatch.errors import UserError

EDGES = 2  # blocks that a window's edge may cut for the queries of one block


@dataclass(frozen=True, eq=False)
class MaskRule:
    """Which keys the queries of one pass see, by position; the pass reads `queries` columns from `start` on."""

    function: Callable[..., Any]
    start: int
    queries: int
    keys: int
    device: torch.device

    def __call__(self, query: Int[Tensor, "*q"], key: Int[Tensor, "*k"]) -> Bool[Tensor, "*qk"]:
        first = query.new_zeros(())
        return self.function(first, first, query, key)

    @cached_property
    def _known(self) -> dict[int, "BlockRanges"]:
        return {}

    def ranges(self, block: int) -> "BlockRanges":
        """The key blocks that each query block of this pass sees; layers of one kind share the rule, and this."""
        if block not in self._known:
            self._known[block] = _ranges(self, block)
        return self._known[block]


def mask_rule(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    device: Any = "cpu",
    **others: Any,
) -> MaskRule:
    """What `ALL_MASK_ATTENTION_FUNCTIONS` calls for each kind of layer.

    Raises:
        UserError: there are several prompts, padding, or a mask that is not a function of positions.
    """
    if batch_size != 1 or (attention_mask is not None and not bool(attention_mask.all())):
        raise UserError("attention is traced in one prompt at a time, without padding: give one text")
    if others.get("use_vmap") or others.get("kv_offset"):
        raise UserError("the model has its own kind of attention mask, which sparse tracing does not support")
    return MaskRule(mask_function, int(others.get("q_offset", 0)), q_length, kv_length, torch.device(device))


@dataclass(frozen=True, eq=False)
class BlockRanges:
    """For each query block of a pass: blocks that are always kept, and the range of those that are chosen from.

    Attributes:
        forced: The prompt's first block, those that a window's edge cuts, the block before and the own; −1: none.
        low, high: Blocks `low` to `high` − 1 are seen whole by every query of the block, and are not forced.
    """

    forced: Int[Tensor, "blocks forced"]
    low: Int[Tensor, "blocks"]
    high: Int[Tensor, "blocks"]


def _ranges(rule: MaskRule, block: int) -> BlockRanges:
    """Raises UserError for a mask that is not causal within a window."""
    number = -(-rule.queries // block)
    own = rule.start // block + torch.arange(number, device=rule.device)
    total = -(-rule.keys // block)
    low, cut = [], []
    for at in own.tolist():
        first, last = at * block, min(rule.keys, (at + 1) * block) - 1
        whole, part, ends = _seen(rule, first, last, total, block)
        edges = part[part < at]
        if len(edges) > EDGES or (len(whole) and len(whole) != at - int(whole[0])) or ends != (first, last):
            raise UserError(
                f"the model's attention is not causal within a window of positions (query {first} to {last}, blocks of "
                f"{block}), so it is not traced sparsely: choose a block that divides the model's chunks of attention"
            )
        low.append(int(whole[0]) if len(whole) else at)
        cut.append([*edges.tolist(), *[-1] * (EDGES - len(edges))])
    lowest, high = torch.tensor(low, device=rule.device).clamp(min=1), (own - 1).clamp(min=0)
    edges = torch.tensor(cut, device=rule.device)
    edges = torch.where((edges == 0) | (edges >= own[:, None] - 1), -1, edges)  # forced anyway
    sink = torch.where(own >= 2, 0, -1)
    cuts = edges.T if bool((edges >= 0).any()) else ()
    forced = torch.stack([sink, *cuts, own - 1, own], 1)
    return BlockRanges(forced, torch.minimum(lowest, high), high)


def _seen(rule: MaskRule, first: int, last: int, total: int, block: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Blocks that both queries see whole, other blocks that one of them sees, and the last position each sees."""
    keys = torch.arange(rule.keys, device=rule.device)
    seen = rule(torch.tensor([[first], [last]], device=rule.device), keys).expand(2, -1)
    every = torch.nn.functional.pad(seen, (0, total * block - rule.keys)).view(2, total, block)
    whole = every.all(-1).all(0)
    part = every.any(-1).any(0) & ~whole
    ends = rule.keys - 1 - seen.flip(-1).int().argmax(-1)
    return whole.nonzero().flatten(), part.nonzero().flatten(), (int(ends[0]), int(ends[1]))
