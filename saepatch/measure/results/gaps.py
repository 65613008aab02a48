"""The arithmetic of effects: the change of the metric by an edit, as a share of the gap between a pair's two runs.

Denoising patches the clean run's values into the corrupted run, noising the reverse. The edited run is the base run;
the run whose values are patched in is the source run.
"""

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from saepatch.errors import UserError
from saepatch.records.statistics import Interval, RatioBootstrap

DRAWS = 2**24  # limit on pairs × bootstrap draws in memory


def towards_source(
    patched: Float[ndarray, "*shape"],
    clean: Float[ndarray, "*#shape"],
    corrupted: Float[ndarray, "*#shape"],
    denoise: bool | Bool[ndarray, "*#shape"],
) -> Float[ndarray, "*shape"]:
    """Change of the metric by patching, from the base run towards the source run, in the metric's units."""
    return np.where(denoise, patched - corrupted, clean - patched)


def moved_by(
    change: Float[ndarray, "*shape"],
    clean: Float[ndarray, "*#shape"],
    corrupted: Float[ndarray, "*#shape"],
    denoise: bool | Bool[ndarray, "*#shape"],
) -> Float[ndarray, "*shape"]:
    """The metric under a patch that changes it by `change` towards the source run: the inverse of `towards_source`."""
    return np.where(denoise, corrupted + change, clean - change)


class PairGaps:
    """Base of results with the metric of both runs of every pair, for dividing by their difference."""

    clean: Float[ndarray, "pairs"]
    corrupted: Float[ndarray, "pairs"]
    min_gap: float

    @property
    def gap(self) -> Float[ndarray, "pairs"]:
        """Metric of the clean run minus that of the corrupted run."""
        return self.clean - self.corrupted

    @property
    def usable_gap(self) -> Float[ndarray, "pairs"]:
        """The gap of each pair; NaN where |gap| < `min_gap`."""
        return np.where(np.abs(self.gap) >= self.min_gap, self.gap, np.nan)

    @property
    def missing(self) -> int:
        """Number of pairs whose gap is too small to divide by."""
        return int((np.abs(self.gap) < self.min_gap).sum())

    @property
    def mean_gap(self) -> float:
        """The mean gap, the denominator of ratios of means; NaN where it is below `min_gap`."""
        gap = float(self.gap.mean())
        return gap if abs(gap) >= self.min_gap else float("nan")

    def bootstrap(self, seed: int = 0, sizes: bool = False) -> RatioBootstrap:
        """Intervals of ratios of means over pairs, from one set of draws (fewer draws for very many pairs)."""
        draws = max(200, min(2000, DRAWS // max(1, len(self.gap))))
        return RatioBootstrap(np.abs(self.gap) if sizes else self.gap, draws=draws, seed=seed)

    def ratio(self, change: Float[ndarray, "pairs"], seed: int = 0) -> Interval:
        """Mean change over mean gap, with its interval over pairs; NaN where the mean gap is below `min_gap`."""
        if np.isnan(self.mean_gap):
            return Interval.withheld(float("nan"), len(change), f"the mean gap is below {self.min_gap:g}")
        return self.bootstrap(seed).of(change)

    def largest_first(self, totals: Float[ndarray, "edits"]) -> Int[ndarray, "edits"]:
        """Indices that sort total or mean changes by their share of the gap, largest first, even for a tiny gap."""
        return np.argsort(-np.sign(self.gap.mean()) * totals, kind="stable")

    def check_gap(self, metric: str) -> None:
        """Check that there is a mean gap to rank by.

        Raises:
            UserError: clean and corrupted runs are equal on average.
        """
        if np.isnan(self.mean_gap):
            raise UserError(
                f"the clean and corrupted runs differ by {self.gap.mean():.2g} in {metric} on average, less than "
                f"{self.min_gap}: there is no effect to rank by; check the pairs and their answers"
            )

    def ends(self) -> str:
        """Text with both runs' mean metric and the number of pairs."""
        return (
            f"{self.clean.mean():.3f} clean, {self.corrupted.mean():.3f} corrupted, {len(self.clean)} pairs "
            f"({self.missing} with a gap below {self.min_gap})"
        )
