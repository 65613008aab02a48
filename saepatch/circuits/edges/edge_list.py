"""Results of `edges`: estimates of the edges of all pairs, exact path patches of some, means, rows, tables."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from saepatch.circuits.nodes import Edge, Node
from saepatch.engine.components import PatchDirection
from saepatch.measure.results.gaps import PairGaps
from saepatch.measure.results.screen import Verification
from saepatch.model.sites import Site
from saepatch.records.tables import text_table


@dataclass(frozen=True, eq=False)
class Edges(PairGaps):
    """Estimated edges, each of one pair: the change of the metric, from the base run towards the source run.

    Column i of `names` is an edge's pair and, for both nodes, the component (an index into `parts`: site and kind),
    unit and position. Of each pair, those with the largest estimates are kept, of `total` in all; none of the others
    of pair p is estimated larger than `dropped[p]`, and means count them as 0. `paths` says what is open between
    nodes besides the residual stream, `acted` how often each modification of backward passes acted. `checked` are the
    edges that were path-patched, in the order of `verified`.
    """

    direction: PatchDirection
    metric: str
    method: str
    paths: str
    positions: str
    parts: tuple[tuple[Site | None, str], ...]
    examples: tuple[str, ...]
    clean: Float[ndarray, "pairs"]
    corrupted: Float[ndarray, "pairs"]
    names: Int[ndarray, "7 edges"]
    score: Float[ndarray, "edges"]
    total: int
    dropped: Float[ndarray, "pairs"]
    acted: dict[str, int]
    min_gap: float = 1e-2
    checked: tuple[tuple[int, Edge], ...] = ()
    verified: Verification | None = None

    def __len__(self) -> int:
        return len(self.score)

    def __repr__(self) -> str:
        largest = "; ".join(f"{edge} ({mean:.3g})" for edge, mean in self.top(3))
        what = f"{len(self):,} of {self.total:,} on {len(self.examples)} pairs by {self.method}"
        checked = "" if self.verified is None else f", {len(self.checked):,} run exactly"
        return (
            f"Edges: {what}, {self.direction}, {self.metric}{checked}\nlargest means: {largest}\n"
            "summary() has shares of the gap and the verification; means() every edge"
        )

    @property
    def pair(self) -> Int[ndarray, "edges"]:
        return self.names[0]

    def edge(self, number: int) -> Edge:
        """One edge, of the pair `pair[number]`."""
        return self._edge(self.names[1:, number].tolist())

    def _edge(self, key: Sequence[int]) -> Edge:
        return Edge(self._node(*key[:3]), self._node(*key[3:]))

    def _node(self, part: int, unit: int, position: int) -> Node:
        site, kind = self.parts[part]
        return Node(site, unit, None if site is None else position, kind)

    def means(self) -> tuple[list[Edge], Float[ndarray, "edges"]]:
        """Distinct edges, and the mean of their estimates over all pairs (0 in pairs that do not have the edge)."""
        names = self.names[1:].copy()
        targets = np.array([site is None for site, _ in self.parts])
        names[5, targets[names[3]]] = 0  # the logits are one node, whatever a prompt's length
        keys, inverse = np.unique(names, axis=1, return_inverse=True)
        mean = np.bincount(inverse.reshape(-1), weights=self.score, minlength=keys.shape[1]) / len(self.examples)
        return [self._edge(key) for key in keys.T.tolist()], mean

    def top(self, k: int, by_size: bool = True) -> list[tuple[Edge, float]]:
        """The `k` edges with the largest |mean| or (without `by_size`) largest share of the gap, and their means."""
        listed, mean = self.means()
        signed = mean if by_size else mean * np.sign(self.gap.mean())
        order = np.argsort(-(np.abs(signed) if by_size else signed), kind="stable")[:k]
        return [(listed[i], float(mean[i])) for i in order]

    def summary(self, k: int = 10) -> str:
        """The edges with the largest mean estimates as a table, what was left out, and the result of verification."""
        rows = [
            [str(edge.up), str(edge.down), f"{mean:.4f}", f"{mean / self.mean_gap:.3f}"] for edge, mean in self.top(k)
        ]
        lines = [text_table(["from", "to", f"{self.method}, mean", "of the gap"], rows)]
        lines.append(
            f"{self.direction}, {self.metric}: {self.ends()}, positions {self.positions} (no nodes at BOS or padding)"
        )
        lines.append(
            f"{self.total} edges through {self.paths}; {len(self)} kept, no other one above {self.dropped.max():.2g}"
        )
        if self.acted:
            lines.append("modified in backward passes: " + ", ".join(f"{n} × {name}" for name, n in self.acted.items()))
        return "\n".join(lines if self.verified is None else [*lines, self.verified.summary("edges")])

    def rows(self, task: str) -> Iterator[dict[str, Any]]:
        """Flat records: the estimate of every kept edge, then verified ones again, with method "exact"."""
        for number, score in enumerate(self.score.tolist()):
            yield self._row(task, int(self.pair[number]), self.edge(number), score, self.method, "estimate")
        if self.verified is not None:
            for number, ((pair, edge), exact) in enumerate(
                zip(self.checked, self.verified.exact.tolist(), strict=True)
            ):
                role = "top" if number < self.verified.largest else "random"
                yield self._row(task, pair, edge, exact, "exact", role)

    def _row(self, task: str, pair: int, edge: Edge, change: float, method: str, role: str) -> dict[str, Any]:
        record: dict[str, Any] = {"task": task, "example": self.examples[pair]}
        for name, node in (("up", edge.up), ("down", edge.down)):
            record |= {
                f"{name}_site": "" if node.site is None else str(node.site),
                f"{name}_kind": node.kind,
                f"{name}_unit": node.unit,
                f"{name}_position": -1 if node.position is None else node.position,
            }
        return record | {
            "direction": self.direction,
            "metric": self.metric,
            "method": method,
            "role": role,
            "paths": self.paths,
            "clean": float(self.clean[pair]),
            "corrupted": float(self.corrupted[pair]),
            "change": change,
        }
