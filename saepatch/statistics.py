"""Uncertainty and controls: bootstrap intervals over prompts, random and matched random latents."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from saepatch.errors import UserError


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


def bootstrap_ratio(
    numerator: Float[np.ndarray, "examples"],
    denominator: Float[np.ndarray, "examples"],
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Ratio of means with a percentile bootstrap interval: examples are drawn, both means taken on the same draw."""
    top, bottom = np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)
    n = len(top)
    if n == 0 or bottom.mean() == 0:
        return Interval(float("nan"), float("nan"), float("nan"), n)
    index = np.random.default_rng(seed).integers(0, n, (draws, n))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = top[index].mean(1) / bottom[index].mean(1)
    low, high = np.nanquantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(top.mean() / bottom.mean()), float(low), float(high), n)


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
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half), n)


def false_discovery(
    change: Float[np.ndarray, "pairs edits"], tested: Bool[np.ndarray, "pairs edits"]
) -> Float[np.ndarray, "edits"]:
    """q values of the test that each column's mean is 0 (Benjamini and Hochberg 1995, over one-sample t tests).

    Columns that `tested` has in fewer than two rows are NaN: too little ran there to test. Rows where an edit did not
    run are real zeros, and stay in the mean.
    """
    raise NotImplementedError


def sign_flip_test(
    change: Float[np.ndarray, "pairs edits"], tested: Bool[np.ndarray, "pairs edits"], draws: int = 2000, seed: int = 0
) -> Float[np.ndarray, "edits"]:
    """p values from the permutation distribution of the maximum |mean / standard error| under random signs of rows."""
    raise NotImplementedError


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
