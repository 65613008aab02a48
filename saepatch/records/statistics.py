"""Uncertainty and controls: bootstrap intervals over prompts, random and matched random latents."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saepatch.errors import UserError

CELLS = 2**22  # float64 numbers that a permutation test holds at a time


@dataclass(frozen=True)
class Interval:
    """An estimate with its bootstrap interval; `n` is how many examples it rests on."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_mean(
    values: Float[np.ndarray, "examples"], level: float = 0.95, draws: int = 2000, seed: int = 0
) -> Interval:
    """Mean with a percentile bootstrap interval over examples; missing values (NaN) are left out and not counted."""
    kept = np.asarray(values, dtype=float)
    kept = kept[~np.isnan(kept)]
    return bootstrap_ratio(kept, np.ones_like(kept), level, draws, seed)


class RatioBootstrap:
    """Percentile bootstrap of ratios of means with one denominator: the same draws of examples for every numerator."""

    def __init__(
        self, denominator: Float[np.ndarray, "examples"], level: float = 0.95, draws: int = 2000, seed: int = 0
    ) -> None:
        self.denominator, self.level = np.asarray(denominator, dtype=float), level
        n = len(self.denominator)
        self._index = np.random.default_rng(seed).integers(0, n, (draws, n)) if n > 1 else None

    @cached_property
    def _denominators(self) -> Float[np.ndarray, "draws"]:
        return self.denominator[self._index].mean(1)

    def of(self, numerator: Float[np.ndarray, "examples"]) -> Interval:
        """Ratio of means with its interval; NaN where the denominator's mean is 0, no interval for one example."""
        top, bottom = np.asarray(numerator, dtype=float), self.denominator
        n = len(top)
        if n == 0 or bottom.mean() == 0:
            return Interval(float("nan"), float("nan"), float("nan"), n)
        if n == 1:  # one example says nothing about others
            return Interval(float(top[0] / bottom[0]), float("nan"), float("nan"), n)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = top[self._index].mean(1) / self._denominators
        # a quantile between two infinities cannot be interpolated
        method: Literal["inverted_cdf", "linear"] = "inverted_cdf" if np.isinf(ratios).any() else "linear"
        low, high = np.nanquantile(ratios, [(1 - self.level) / 2, (1 + self.level) / 2], method=method)
        return Interval(float(top.mean() / bottom.mean()), float(low), float(high), n)


