"""Pruning: thresholds on estimates, greedy removal, and ACDC-style removal from the output back.

All act on the members (nodes or edges) of `NodeRuns` or `EdgeRuns`, whose metric judges removals: give
runs with `kl_divergence()` for ACDC as published, or with the logit difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from saepatch.circuits.measures import MemberRuns
from saepatch.circuits.nodes import Edge, Node
from saepatch.errors import UserError

AT_ONCE = 64  # variants measured in one call


@dataclass(frozen=True, eq=False)
class Pruned:
    """The members that are left at one threshold, and the mean metric of the run in which they act."""

    threshold: float
    act: Bool[Tensor, "members"]
    metric: float

    @property
    def size(self) -> int:
        return int(self.act.sum())


def by_threshold(runs: MemberRuns, score: Sequence[float], thresholds: Sequence[float]) -> list[Pruned]:
    """Members whose absolute score reaches a threshold, for each of several.

    Thresholds are in units of the score's metric, and do not transfer to another metric.
    """
    sizes = torch.tensor(np.abs(np.asarray(score, dtype=float)))
    act = torch.stack([sizes >= threshold for threshold in thresholds])
    return [Pruned(t, mask, float(m.mean())) for t, mask, m in zip(thresholds, act, runs.run(act), strict=True)]


def greedy(runs: MemberRuns, tolerance: float) -> Pruned:
    """Remove the member whose removal moves the mean metric least from that of all, while it stays within `tolerance`.

    Where either of two members suffices (an OR), one is removed and the other kept; one-at-a-time importance keeps or
    drops both. The number of passes grows with the square of the number of members.
    """
    act = torch.ones(len(runs.members), dtype=torch.bool)
    whole = float(runs.run(act[None])[0].mean())
    metric = whole
    while bool(act.any()):
        chosen = act.nonzero().flatten().tolist()
        values = _without(runs, act, chosen)
        best = int(np.argmin(np.abs(values - whole)))
        if abs(values[best] - whole) > tolerance:
            break
        act[chosen[best]], metric = False, float(values[best])
    return Pruned(tolerance, act, metric)


def _without(runs: MemberRuns, act: Bool[Tensor, "members"], chosen: Sequence[int]) -> Float[ndarray, "chosen"]:
    """The mean metric without each of some members."""
    out = []
    for start in range(0, len(chosen), AT_ONCE):
        some = act.repeat(len(chosen[start : start + AT_ONCE]), 1)
        some[range(len(some)), chosen[start : start + AT_ONCE]] = False
        out.append(runs.run(some).mean(-1))
    return np.concatenate(out)


def acdc(runs: MemberRuns, thresholds: Sequence[float], two_sided: bool = True) -> list[Pruned]:
    """Remove members one by one, from the output back, for each of several thresholds (Conmy et al. 2023).

    A removal stays where it changes the metric by less than the threshold, on average over pairs, from what it was
    before it. `two_sided` judges the size of each pair's change; one-sided judges its sign too, as published, with a
    metric that grows with damage (a divergence): removals of members that hurt then always stay. The result depends on
    the order: members of later sites first, of one site those at later positions, then by unit. So the curve over
    thresholds is the result, not one of them. Of the two arms of an OR, the first tried goes and the other stays.
    """
    if not thresholds or min(thresholds) < 0:
        raise UserError(f"thresholds {list(thresholds)}: give at least one, none below 0")
    order = sorted(range(len(runs.members)), key=lambda i: _place(runs.members[i]), reverse=True)
    results = []
    for threshold in thresholds:
        act = torch.ones(len(runs.members), dtype=torch.bool)
        before = runs.run(act[None])[0]
        for i in order:
            act[i] = False
            after = runs.run(act[None])[0]
            change = np.abs(after - before) if two_sided else after - before
            if change.mean() < threshold:
                before = after
            else:
                act[i] = True
        results.append(Pruned(threshold, act, float(before.mean())))
    return results


def _place(member: object) -> tuple[tuple[int, int, int, int, str], ...]:
    if isinstance(member, Edge):
        return member.down.order, member.up.order
    assert isinstance(member, Node)
    return (member.order,)
