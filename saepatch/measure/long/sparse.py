"""Attention over few key blocks, and the exact share of the whole attention on them."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function

from saepatch.engine.softmax import LEAST
from saepatch.errors import UserError
from saepatch.measure.long.choosing import NUMBERS, Scores, SpanKeys, block_keys, choose, span_keys
from saepatch.measure.long.masks import BlockRanges, MaskRule
from saepatch.model.language_model import LanguageModel


@dataclass(frozen=True, eq=False)
class BlockedKeys:
    """Keys and values of one layer in blocks; the last one is filled up with zeros, which no query sees."""

    key: Float[Tensor, "kv blocks block width"]
    value: Float[Tensor, "kv blocks block vwidth"]
    length: int  # number of positions

    @classmethod
    def of(
        cls, key: Float[Tensor, "1 kv pos width"], value: Float[Tensor, "1 kv pos vwidth"], block: int
    ) -> "BlockedKeys":
        return cls(_blocked(key[0], block), _blocked(value[0], block), key.shape[2])

    @property
    def block(self) -> int:
        return self.key.shape[2]

    @property
    def full(self) -> int:
        """Number of blocks that are full."""
        return self.length // self.block


@dataclass(frozen=True, eq=False)
class BlockAttention:
    """Exact attention of the queries of one block of one layer, over all keys that they see.

    Attributes:
        block: Its number.
        read: Mean over its queries of the attention on each key block, up to the own.
        last: The same of its last query.
        dropped: For each query, the attention on keys that are not kept.
        kept: The kept key blocks, chosen or forced.
        recall: For each head, the share of the k candidates with the largest mean attention that are kept; NaN where
            there are at most k candidates.
    """

    block: int
    read: Float[Tensor, "heads blocks"]
    last: Float[Tensor, "heads blocks"]
    dropped: Float[Tensor, "heads queries"]
    kept: Bool[Tensor, "heads blocks"]
    recall: Float[Tensor, "heads"]


@dataclass(frozen=True, eq=False)
class SparseAttention:
    """Attention over k chosen blocks, besides those always kept, for transformers' attention interface.

    Attributes:
        model: The model, whose blocks number the layers.
        k: Number of chosen key blocks for each head and query block.
        block: Positions of a block, of queries and of keys.
        measured: Numbers of the query blocks whose whole attention is measured, in time linear in the prompt for each.
        chosen: The chosen key blocks by layer; −1: fewer were seen.
        exact: The measurements by layer.
        known: Representatives of the blocks so far, by layer.
    """

    model: LanguageModel
    k: int
    block: int
    measured: Collection[int] = ()
    chosen: dict[int, list[Int[Tensor, "heads blocks k"]]] = field(default_factory=dict)
    exact: dict[int, list[BlockAttention]] = field(default_factory=dict)
    known: dict[int, SpanKeys] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = {m: layer for layer, block in enumerate(self.model.layout.blocks) for m in block.modules()}
        object.__setattr__(self, "_layers", numbers)

    @torch.no_grad()
    def __call__(
        self,
        module: nn.Module,
        query: Float[Tensor, "1 heads queries width"],
        key: Float[Tensor, "1 kv keys width"],
        value: Float[Tensor, "1 kv keys vwidth"],
        attention_mask: Any,
        scaling: float | None = None,
        softcap: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        layer = self._layers.get(module, -1)  # type: ignore[attr-defined]
        rule = attention_mask
        if rule is None and getattr(module, "is_causal", True) and query.shape[2] == key.shape[2]:
            rule = MaskRule(causal_mask_function, 0, query.shape[2], key.shape[2], query.device)
        if not isinstance(rule, MaskRule) or layer < 0 or rule.keys != key.shape[2]:
            raise UserError(
                f"{type(module).__name__} masks attention with a matrix of its own, which is not traced sparsely: "
                "attribute_attention takes it, on shorter prompts"
            )
        if options.get("position_bias") is not None or (hasattr(module, "sinks") and options.get("s_aux") is None):
            raise UserError(f"{type(module).__name__} adds a bias to attention, so it cannot be traced sparsely")
        scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, options.get("s_aux"))
        ranges, keys = rule.ranges(self.block), BlockedKeys.of(key, value, self.block)
        queries = _blocked(query[0], self.block)
        real = _positions(rule, self.block) < rule.keys
        known = self.known[layer] = block_keys(keys.key[:, 1 : max(1, keys.full)], self.known.get(layer))
        tree = span_keys(known, 2 * self.k)
        low, high = ((x - 1).clamp(min=0) for x in (ranges.low, ranges.high))
        chosen = choose(queries, real, tree, low, high, self.k, scores)
        chosen = torch.where(chosen < 0, -1, chosen + 1)
        z = attend(queries, keys, ranges, chosen, rule, scores)
        self.chosen.setdefault(layer, []).append(chosen)
        for place, number in enumerate(ranges.forced[:, -1].tolist()):
            if number in self.measured:
                self.exact.setdefault(layer, []).append(
                    measure(queries[:, place], keys, ranges, chosen[:, place], rule, scores, place)
                )
        return z.flatten(1, 2)[:, : query.shape[2]].transpose(0, 1)[None].contiguous(), None


def attend(
    query: Float[Tensor, "heads blocks block width"],
    keys: BlockedKeys,
    ranges: BlockRanges,
    chosen: Int[Tensor, "heads blocks k"],
    rule: MaskRule,
    scores: Scores,
) -> Float[Tensor, "heads blocks block vwidth"]:
    """Softmax attention over the forced and the chosen blocks; chosen ones are seen whole and need no mask."""
    heads, number, block = query.shape[:3]
    kept = torch.cat([ranges.forced.expand(heads, -1, -1), chosen], -1)
    kv = torch.arange(heads, device=query.device)[:, None, None] // (heads // len(keys.key))
    at, columns = _positions(rule, block), torch.arange(block, device=query.device)
    many, wide = ranges.forced.shape[1] * block, keys.key.shape[-1] + keys.value.shape[-1] + 2 * block
    out = query.new_empty(heads, number, block, keys.value.shape[-1])
    for here in torch.arange(number, device=query.device).split(
        max(1, NUMBERS // (heads * kept.shape[-1] * block * wide))
    ):
        index = kept[:, here].clamp(min=0)
        some = scores(query[:, here], keys.key[kv, index].flatten(2, 3))
        forced = ranges.forced[here]
        seen = (forced[..., None].clamp(min=0) * block + columns).flatten(1)[:, None]
        may = rule(at[here][..., None], seen.clamp(max=rule.keys - 1)) & (seen < rule.keys)
        may = may & (forced >= 0).repeat_interleave(block, 1)[:, None]
        some[..., :many].masked_fill_(~may, LEAST)
        if bool((absent := chosen[:, here] < 0).any()):
            some[..., many:].masked_fill_(absent.repeat_interleave(block, 2)[:, :, None], LEAST)
        weights = scores.softmax(some).to(query.dtype)
        out[:, here] = weights @ keys.value[kv, index].flatten(2, 3)
    return out


def measure(
    query: Float[Tensor, "heads block width"],
    keys: BlockedKeys,
    ranges: BlockRanges,
    chosen: Int[Tensor, "heads k"],
    rule: MaskRule,
    scores: Scores,
    place: int,
) -> BlockAttention:
    """The whole attention of one query block; keys are read in pieces, and their log-sum-exp is kept for each block."""
    heads, block, own = len(query), keys.block, int(ranges.forced[place, -1])
    at = _positions(rule, block)[place]
    at = at[at < rule.keys]
    query = query[:, : len(at)].float()
    group = heads // len(keys.key)
    sums = query.new_empty(heads, len(at), own + 1)
    for some in torch.arange(own + 1, device=query.device).split(max(1, NUMBERS // (heads * block * block))):
        few = keys.key[:, some].flatten(1, 2).float().repeat_interleave(group, 0)
        seen = (some[:, None] * block + torch.arange(block, device=query.device)).flatten()
        may = rule(at[:, None], seen.clamp(max=rule.keys - 1)) & (seen < rule.keys)
        value = scores(query, few).masked_fill_(~may, float("-inf"))
        sums[..., some] = value.unflatten(-1, (len(some), block)).logsumexp(-1)
    mass = scores.softmax(sums)
    kept = torch.cat([ranges.forced[place].expand(heads, -1), chosen], -1)
    is_kept = torch.zeros(heads, own + 2, dtype=torch.bool, device=query.device)
    is_kept.scatter_(1, torch.where(kept < 0, own + 1, kept), True)
    dropped = mass.masked_fill(is_kept[:, None, :-1], 0).sum(-1)
    read = mass.mean(1)
    low, high, k = int(ranges.low[place]), int(ranges.high[place]), chosen.shape[1]
    recall = read.new_full((heads,), float("nan"))
    if high - low > k:
        top = read[:, low:high].topk(k, -1).indices + low
        recall = is_kept.gather(1, top).float().mean(-1)
    return BlockAttention(own, read, mass[:, -1], dropped, is_kept[:, :-1], recall)


def _blocked(x: Float[Tensor, "heads pos width"], block: int) -> Float[Tensor, "heads blocks block width"]:
    missing = -x.shape[1] % block
    return (nn.functional.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(1, (-1, block))


def _positions(rule: MaskRule, block: int) -> Int[Tensor, "blocks block"]:
    """The position of every query of a pass, in blocks; those after the prompt's end fill the last block up."""
    number = -(-rule.queries // block)
    return (rule.start + torch.arange(number * block, device=rule.device)).unflatten(0, (number, block))
