"""Uncertainty: confidence intervals over prompts, and tests."""

import math
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float, Int

from saepatch.errors import UserError

FEWEST = 6  # fewest examples for an interval: resamples of five too often repeat a single example
FEWEST_MOVED = 5  # fewest examples that must differ from the rest
FEWEST_RESAMPLED = 10  # fewest rows in which an edit must have run for a bootstrap over rows
FLAGGED = 0.05  # false discovery rate below which an edit counts as found
FEW = "too few for an interval"
LOOSEST = 4  # width of an interval of a mean over the range of the values (0 included); wider ones say nothing
CELLS = 2**22  # float64 numbers that a permutation test holds in memory at a time


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval over `n` examples.

    Where no interval can be given, both bounds are NaN and `reason` explains why.
    """

    value: float
    low: float
    high: float
    n: int
    reason: str = ""

    @classmethod
    def withheld(cls, value: float, n: int, reason: str) -> "Interval":
        """An estimate without an interval."""
        return cls(value, math.nan, math.nan, n, reason)  # always the same NaN object, so that equal intervals are ==

    def __str__(self) -> str:
        return f"{self.value:.3f} " + (f"({self.reason})" if self.reason else f"[{self.low:.3f}, {self.high:.3f}]")

    def facts(self) -> dict[str, float | int | str]:
        """The fields as written to files; `reason` only where there is one."""
        return {name: value for name, value in vars(self).items() if name != "reason" or value}

    def as_list(self) -> list[float]:
        """[value, low, high], the short form in files."""
        return [self.value, self.low, self.high]


def bootstrap_mean(
    values: Float[np.ndarray, "examples"], level: float = 0.95, draws: int = 2000, seed: int = 0
) -> Interval:
    """Mean with its interval over examples (see `RatioBootstrap`); missing values (NaN) are left out.

    Values that are all -1, 0 or 1 are treated as paired differences of outcomes: see `paired_difference`.
    """
    kept = np.asarray(values, dtype=float)
    kept = kept[~np.isnan(kept)]
    return bootstrap_ratio(kept, np.ones_like(kept), level, draws, seed)


class RatioBootstrap:
    """Intervals of ratios of means that share a denominator, with the same bootstrap draws for every numerator.

    An interval is the union of two: the t interval of the delta method (residuals of the ratio over the mean
    denominator) and the studentised bootstrap interval (Efron and Tibshirani 1993, chapter 12), its quantiles widened
    for small samples (Hesterberg 2015, "expanded percentile"). Either alone undercovers for some shapes of data; the
    union, at nominal 0.95, covers at least 0.93 from ten examples on: see the simulation in `docs/statistics.md`. No
    interval is given for fewer than six examples, for fewer than five that differ from the rest (an edit that moved
    the metric on few pairs), where the mean denominator may be 0, or where the interval would be more than four times
    as wide as the range of the values.
    """

    def __init__(
        self, denominator: Float[np.ndarray, "examples"], level: float = 0.95, draws: int = 2000, seed: int = 0
    ) -> None:
        self.denominator, self.level = np.asarray(denominator, dtype=float), level
        self._draws, self._seed = draws, seed

    @cached_property
    def _counts(self) -> Float[np.ndarray, "draws examples"]:
        """Number of times each draw contains each example."""
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
        if np.abs(residual).max() <= 1e-12 * np.abs(top).max():  # the same ratio in every example, up to rounding
            return Interval(ratio, ratio, ratio, n)
        low, high = self._bounds(ratio, residual)
        if not np.isfinite([low, high]).all():
            return Interval.withheld(ratio, n, f"{FEW}: no finite bounds at n = {n}")
        spread = (max(top.max(), 0.0) - min(top.min(), 0.0)) / abs(bottom.mean())
        if high - low > LOOSEST * spread:  # a few large values, which some draws contain and others do not
            return Interval.withheld(ratio, n, f"{FEW}: values too uneven")
        return Interval(ratio, low, high, n)

    def _bounds(self, ratio: float, residual: Float[np.ndarray, "examples"]) -> tuple[float, float]:
        n, mean = len(residual), self.denominator.mean()
        error = np.sqrt((residual**2).sum() / (n - 1) / n) / abs(mean)
        t = _t_quantile((1 + self.level) / 2, n - 1)
        denominators, squares = self._denominators
        with np.errstate(divide="ignore", invalid="ignore"):
            shift = self._counts @ residual / n / denominators  # a draw's ratio minus the estimate
            cross = self._counts @ (residual * self.denominator) / n
            variance = self._counts @ residual**2 / n - 2 * shift * cross + shift**2 * squares
            errors = np.sqrt(np.maximum(variance, 0) / (n - 1)) / np.abs(denominators)
            scaled = np.where(errors > 1e-9 * error, shift / errors, np.copysign(np.inf, shift))
        scaled = np.where(np.isnan(scaled), np.inf, scaled)
        tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * t)
        # interpolating a quantile between two infinities gives NaN
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
    """Ratio of two means over the same examples, with its interval (see `RatioBootstrap`)."""
    return RatioBootstrap(denominator, level, draws, seed).of(numerator)


def paired_difference(differences: Float[np.ndarray, "examples"], level: float = 0.95) -> Interval:
    """Mean paired difference of two outcomes between 0 and 1, with the interval of Bonett and Price (2012).

    One difference in each direction is added before the Wald interval is taken, here with the t quantile: it keeps its
    level from six examples on, and has a width even where all differences are 0. For differences of fractions (means
    over draws) it is conservative.

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
    """Mean of values between 0 and 1, with the Wilson score interval of a proportion over the same number of examples.

    A bootstrap of a hundred zeros gives [0, 0]; the Wilson interval keeps a width. For fractions (such as shares of
    random draws) it is conservative.

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
    # at 0 and 1 the estimate is a bound: rounding must not leave it outside
    return Interval(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)), n)


def false_discovery(
    change: Float[np.ndarray, "pairs edits"], tested: Bool[np.ndarray, "pairs edits"]
) -> Float[np.ndarray, "edits"]:
    """q values for the hypothesis that a column's mean is 0 (Benjamini and Hochberg 1995, over one-sample t tests).

    A column is NaN where `tested` marks fewer than two of its rows. Rows where an edit did not run are true zeros and
    stay in the mean. A p value is never below that of n equal signs, 2^(1-n). All q values are NaN where none is below
    0.05 and no single column could have been: see `why_no_q`.

    The test assumes rows symmetric about 0 under the null: skewed rows make q too small. `studentised_max_test` is
    valid for them.
    """
    from scipy import stats  # costs half a second, and most uses of this file need none of it

    columns = _testable(change, tested)
    q = np.full(change.shape[1], np.nan)
    if len(columns):
        n, share = len(change), _share_of_one_direction(change[:, columns])
        with np.errstate(divide="ignore"):
            t = share * np.sqrt(n - 1) / np.sqrt(1 - share**2)
        # n rows cannot be stronger evidence than n equal signs, whatever the t distribution gives for equal rows
        p = np.maximum(2 * stats.t.sf(t, n - 1), 2.0 ** (1 - n))
        q[columns] = stats.false_discovery_control(p)
        if why_no_q(n, len(columns)) and np.nanmin(q) > FLAGGED:
            q[:] = np.nan
    return q


def why_no_q(rows: int, columns: int) -> str:
    """Why no single one of `columns` tested edits could reach q < 0.05 on `rows` pairs; empty where one could."""
    least = 2.0 ** (1 - rows)
    if least * columns <= FLAGGED:
        return ""
    return (
        f"no q: {columns} edit{'s' * (columns > 1)} tested on {rows} pairs, where even the same sign in every pair "
        f"has p = {least:.2g}: that none is flagged is no evidence against an effect"
    )


def about_sets(sets: int) -> str:
    """Sentence on what the largest of `sets` random sets bounds in the population of such sets."""
    share = 1 - 0.05 ** (1 / sets)
    return (
        f"Controls: means of {sets} set{'s' * (sets > 1)}. Their intervals are over pairs, for these sets alone; "
        f"up to {share:.0%} of all such sets may have a larger effect than the largest of these (95 % bound)."
    )


def studentised_max_test(
    change: Float[np.ndarray, "pairs edits"], tested: Bool[np.ndarray, "pairs edits"], draws: int = 2000, seed: int = 0
) -> Float[np.ndarray, "edits"]:
    """p values of |mean / standard error| against the maximum over all columns in bootstrap draws of centred rows.

    The bootstrap form of the maxT test (Westfall and Young 1993): it assumes no symmetry, so it is valid for skewed
    changes, with less power than `sign_flip_test`. A column is NaN where `tested` marks fewer than ten of its rows.
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

    Exact where a row's changes are as likely as their negatives. A draw flips whole rows, which keeps the correlation
    between edits; each column is compared with the maximum over all (the single-step maxT of Westfall and Young 1993).
    p = (1 + number of draws that reach the column's value) / (1 + draws). NaN as in `false_discovery`.

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
    # a draw that flips no row, or all of them, equals a column's own value up to rounding
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
    values = values / np.where(largest > 0, largest, 1)  # before squaring, so that no square underflows
    length = np.linalg.norm(values, axis=0)
    return values / np.where(length > 0, length, 1)


def _share_of_one_direction(values: Float[np.ndarray, "pairs columns"]) -> Float[np.ndarray, "columns"]:
    """r = |sum| / √(n · sum of squares): 1 where all rows are equal. |t| = r √(n − 1) / √(1 − r²)."""
    share = np.abs(_to_unit_length(values).sum(0)) / np.sqrt(len(values))
    return np.where(share > 1 - 1e-12, 1.0, share)  # equal up to rounding
