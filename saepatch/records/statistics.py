"""Uncertainty and controls: intervals over prompts, tests, random and matched random latents."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saepatch.errors import UserError

FEWEST = 6  # examples that allow an interval: a draw of five is too often five times the same one
FEWEST_MOVED = 5  # of them that differ from the rest
FEWEST_RESAMPLED = 10  # rows in which an edit must have run for draws of rows to say how it varies
FLAGGED = 0.05  # false discovery rate below which an edit counts as found
FEW = "too few for an interval"
CELLS = 2**22  # float64 numbers that a permutation test holds at a time


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval; `n` is how many examples it rests on.

    Where no interval can be given both ends are NaN, and `reason` says why.
    """

    value: float
    low: float
    high: float
    n: int
    reason: str = ""

    @classmethod
    def withheld(cls, value: float, n: int, reason: str) -> "Interval":
        """The estimate alone."""
        return cls(value, math.nan, math.nan, n, reason)  # one object, so that equal ones compare so

    def __str__(self) -> str:
        if self.reason:
            return f"{self.value:.3f} ({self.reason})"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def facts(self) -> dict[str, float | int | str]:
        """As a file holds it: the reason stands there only where there is one."""
        return {name: value for name, value in vars(self).items() if name != "reason" or value}


def bootstrap_mean(
    values: Float[np.ndarray, "examples"], level: float = 0.95, draws: int = 2000, seed: int = 0
) -> Interval:
    """Mean with its interval over examples, as `RatioBootstrap` has it; missing values (NaN) are left out.

    Values that are all -1, 0 or 1 are taken as paired differences of outcomes: see `paired_difference`.
    """
    kept = np.asarray(values, dtype=float)
    kept = kept[~np.isnan(kept)]
    return bootstrap_ratio(kept, np.ones_like(kept), level, draws, seed)


class RatioBootstrap:
    """Intervals of ratios of means with one denominator: the same draws of examples for every numerator.

    Each is the union of two: the t interval of the delta method (residuals of the ratio over the mean denominator) and
    the studentised bootstrap interval (Efron and Tibshirani 1993, chapter 12), its quantiles widened for small samples
    (Hesterberg 2015, "expanded percentile"). Either one alone covers too little for some shape of data; the union
    covers at least 0.93 of the 0.95 from ten examples on: `docs/statistics.md` has the simulation. No interval is
    given where too few examples tell anything: fewer than six, or fewer than five that differ from the rest (an edit
    that moved the metric on few pairs), or a mean denominator that may be 0.
    """

    def __init__(
        self, denominator: Float[np.ndarray, "examples"], level: float = 0.95, draws: int = 2000, seed: int = 0
    ) -> None:
        self.denominator, self.level = np.asarray(denominator, dtype=float), level
        self._draws, self._seed = draws, seed

    @cached_property
    def _counts(self) -> Float[np.ndarray, "draws examples"]:
        """How often each draw has each example."""
        n = len(self.denominator)
        return np.random.default_rng(self._seed).multinomial(n, np.full(n, 1 / n), self._draws).astype(float)

    @cached_property
    def _denominators(self) -> tuple[Float[np.ndarray, "draws"], Float[np.ndarray, "draws"]]:
        """Each draw's mean denominator and mean squared denominator."""
        n = len(self.denominator)
        return self._counts @ self.denominator / n, self._counts @ self.denominator**2 / n

    def of(self, numerator: Float[np.ndarray, "examples"]) -> Interval:
        """Ratio of means with its interval; NaN where the denominator's mean is 0."""
        top, bottom = np.asarray(numerator, dtype=float), self.denominator
        n = len(top)
        if n == 0 or bottom.mean() == 0:
            return Interval.withheld(float("nan"), n, "nothing to divide by" if n else "n = 0")
        ratio = float(top.mean() / bottom.mean())
        if (bottom == 1).all() and np.isin(top, (-1, 0, 1)).all():
            return paired_difference(top, self.level)
        if reason := self._why_none(top):
            return Interval.withheld(ratio, n, reason)
        residual = top - ratio * bottom
        if np.abs(residual).max() <= 1e-12 * np.abs(top).max():  # the same share everywhere, but for rounding
            return Interval(ratio, ratio, ratio, n)
        low, high = self._bounds(ratio, residual)
        if not np.isfinite([low, high]).all():
            return Interval.withheld(ratio, n, f"{FEW}: no finite bounds at n = {n}")
        return Interval(ratio, low, high, n)

    def _bounds(self, ratio: float, residual: Float[np.ndarray, "examples"]) -> tuple[float, float]:
        n, mean = len(residual), self.denominator.mean()
        error = np.sqrt((residual**2).sum() / (n - 1) / n) / abs(mean)
        t = _t_quantile((1 + self.level) / 2, n - 1)
        denominators, squares = self._denominators
        with np.errstate(divide="ignore", invalid="ignore"):
            shift = self._counts @ residual / n / denominators  # a draw's ratio less the ratio
            cross = self._counts @ (residual * self.denominator) / n
            variance = self._counts @ residual**2 / n - 2 * shift * cross + shift**2 * squares
            errors = np.sqrt(np.maximum(variance, 0) / (n - 1)) / np.abs(denominators)
            scaled = np.where(errors > 1e-9 * error, shift / errors, np.copysign(np.inf, shift))
        scaled = np.where(np.isnan(scaled), np.inf, scaled)
        tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * t)
        # a quantile between two infinities cannot be interpolated
        lower, upper = np.quantile(scaled, [tail, 1 - tail], method="inverted_cdf")
        return float(ratio - max(t, upper) * error), float(ratio - min(-t, lower) * error)

    def _why_none(self, top: Float[np.ndarray, "examples"]) -> str:
        """Why these examples allow no interval; empty where they do."""
        n, bottom = len(top), self.denominator
        if n < FEWEST:
            return f"{FEW}: n = {n}"
        values, counts = np.unique(top, return_counts=True)
        common = counts.argmax()
        others = n - int(counts[common])
        if values[common] == 0 and others < FEWEST_MOVED:
            return f"{FEW}: {others} of {n} moved"
        if counts[common] > n / 2 and 0 < others < FEWEST_MOVED:
            return f"{FEW}: {others} of {n} differ from the rest"
        reach = _t_quantile((1 + self.level) / 2, n - 1) * bottom.std(ddof=1) / math.sqrt(n)
        if bottom.min() <= 0 <= bottom.max() and abs(bottom.mean()) <= reach:
            return "no interval: the mean to divide by may be 0"
        return ""


