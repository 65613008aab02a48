"""Attribution graph of one prompt: each node's effect on each latent and logit while nonlinearities are frozen.

Attention patterns, the scale of every norm and MLP outputs keep their values in the run, and the model is then linear
between MLPs (Ameisen et al. 2025, https://transformer-circuits.pub/2025/attribution-graphs/methods.html, for
transcoders). Biases are nodes of their own, so that the edges into a node sum to its pre-activation.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from saepatch.errors import UserError
from saepatch.model.sites import Site


@dataclass(frozen=True)
class Vertex:
    """A node of an attribution graph.

    `kind`: "embedding", "mlp_out", "latent", "error", "b_dec" (of the dictionary at `site`), "bias" (of the model or of
    an encoder, by `name`) or "logit" (`unit` is its token). Biases and `b_dec` have no position: theirs are together.
    """

    kind: str
    site: Site | None = None
    unit: int = 0
    position: int | None = None
    name: str = ""

    def __str__(self) -> str:
        place = "" if self.position is None else f" at {self.position}"
        of = "" if self.site is None else f"{self.site} "
        what = f"{self.kind} {self.unit}" if self.kind in ("latent", "logit") else self.kind
        return f"{of}{what}{place}{f' {self.name}' if self.name else ''}"


@dataclass(frozen=True, eq=False)
class AttributionGraph:
    """`weight[i, j]` is what `vertices[j]` adds to the value of reader i, which is vertex `reader[i]`.

    Readers are active latents, with their pre-activations as values, and logits, minus the mean logit over the
    vocabulary; `probability` is that of each logit's token (0 for latents).
    """

    vertices: tuple[Vertex, ...]
    reader: Int[ndarray, "readers"]
    weight: Float[ndarray, "readers vertices"]
    value: Float[ndarray, "readers"]
    probability: Float[ndarray, "readers"]

    @property
    def gap(self) -> float:
        """The largest difference between a reader's value and the sum of its edges, relative to the largest value."""
        return float(np.abs(self.weight.sum(1) - self.value).max() / np.abs(self.value).max())

    def influence(self) -> Float[ndarray, "vertices"]:
        """p (N + N² + …): how much of each node reaches the logits, with N the row-normalised sizes of edges.

        p are the logits' probabilities. The series ends, since the graph has no cycles.
        """
        normalised = self._normalised(np.ones_like(self.weight, dtype=bool))
        return _influence(normalised, self.probability, self.reader)

    def _normalised(self, kept: Bool[ndarray, "readers vertices"]) -> Float[ndarray, "readers vertices"]:
        sizes = np.abs(self.weight) * kept
        largest = sizes.max(1, keepdims=True)
        sizes = np.divide(sizes, largest, out=np.zeros_like(sizes), where=largest > 0)  # sums of many may overflow
        total = sizes.sum(1, keepdims=True)
        return np.divide(sizes, total, out=np.zeros_like(sizes), where=total > 0)

    def pruned(self, nodes: float = 0.8, edges: float = 0.98) -> Bool[ndarray, "readers vertices"]:
        """The edges that remain when nodes, then edges, are kept up to a share of their total influence.

        Logits and embeddings always stay. Nodes that lead nowhere, and latents without incoming edges, go.

        Raises:
            UserError: a share is not above 0 and at most 1.
        """
        if not (0 < nodes <= 1 and 0 < edges <= 1):
            raise UserError(f"shares of influence {nodes}, {edges}: use numbers above 0, at most 1")
        kind = np.array([vertex.kind for vertex in self.vertices])
        always = np.isin(kind, ("logit", "embedding"))
        vertex = _top(self.influence(), nodes) | always
        kept = vertex[None, :] & vertex[self.reader][:, None] & (self.weight != 0)
        normalised = self._normalised(kept)
        reaching = _influence(normalised, self.probability, self.reader)
        score = normalised * (reaching[self.reader] + self.probability)[:, None]
        kept &= _top(score.ravel(), edges).reshape(score.shape)
        while True:
            leads = kept.any(0) | (kind == "logit")
            fed = np.ones(len(kind), dtype=bool)
            fed[self.reader] = kept.any(1)
            left = kept & (leads & fed)[None, :] & leads[self.reader][:, None]
            if (left == kept).all():
                return kept
            kept = left


def _influence(
    normalised: Float[ndarray, "readers vertices"], weight: Float[ndarray, "readers"], reader: Int[ndarray, "readers"]
) -> Float[ndarray, "vertices"]:
    total, current = np.zeros(normalised.shape[1]), weight @ normalised
    for _ in range(normalised.shape[1] + 1):
        if not current.any():
            break
        total += current
        current = current[reader] @ normalised
    return total


def _top(score: Float[ndarray, "some"], share: float) -> Bool[ndarray, "some"]:
    """The largest scores that together have a share of the sum."""
    order = np.argsort(-score, kind="stable")
    cumulative = np.cumsum(score[order])
    count = int(np.searchsorted(cumulative, share * cumulative[-1] * (1 - 1e-12))) + 1 if len(score) else 0
    kept = np.zeros(len(score), dtype=bool)
    kept[order[:count]] = True
    return kept & (score > 0)
