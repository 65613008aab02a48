"""Sets of latents that a chosen set is compared with."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from saepatch.quality import LatentStatistics
from saepatch.statistics import matched_latents, random_latents

DRAWS = 5
Group = tuple[int, ...]


def control_sets(
    ranking: Sequence[int], k: int, statistics: LatentStatistics, seed: int = 0, draws: int = DRAWS
) -> tuple[list[Group], list[Group]]:
    """`draws` random sets and as many matched sets for the first `k` latents of a ranking; none holds one of those."""
    chosen = list(ranking[:k])
    size = statistics.mean_active * statistics.norm
    random = random_latents(statistics.alive, chosen, k, draws, seed)
    return random, matched_latents(chosen, statistics.frequency, size, draws, seed=seed)


def differing_sets(ranking: Sequence[int], k: int, differs: Bool[np.ndarray, "d_sae"], seed: int = 0) -> list[Group]:
    """`DRAWS` random sets of `k` latents that differ between the runs, the first `k` of the ranking left out.

    Where fewer are left, each set is all of them; where none is, it is one latent that does not differ, so no edit.
    """
    left = np.setdiff1d(differs.nonzero()[0], np.asarray(ranking[:k], dtype=int))
    if not len(left):
        left = np.array([differs.argmin()])
    rng = np.random.default_rng(seed)
    return [tuple(int(i) for i in rng.choice(left, size=min(k, len(left)), replace=False)) for _ in range(DRAWS)]