def _t_quantile(share: float, degrees: int) -> float:
    from scipy.special import stdtrit  # a tenth of a second, and most uses of this file need none of it

    return float(stdtrit(degrees, share))


def bootstrap_ratio(
    numerator: Float[np.ndarray, "examples"],
    denominator: Float[np.ndarray, "examples"],
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Ratio of means with its interval over examples, as `RatioBootstrap` has it: both means of the same examples."""
    return RatioBootstrap(denominator, level, draws, seed).of(numerator)


def paired_difference(differences: Float[np.ndarray, "examples"], level: float = 0.95) -> Interval:
    """Mean difference of two outcomes of the same examples, each between 0 and 1 (Bonett and Price 2012).

    The Wald interval after one difference each way is added, here with the t quantile: it keeps its level from six
    examples on, and is no point where all are 0. Of differences of fractions (means over draws) it is conservative.

    Raises:
        UserError: a value that is not between -1 and 1.
    """
    values = np.asarray(differences, dtype=float)
    n = len(values)
    if n == 0:
        return Interval.withheld(float("nan"), 0, "n = 0")
    if not (np.abs(values) <= 1).all():
        raise UserError("a difference of shares lies between -1 and 1: use bootstrap_mean for other values")
    value = float(values.mean())
    up, down = (float(np.maximum(sign * values, 0).sum() + 1) / (n + 2) for sign in (1, -1))
    half = _t_quantile((1 + level) / 2, n + 1) * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    low, high = up - down - half, up - down + half
    return Interval(value, max(-1.0, min(value, low)), min(1.0, max(value, high)), n)


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
        return Interval.withheld(float("nan"), 0, "n = 0")
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
    run are real zeros, and stay in the mean. No p value is below that of n equal signs, 2^(1-n). All are NaN where
    none is below 0.05 and no single column could be: see `why_no_q`.

    Where the mean is 0 the rows are taken as symmetric about 0: skewed rows make the values too small.
    `studentised_max_test` holds for them.
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
        if why_no_q(n, len(columns)) and np.nanmin(q) > FLAGGED:
            q[:] = np.nan
    return q


def why_no_q(rows: int, columns: int) -> str:
    """Why no single one of so many tested edits could have q < 0.05 on so many pairs; empty where one could."""
    least = 2.0 ** (1 - rows)
    if least * columns <= FLAGGED:
        return ""
    return (
        f"no q: {columns} edit{'s' * (columns > 1)} tested on {rows} pairs, where even the same sign in every pair "
        f"has p = {least:.2g}: that none is flagged says nothing of their effects"
    )


def about_sets(sets: int) -> str:
    """What a mean over so many random sets says of all such sets: none of them was above the largest."""
    share = 1 - 0.05 ** (1 / sets)
    return (
        f"Controls: means of {sets} set{'s' * (sets > 1)}. Their intervals are over pairs, for these sets; of all such "
        f"sets up to {share:.0%} may do more than the largest of these (95 % bound)."
    )


def studentised_max_test(
    change: Float[np.ndarray, "pairs edits"], tested: Bool[np.ndarray, "pairs edits"], draws: int = 2000, seed: int = 0
) -> Float[np.ndarray, "edits"]:
    """p values of |mean / standard error| against the largest of all columns in draws of centred rows.

    The bootstrap form of the maxT test (Westfall and Young 1993): it takes nothing as symmetric and holds for skewed
    changes, with less power than `sign_flip_test`. Columns that `tested` has in fewer than ten rows are NaN.
    """
    columns = _testable(change, tested, FEWEST_RESAMPLED)
    p = np.full(change.shape[1], np.nan)
    if not len(columns):
        return p
    n = len(change)
    share = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), draws) / n
    largest, own = np.zeros(draws), np.empty(len(columns))
    for start in range(0, len(columns), size := max(1, CELLS // draws)):
        some = slice(start, start + size)
        unit = _to_unit_length(change[:, columns[some]])
        mean = unit.mean(0)
        centred = unit - mean
        means = share @ centred
        spread = np.sqrt(np.maximum(share @ centred**2 - means**2, 0))
        with np.errstate(divide="ignore", invalid="ignore"):
            own[some] = np.abs(mean) / centred.std(0)
            scaled = np.where(spread > 1e-12, np.abs(means) / spread, np.where(np.abs(means) > 1e-12, np.inf, 0))
        largest = np.maximum(largest, scaled.max(1))
    reached = draws - np.searchsorted(np.sort(largest), np.nan_to_num(own, nan=0.0, posinf=np.inf))  # NaN: all zeros
    p[columns] = (1 + reached) / (1 + draws)
    return p


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
    change: Float[np.ndarray, "pairs edits"], tested: Bool[np.ndarray, "pairs edits"], fewest: int = 2
) -> Int[np.ndarray, "columns"]:
    return np.flatnonzero((tested.sum(0) >= fewest) & np.isfinite(change).all(0))


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