def bootstrap_ratio(
    numerator: Float[np.ndarray, "examples"],
    denominator: Float[np.ndarray, "examples"],
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Ratio of means with a percentile bootstrap interval: examples are drawn, both means taken on the same draw."""
    return RatioBootstrap(denominator, level, draws, seed).of(numerator)


def wilson_share(shares: Float[np.ndarray, "examples"], level: float = 0.95) -> Interval:
    """Mean of values between 0 and 1 with the Wilson score interval of a proportion over as many examples.

    A bootstrap of a hundred zeros is [0, 0]; this interval does not pretend to know that much. For fractions (a share
    of random draws, say) it is conservative.

    Raises:
        UserError: a value that is not between 0 and 1.
    """
    values = np.asarray(shares, dtype=float)
    n = len(values)
    if n == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    if not ((values >= 0) & (values <= 1)).all():
        raise UserError("a share lies between 0 and 1: use bootstrap_mean for other values")
    p, z = float(values.mean()), NormalDist().inv_cdf((1 + level) / 2)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # rounding must not leave the estimate outside: at 0 and 1 it is an end
    return Interval(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)), n)


def false_discovery(
    change: Float[np.ndarray, "pairs edits"], tested: Bool[np.ndarray, "pairs edits"]
) -> Float[np.ndarray, "edits"]:
    """q values of the test that each column's mean is 0 (Benjamini and Hochberg 1995, over one-sample t tests).

    Columns that `tested` has in fewer than two rows are NaN: too little ran there to test. Rows where an edit did not
    run are real zeros, and stay in the mean. No p value is below that of n equal signs, 2^(1-n).
    """
    from scipy import stats  # costs half a second, and most uses of this file need none of it

    columns = _testable(change, tested)
    q = np.full(change.shape[1], np.nan)
    if len(columns):
        n, share = len(change), _share_of_one_direction(change[:, columns])
        with np.errstate(divide="ignore"):
            t = share * np.sqrt(n - 1) / np.sqrt(1 - share**2)
        # no test of n signs is surer than all of them being the same, whatever the t distribution says of n equal rows
        p = np.maximum(2 * stats.t.sf(t, n - 1), 2.0 ** (1 - n))
        q[columns] = stats.false_discovery_control(p)
    return q


def sign_flip_test(
    change: Float[np.ndarray, "pairs edits"], tested: Bool[np.ndarray, "pairs edits"], draws: int = 2000, seed: int = 0
) -> Float[np.ndarray, "edits"]:
    """p values from the permutation distribution of the maximum |mean / standard error| under random signs of rows.

    Exact where a row's changes are as likely as their negatives. One draw's signs are those of whole rows, so edits
    that go together stay together; each column is compared with the largest of all (the single-step maxT of Westfall
    and Young 1993). `(1 + how many draws reach it) / (1 + draws)`. NaN as in `false_discovery`.

    Raises:
        UserError: fewer than one draw.
    """
    if draws < 1:
        raise UserError(f"{draws} draws of signs: use at least 1")
    columns = _testable(change, tested)
    p = np.full(change.shape[1], np.nan)
    if not len(columns):
        return p
    n = len(change)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (draws, n))
    largest = np.zeros(draws)
    own = np.empty(len(columns))
    for start in range(0, len(columns), size := max(1, CELLS // draws)):
        some = slice(start, start + size)
        unit = _to_unit_length(change[:, columns[some]])
        own[some] = np.abs(unit.sum(0))
        largest = np.maximum(largest, np.abs(signs @ unit).max(1))
    # a draw that turns no row, or all, reaches a column's own value but for rounding
    reached = draws - np.searchsorted(np.sort(largest), own - 1e-9)
    p[columns] = (1 + reached) / (1 + draws)
    return p


def _testable(
    change: Float[np.ndarray, "pairs edits"], tested: Bool[np.ndarray, "pairs edits"]
) -> Int[np.ndarray, "columns"]:
    return np.flatnonzero((tested.sum(0) >= 2) & np.isfinite(change).all(0))


def _to_unit_length(values: Float[np.ndarray, "pairs columns"]) -> Float[np.ndarray, "pairs columns"]:
    values = np.asarray(values, dtype=np.float64)
    largest = np.abs(values).max(0)
    values = values / np.where(largest > 0, largest, 1)  # first, so that no square vanishes
    length = np.linalg.norm(values, axis=0)
    return values / np.where(length > 0, length, 1)


def _share_of_one_direction(values: Float[np.ndarray, "pairs columns"]) -> Float[np.ndarray, "columns"]:
    """|sum| over √(n · sum of squares): 1 where all rows are equal. |t| = r √(n − 1) / √(1 − r²) grows with it."""
    share = np.abs(_to_unit_length(values).sum(0)) / np.sqrt(len(values))
    return np.where(share > 1 - 1e-12, 1.0, share)  # equal but for rounding


def random_latents(
    among: Bool[Tensor, "d_sae"], exclude: Collection[int], k: int, draws: int = 5, seed: int = 0
) -> list[tuple[int, ...]]:
    """`draws` sets of `k` latents, each set drawn without replacement from `among` less `exclude`.

    Raises:
        UserError: fewer than `k` latents are left to draw from.
    """
    left = np.setdiff1d(among.nonzero().flatten().cpu().numpy(), np.asarray(sorted(exclude), dtype=int))
    if len(left) < k:
        raise UserError(f"{k} random latents wanted, but only {len(left)} are left to draw from: choose fewer latents")
    rng = np.random.default_rng(seed)
    return [tuple(int(i) for i in rng.choice(left, size=k, replace=False)) for _ in range(draws)]


def matched_latents(
    chosen: Sequence[int],
    frequency: Float[Tensor, "d_sae"],
    size: Float[Tensor, "d_sae"],
    draws: int = 5,
    neighbours: int = 10,
    seed: int = 0,
) -> list[tuple[int, ...]]:
    """`draws` sets of latents that fire about as often and write about as much as the chosen ones.

    `frequency` is the share of positions where a latent is active, `size` its mean activation times its row's norm.
    For each chosen latent one is drawn from its `neighbours` nearest in the ranks of both, among live latents that are
    neither chosen nor drawn already for this set.

    Raises:
        UserError: there are not enough live latents to draw from.
    """
    live = (frequency > 0).nonzero().flatten().cpu().numpy()
    rank = np.stack([_ranks(frequency[live].cpu().numpy()), _ranks(size[live].cpu().numpy())], 1)
    place = {int(latent): row for row, latent in enumerate(live)}
    others = np.array([int(latent) not in set(chosen) for latent in live])
    if others.sum() < len(chosen):
        raise UserError(
            f"{len(chosen)} matched latents wanted, but only {others.sum()} live ones are left: choose fewer"
        )
    rng = np.random.default_rng(seed)
    sets = []
    for _ in range(draws):
        free, drawn = others.copy(), []
        for latent in chosen:
            centre = rank[place[latent]] if latent in place else np.zeros(2)  # one that never fires: the rarest
            distance = np.where(free, np.abs(rank - centre).sum(1), np.inf)
            near = np.argsort(distance, kind="stable")[: min(neighbours, int(free.sum()))]
            row = int(rng.choice(near))
            free[row] = False
            drawn.append(int(live[row]))
        sets.append(tuple(drawn))
    return sets


def _ranks(values: np.ndarray) -> np.ndarray:
    ranks = np.empty(len(values))
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    return ranks / max(1, len(values) - 1)
