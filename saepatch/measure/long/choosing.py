"""The hierarchical search for the key blocks that a block of queries reads most.

The keys that a query block sees are cut into at most 2k spans; k are kept, halved and scored again, until a span is a
block. A span's score is a lower bound of the attention mass on it, from two representatives: the mean of its keys
(Jensen: `log L + q·k̄ ≤ log Σ exp(q·k)`), and the key farthest from that mean. A key that stands out in neither way is
missed; the mass that is lost with it is measured (`saepatch.measure.long.sparse`). Spans are aligned to powers of two,
so that representatives are made once for all queries. Time for T positions: O(T log T), memory: O(T).

Hierarchical pruning of keys by representatives: Lee et al. 2024 (HiP attention), with the middle key as representative;
tracing by it, and the search for the least k: Rosser et al. 2025 (Stream).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NUMBERS = 2**18  # numbers that are gathered at a time
NONE = -1e30  # the score of no span


@dataclass(frozen=True, eq=False)
class SpanKeys:
    """Representatives of spans of one length, in positions: their mean key, and the key farthest from it."""

    mean: Float[Tensor, "kv spans width"]
    far: Float[Tensor, "kv spans width"]
    length: int


@dataclass(frozen=True)
class Scores:
    """How a layer turns products of queries and keys into scores; `sink` are scores that each head adds (gpt-oss)."""

    scaling: float
    softcap: float | None = None
    sink: Float[Tensor, "heads"] | None = None

    def __call__(self, query: Float[Tensor, "*n q width"], key: Float[Tensor, "*n k width"]) -> Float[Tensor, "*n q k"]:
        scores = query @ key.transpose(-1, -2) * self.scaling
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def softmax(self, scores: Float[Tensor, "heads *n"]) -> Float[Tensor, "heads *n"]:
        """Softmax over the last dimension, in float32 as in transformers; the sink's share is left out."""
        if self.sink is None:
            return scores.softmax(-1, dtype=torch.float32)
        sink = self.sink.view(-1, *[1] * (scores.ndim - 1)).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sink.to(scores)], -1).softmax(-1, dtype=torch.float32)[..., :-1]


def block_keys(blocks: Float[Tensor, "kv blocks block width"], known: SpanKeys | None = None) -> SpanKeys:
    """Representatives of single blocks; those of the first ones may be known."""
    done = 0 if known is None else known.mean.shape[1]
    new = blocks[:, done:].float()
    mean = new.mean(2)
    farthest = (new - mean[:, :, None]).square_().sum(-1).argmax(-1)
    far = new.gather(2, farthest[:, :, None, None].expand(-1, -1, 1, new.shape[-1]))[:, :, 0]
    if known is not None:
        mean, far = torch.cat([known.mean, mean], 1), torch.cat([known.far, far], 1)
    return SpanKeys(mean, far, blocks.shape[2])


def span_keys(blocks: SpanKeys, most: int) -> list[SpanKeys]:
    """Representatives of single blocks, of pairs, of fours and so on, until at most `most` spans are left."""
    levels = [blocks]
    while levels[-1].mean.shape[1] > most:
        below = levels[-1]
        even = below.mean.shape[1] // 2 * 2
        pairs = below.far[:, :even].unflatten(1, (-1, 2))
        mean = below.mean[:, :even].unflatten(1, (-1, 2)).mean(2)
        second = (pairs - mean[:, :, None]).square().sum(-1).argmax(-1).bool()
        far = torch.where(second[..., None], pairs[:, :, 1], pairs[:, :, 0])
        levels.append(SpanKeys(mean, far, 2 * below.length))
    return levels


def choose(
    query: Float[Tensor, "heads blocks block width"],
    real: Bool[Tensor, "blocks block"],
    levels: Sequence[SpanKeys],
    low: Int[Tensor, "blocks"],
    high: Int[Tensor, "blocks"],
    k: int,
    scores: Scores,
) -> Int[Tensor, "heads blocks k"]:
    """For each head and query block, the k best of its blocks `low` to `high` − 1; −1: there are fewer.

    Blocks are numbered as in `levels`. `real` are the queries that exist: the last block may be cut off.
    """
    heads, number = query.shape[:2]
    lows, highs = zip(*((-(-low // 2**level), high // 2**level) for level in range(len(levels))), strict=True)
    starts = (torch.stack(highs) - torch.stack(lows) <= 2 * k).int().argmax(0)
    kept = low.new_full((heads, number, k), -1)
    for level in range(int(starts.max()), -1, -1):
        first, end = lows[level], highs[level]
        most = max(1, min(2 * k, int((end - first).max())))
        every = first[:, None] + torch.arange(most, device=low.device)
        every = torch.where(every < end[:, None], every, -1).expand(heads, -1, -1)
        if level == int(starts.max()):
            among = every
        else:
            halves = torch.where(kept[..., None] < 0, -1, 2 * kept[..., None] + torch.tensor([0, 1], device=low.device))
            # spans at the ends of the range that belong to no whole span of the level above
            left = torch.where((first < 2 * lows[level + 1]) & (first < end), first, -1)
            right = torch.where((end > 2 * highs[level + 1]) & (end > first), end - 1, -1)
            ends = torch.stack([left, right], -1).expand(heads, -1, -1)
            among = torch.cat([halves.flatten(2), ends], -1)
            wide = max(among.shape[-1], most)
            among, every = (torch.nn.functional.pad(x, (0, wide - x.shape[-1]), value=-1) for x in (among, every))
            among = torch.where((starts == level)[:, None], every, among)
        among = torch.where((starts >= level)[:, None], among, -1)
        kept = _best(query, real, levels[level], among, k, scores)
    return kept


def _best(
    query: Float[Tensor, "heads blocks block width"],
    real: Bool[Tensor, "blocks block"],
    spans: SpanKeys,
    among: Int[Tensor, "heads blocks some"],
    k: int,
    scores: Scores,
) -> Int[Tensor, "heads blocks k"]:
    if among.shape[-1] <= k:
        return torch.nn.functional.pad(among, (0, k - among.shape[-1]), value=-1)
    heads, width, some = len(query), query.shape[-1], among.shape[-1]
    kv = torch.arange(heads, device=among.device)[:, None, None] // (heads // len(spans.mean))
    chosen, step = [], max(1, NUMBERS // (heads * some * (width + query.shape[2])))
    for here in torch.arange(query.shape[1], device=among.device).split(step):
        mine, which = query[:, here].float(), among[:, here]
        index = which.clamp(min=0)
        of_mean = scores(mine, spans.mean[kv, index]) + math.log(spans.length)
        score = torch.maximum(of_mean, scores(mine, spans.far[kv, index]))
        score = score.masked_fill_((which < 0)[:, :, None], NONE)
        share = score.softmax(-1).masked_fill_(~real[here][:, :, None], 0).amax(2)  # of the query that reads it most
        top = share.masked_fill_(which < 0, -1).topk(k, -1).indices
        chosen.append(which.gather(-1, top))
    return torch.cat(chosen, 1)
