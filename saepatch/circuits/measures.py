"""How good a circuit is: faithfulness, completeness, minimality, and curves over sizes (CPR and CMD).

All are ratios of means over pairs, with bootstrap intervals: `(m(C) − m(∅)) / (m(M) − m(∅))`, with m(M) the run in
which everything acts and m(∅) the one in which nothing does. Choose a circuit on one split and report it on another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from saepatch.circuits.node_runs import NodeRuns
from saepatch.errors import UserError
from saepatch.records.statistics import Interval, bootstrap_ratio

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of all members, as in MIB


@runtime_checkable
class MemberRuns(Protocol):
    """`NodeRuns` or `EdgeRuns`: the metric when some members act, when everything does, and when nothing does."""

    @property
    def whole(self) -> Float[ndarray, "pairs"]: ...
    @property
    def empty(self) -> Float[ndarray, "pairs"]: ...
    @property
    def members(self) -> Sequence[object]: ...
    def run(self, act: Bool[Tensor, "variants members"]) -> Float[ndarray, "variants pairs"]: ...


def share(runs: MemberRuns, metric: Float[ndarray, "pairs"]) -> Interval:
    """`(m − m(∅)) / (m(M) − m(∅))`, a ratio of means with its interval over pairs."""
    return bootstrap_ratio(metric - runs.empty, runs.whole - runs.empty)


def faithfulness(runs: MemberRuns, act: Bool[Tensor, "members"]) -> Interval:
    """The share of the whole model's effect that the circuit has when only it acts; 1 is the model, 0 nothing."""
    return share(runs, runs.run(act[None])[0])


def completeness(runs: NodeRuns, act: Bool[Tensor, "members"]) -> Interval:
    """The share that everything but the circuit has: 0 where the circuit is complete."""
    return share(runs, runs.run(~act[None], others_act=True)[0])


@dataclass(frozen=True)
class KnockOut:
    """Completeness under a knock-out: the shares of circuit and model without `size` random nodes of the circuit."""

    size: int
    circuit: float
    model: float

    @property
    def gap(self) -> float:
        return abs(self.circuit - self.model)


def knocked_out(
    runs: NodeRuns, act: Bool[Tensor, "members"], sizes: Sequence[int], draws: int = 5, seed: int = 0
) -> list[KnockOut]:
    """`m(C∖K)` beside `m(M∖K)` for random K ⊂ C: for a complete circuit, both agree (Wang et al. 2022)."""
    chosen, rng, gap = np.flatnonzero(act.numpy()), np.random.default_rng(seed), float((runs.whole - runs.empty).mean())
    if bad := [size for size in sizes if not 0 < size <= len(chosen)]:
        raise UserError(f"a knock-out of {bad[0]} nodes of a circuit of {len(chosen)}: use 1 to {len(chosen)}")
    listed = [size for size in sizes for _ in range(draws)]
    out = torch.stack([_only(len(act), rng.choice(chosen, size, replace=False)) for size in listed])
    of_circuit = runs.run(act[None] & ~out)
    of_model = runs.run(~out, others_act=True)
    shares = [((m - runs.empty).mean(-1) / gap).tolist() for m in (of_circuit, of_model)]
    return [KnockOut(size, *both) for size, *both in zip(listed, *shares, strict=True)]


def minimality(runs: MemberRuns, act: Bool[Tensor, "members"]) -> Float[ndarray, "chosen"]:
    """What each member of the circuit contributes to its share: the loss when only it is removed."""
    chosen = np.flatnonzero(act.numpy())
    without = torch.stack([act & ~_only(len(act), [i]) for i in chosen.tolist()]) if len(chosen) else act[None][:0]
    gap = float((runs.whole - runs.empty).mean())
    return (runs.run(act[None])[0] - runs.run(without)).mean(-1) / gap


def _only(n: int, chosen: Sequence[int] | ndarray) -> Bool[Tensor, "n"]:
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.as_tensor(np.asarray(chosen), dtype=torch.long)] = True
    return mask


@dataclass(frozen=True)
class SizeCurve:
    """Faithfulness over circuit sizes, of members in the order of a ranking.

    `cpr` is the area under it and `cmd` the area between it and 1, by the trapezoid rule over the shares of members
    (as in MIB, Mueller et al. 2025; members all count alike). CPR is meant for rankings by signed score, CMD for those
    by size.
    """

    shares: tuple[float, ...]
    sizes: tuple[int, ...]
    faithfulness: tuple[Interval, ...]

    @property
    def cpr(self) -> float:
        return float(np.trapezoid([f.value for f in self.faithfulness], self.shares))

    @property
    def cmd(self) -> float:
        return float(np.trapezoid([abs(1 - f.value) for f in self.faithfulness], self.shares))

    def smallest(self, least: float, low: float = -np.inf) -> int | None:
        """The smallest size with a faithfulness of at least `least`, and an interval that begins at `low` or above."""
        enough = [n for n, f in zip(self.sizes, self.faithfulness, strict=True) if f.value >= least and not f.low < low]
        return min(enough, default=None)


def size_curve(runs: MemberRuns, score: Sequence[float], by_size: bool, shares: Sequence[float] = SHARES) -> SizeCurve:
    """The faithfulness of the members with the largest scores (or, `by_size`, the largest absolute scores)."""
    values = np.asarray(score, dtype=float)
    if len(values) != len(runs.members):
        raise UserError(f"{len(values)} scores of {len(runs.members)} members: give one of each")
    order = np.argsort(-(np.abs(values) if by_size else values), kind="stable")
    sizes = [int(np.ceil(part * len(values))) for part in shares]
    act = torch.stack([_only(len(values), order[:size]) for size in sizes])
    measured = {size: share(runs, metric) for size, metric in zip(sizes, runs.run(act), strict=True)}
    return SizeCurve(tuple(shares), tuple(sizes), tuple(measured[size] for size in sizes))
