"""Verification up to a recall: exact runs are added until a bound on the share of the true top that was run holds.

If K nodes of the screen's top have an exact effect of at least t, and at most m of the nodes that were not run do, then
at least 1 − m/K of the K truly largest nodes were run exactly. A random sample of the nodes below the screen's top
bounds m without any assumption about the estimates (hypergeometric, as in `Verification.missed`). If the sample shows
too many large effects, more of the largest estimates and a larger sample are run, and the bound is computed again. The
sizes of all looks are fixed beforehand, and their bounds hold jointly (Bonferroni), so that stopping early does not
lower the confidence.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from saepatch.errors import UserError
from saepatch.measure.results.gaps import towards_source
from saepatch.measure.results.screen import Attribution, Exact, Verification, most_large

log = logging.getLogger(__name__)

LOOKS = 4  # largest number of bounds
MOST_RUN = 0.5  # largest share of the nodes to run; beyond it, a full sweep is better
LEVEL = 0.95


@dataclass(frozen=True)
class Look:
    """Number of the largest estimates, and of drawn nodes, that have been run when a bound is computed."""

    largest: int
    sample: int


def looks(nodes: int, k: int, recall: float) -> Iterator[Look]:
    """The looks, smallest first: at look i, the sample is large enough for i nodes with large effects in it.

    The screen's top is doubled each time, and the sample never shrinks.
    """
    allowed, sample = int((1 - recall) * k + 1e-9), 0
    for number in range(LOOKS):
        largest = min(nodes, k * 2 ** (number + 1))
        sample = max(sample, _sample(nodes - largest, number, allowed))
        yield Look(largest, min(sample, nodes - largest))


@cache
def _sample(others: int, large: int, allowed: int) -> int:
    """The smallest sample of `others` nodes whose bound is at most `allowed` if `large` of its nodes are large."""
    low, high = min(large, others), others
    while low < high:
        middle = (low + high) // 2
        most = most_large(np.array([large]), np.array([middle]), np.array([others]), (1 - LEVEL) / LOOKS)
        low, high = (low, middle) if int(most[0]) <= allowed else (middle + 1, high)
    return low


def verify_to_recall(screen: Attribution, k: int, recall: float, exact: Exact, seed: int = 0) -> Attribution:
    """Run nodes exactly until, at 95 % confidence, a share of at least `recall` of the `k` truly largest was run.

    If that takes more than `MOST_RUN` of the nodes, the largest look within it is run, with a warning.
    `Verification.recall` gives the resulting bound.

    Raises:
        UserError: `recall` is not between 0 and 1, or `k` is not between 1 and the number of nodes.
    """
    if not 0 < recall < 1:
        raise UserError(f"recall = {recall}: use a share above 0 and below 1, such as 0.95")
    if not 1 <= k <= len(screen):
        raise UserError(
            f"recall of the {k} largest effects among {len(screen)} nodes that differ: give their number as verify, "
            f"from 1 to {len(screen)}"
        )
    order = np.argsort(-np.abs(screen.score), kind="stable")
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))  # of each node among the estimates, largest first
    drawn = np.random.default_rng(seed).permutation(len(order))
    effects = np.full(len(order), np.nan)
    planned = list(looks(len(screen), k, recall))
    affordable = [look for look in planned if look.largest + look.sample <= max(k, MOST_RUN * len(screen))]
    if not affordable:
        log.warning(
            "a recall of %g for the %d largest of %d nodes takes %d exact runs, more than half of all: fewer are made, "
            "and the bound is weaker; verify more nodes, ask for a lower recall, or patch all nodes",
            recall, k, len(screen), planned[0].largest + planned[0].sample,
        )  # fmt: skip
        affordable = [_smaller(planned[0], len(screen), k)]
    for look in affordable:
        below = drawn[place[drawn] >= look.largest][: look.sample]
        index = np.concatenate([order[: look.largest], below])
        _run(screen, index[np.isnan(effects[index])], exact, effects)
        others = len(order) - look.largest
        verified = Verification(
            index, effects[index], screen.score[index], look.largest, others, screen.sizes, looks=LOOKS
        )
        if verified.recall(k) >= recall:
            break
    else:
        log.warning("the bound on the recall of the %d largest effects is %.3f, not %g", k, verified.recall(k), recall)
    return replace(screen, verified=verified)


def _smaller(look: Look, nodes: int, k: int) -> Look:
    """As many of a look's largest estimates as fit, and as many drawn nodes as are left."""
    most = max(k, int(MOST_RUN * nodes))
    largest = min(look.largest, max(k, most // 2))
    return Look(largest, max(0, most - largest))


def _run(screen: Attribution, nodes: np.ndarray, exact: Exact, effects: np.ndarray) -> None:
    """Fill in the exact effects of some nodes."""
    if not len(nodes):
        return
    values, whose = exact([(int(screen.pair[node]), screen.edit(int(node))) for node in nodes]), screen.pair[nodes]
    effects[nodes] = towards_source(values, screen.clean[whose], screen.corrupted[whose], screen.direction == "denoise")
