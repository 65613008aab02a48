"""Edges kept from a stream of estimates: each pair's largest, and a uniform random draw of all."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from saepatch.circuits.edges.jacobians import Products

# Of an edge: pair, then component (an index into all of them), unit and position of its two nodes.
NAMES = ("pair", "up", "up_unit", "up_position", "down", "down_unit", "down_position")
AHEAD = 4  # edges held per edge kept, before the smallest are dropped


@dataclass(eq=False)
class Ledger:
    """Edges of one batch of pairs; `sample` of all edges are drawn, in random order.

    `dropped[row]` is the largest estimate among those of a row that were not kept, once `kept` has been called.
    """

    keep: int
    sample: int
    rows: int
    seed: Sequence[int]
    total: int = 0
    _names: list[Int[Tensor, "7 some"]] = field(default_factory=list)
    _scores: list[Float[Tensor, "some"]] = field(default_factory=list)
    _held: int = 0
    _drawn: list[tuple[Float[ndarray, "some"], Int[ndarray, "7 some"], Float[ndarray, "some"]]] = field(
        default_factory=list
    )

    def __post_init__(self) -> None:
        self.dropped = torch.zeros(self.rows)
        self._least = torch.zeros(self.rows)  # estimates at or below this cannot be among the kept
        self._random = np.random.default_rng(list(self.seed))

    def add(self, made: Products, up: Int[Tensor, "components"], down: int) -> None:
        """Take the edges of one chunk; `up` numbers the components of the upstream site, `down` is the reader's."""
        scores = made.scores.float()
        columns = scores.shape[2]
        there = (made.reader >= 0)[..., None, None] & made.movers.there[None, :, :columns]
        flat = there.flatten().nonzero().flatten()
        self._draw(made, scores, flat, up, down)
        self.total += len(flat)
        large = scores.abs() > self._least.to(scores.device)[:, None, None]
        # NaN estimates are kept, so that they are reported
        chosen = (there & (large | scores.isnan())).flatten().nonzero().flatten()
        passed = (scores.abs() * (there & ~large)).nan_to_num(0).amax((0, 2, 3)).to(self.dropped)
        self.dropped = torch.maximum(self.dropped, passed)
        self._names.append(self._named(made, scores.shape, chosen, up, down))
        self._scores.append(scores.flatten()[chosen])
        self._held += len(chosen)
        if self._held > AHEAD * self.keep * self.rows:
            self._compact()

    def _draw(
        self, made: Products, scores: Tensor, flat: Int[Tensor, "edges"], up: Int[Tensor, "components"], down: int
    ) -> None:
        if not self.sample or not len(flat):
            return
        keys = self._random.random(len(flat))
        few = np.argsort(keys, kind="stable")[: self.sample]
        chosen = flat[torch.from_numpy(few).to(flat.device)]
        names = self._named(made, scores.shape, chosen, up, down).cpu().numpy()
        self._drawn.append((keys[few], names, scores.flatten()[chosen].double().cpu().numpy()))
        if len(self._drawn) > 64:
            self._drawn = [self.drawn()]

    def drawn(self) -> tuple[Float[ndarray, "some"], Int[ndarray, "7 some"], Float[ndarray, "some"]]:
        """The random draw: each edge's random key, its names and its estimate, in the order of the keys."""
        if not self._drawn:
            return np.zeros(0), np.zeros((len(NAMES), 0), dtype=np.int64), np.zeros(0)
        keys, names, scores = (np.concatenate(parts, -1) for parts in zip(*self._drawn, strict=True))
        order = np.argsort(keys, kind="stable")[: self.sample]
        return keys[order], names[:, order], scores[order]

    @staticmethod
    def _named(
        made: Products, shape: Sequence[int], chosen: Int[Tensor, "some"], up: Int[Tensor, "components"], down: int
    ) -> Int[Tensor, "7 some"]:
        """Rows and columns of the batch in place of pairs and positions."""
        n, row, column, place = (part for part in torch.unravel_index(chosen, tuple(shape)))
        reader = made.reader[n, row]
        movers, readers = made.movers, made.readers
        return torch.stack([
            row, up[movers.component[row, column, place]], movers.unit[row, column, place], column,
            torch.full_like(row, down), readers.unit[reader], readers.pos[reader],
        ])  # fmt: skip

    def _compact(self) -> None:
        if not self._names:
            return
        names, scores = torch.cat(self._names, 1), torch.cat(self._scores)
        sizes, chosen = scores.abs(), torch.ones_like(scores, dtype=torch.bool)
        for row in range(self.rows):
            mine = (names[0] == row).nonzero().flatten()
            if (excess := len(mine) - self.keep) <= 0:
                continue
            own = sizes[mine].nan_to_num(torch.inf)  # those that are not numbers are kept
            least = own.kthvalue(excess + 1).values
            equal = (own == least).nonzero().flatten()  # of these, the first are kept
            out = torch.cat([(own < least).nonzero().flatten(), equal[self.keep - int((own > least).sum()) :]])
            chosen[mine[out]] = False
            self._least[row] = float(least)
            self.dropped[row] = max(float(self.dropped[row]), float(own[out].max()))
        kept = chosen.nonzero().flatten()
        self._names, self._scores, self._held = [names[:, kept]], [scores[kept]], len(kept)

    def kept(self) -> tuple[Int[ndarray, "7 kept"], Float[ndarray, "kept"]]:
        """Names and estimates of the edges that were kept, by row, the largest first."""
        self._compact()
        if not self._names:
            return np.zeros((len(NAMES), 0), dtype=np.int64), np.zeros(0)
        names, scores = self._names[0], self._scores[0]
        by_size = scores.abs().argsort(descending=True, stable=True)
        order = by_size[names[0, by_size].argsort(stable=True)]
        return names[:, order].cpu().numpy(), scores[order].double().cpu().numpy()
