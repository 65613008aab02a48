"""The query-key side of an edge: an attention score between two tokens as a sum over what query and key hold.

An edge that passes a head depends on where the head attends. With the scale of every norm frozen, queries and keys are
linear in the stream, and the score is bilinear: a sum over pairs of what reaches the query and what reaches the key.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor, nn

from saepatch.circuits.edges.attribution_graph import Vertex
from saepatch.circuits.edges.backward import Counts, frozen_attention
from saepatch.circuits.edges.frozen_graph import FrozenModel
from saepatch.circuits.residual.unembedding import tolerance_of
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.softmax import additive_mask, attention_scores
from saepatch.engine.spans import SpanGraph
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.replaced import attention_replaced
from saepatch.model.sites import Site

ROWS = 256  # vertices of the query side at a time


@dataclass(frozen=True, eq=False)
class ScoreSplit:
    """A head's attention score from one token to another, before any soft cap, and its parts.

    `query[i]` and `key[j]` are what vertices i and j add to the head's query and key (after rotary embedding); together
    they add `scaling · query[i] · key[j]`, and all pairs sum to `score`. `attention` is the pattern's weight.
    """

    vertices: tuple[Vertex, ...]
    query: Float[ndarray, "vertices width"]
    key: Float[ndarray, "vertices width"]
    scaling: float
    score: float
    attention: float

    def of(self, query: Vertex, key: Vertex) -> float:
        """What a pair of vertices adds to the score."""
        i, j = (self.vertices.index(vertex) for vertex in (query, key))
        return float(self.scaling * self.query[i] @ self.key[j])

    @property
    def by_query(self) -> Float[ndarray, "vertices"]:
        """What each vertex adds to the score by reaching the query; they sum to the score."""
        return self.scaling * self.query @ self.key.sum(0)

    @property
    def by_key(self) -> Float[ndarray, "vertices"]:
        """What each vertex adds to the score by reaching the key; they sum to the score."""
        return self.scaling * self.key @ self.query.sum(0)

    def top(self, k: int = 10) -> list[tuple[Vertex, Vertex, float]]:
        """The `k` pairs that add most, in size: query side, key side, and what they add."""
        best: list[tuple[int, int, float]] = []
        for start in range(0, len(self.vertices), ROWS):
            block = self.scaling * self.query[start : start + ROWS] @ self.key.T
            few = np.argsort(-np.abs(block), axis=None, kind="stable")[:k]
            rows, columns = np.unravel_index(few, block.shape)
            largest = zip((start + rows).tolist(), columns.tolist(), block[rows, columns].tolist(), strict=True)
            best = sorted([*best, *largest], key=lambda pair: -abs(pair[2]))[:k]
        return [(self.vertices[i], self.vertices[j], value) for i, j, value in best]


def score_split(
    model: LanguageModel,
    dictionaries: Sequence[Dictionary],
    prompt: str,
    head: tuple[int, int],
    query: int,
    key: int,
) -> ScoreSplit:
    """Split the attention score of a head (layer, head) from the token at position `query` to that at `key`.

    Vertices are those of `attribution_graph`, earlier attention patterns and all norms being frozen, those of queries
    and keys included. For an edge, take the head from `head_loadings`, and the positions of its two ends where the head
    is the only one on its way.

    Raises:
        UserError: there is no such head or position, `key` comes after `query`, the model's attention cannot be read,
            or its queries and keys are not linear under freezing.
    """
    layer, number = head
    if not (0 <= layer < model.n_layers and 0 <= number < model.n_heads):
        raise UserError(
            f"no head {number} in layer {layer}: use layers 0 to {model.n_layers - 1}, heads 0 to {model.n_heads - 1}"
        )
    made = FrozenModel.of(model, dictionaries, prompt)
    length = made.base.width
    if not 0 <= key <= query < length:
        raise UserError(f"no attention from token {query} to token {key}: use 0 ≤ key ≤ query < {length}")
    seen = _SeenScores(set(model.layout.blocks[layer].modules()))
    target = Site(layer, "resid_post")
    with made.frozen(), attention_replaced(model.hf, seen.attend):
        graph = SpanGraph(made.base, made.leaves(target), target)
        if seen.query is None or seen.key is None:
            raise UserError(
                f"{model.name}: layer {layer} does not use transformers' attention interface, so there are no scores"
            )
        shared = seen.query.shape[1] // seen.key.shape[1]
        sides = seen.query[0, number, query], seen.key[0, number // shared, key]
        by_query, by_key = (made.pulled(graph, torch.eye(len(side)).to(side), side).T.numpy() for side in sides)
    whole = [side.detach().double().cpu().numpy() for side in sides]
    score = float(seen.scaling * whole[0] @ whole[1])
    attention = float(seen.pattern[0, number, query, key])
    split = ScoreSplit(tuple(made.vertices), by_query, by_key, seen.scaling, score, attention)
    size = seen.scaling * float(np.linalg.norm(whole[0]) * np.linalg.norm(whole[1]))
    if not abs(split.by_query.sum() - score) <= tolerance_of(model.dtype) * max(size, 1e-6):
        raise UserError(
            f"the parts of the score sum to {split.by_query.sum():.4f}, not {score:.4f}: queries and keys of "
            f"{model.name} do not become linear when norms are frozen"
        )
    return split


class _SeenScores:
    """Attention with frozen patterns that keeps queries, keys and the pattern of one layer."""

    def __init__(self, own: set[nn.Module]) -> None:
        self.own, self.counts = own, Counts()
        self.query: Tensor | None = None
        self.key: Tensor | None = None
        self.scaling = 1.0
        self.pattern = torch.zeros(0)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        if module in self.own:
            self.query, self.key = query, key
            self.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            with torch.no_grad():
                bias = additive_mask(module, query, key, attention_mask)
                self.pattern = attention_scores(query, key, bias, self.scaling, softcap).softmax(-1)
        frozen = partial(frozen_attention, self.counts, module, query, key, value, attention_mask)
        return frozen(scaling=scaling, softcap=softcap, **options)
