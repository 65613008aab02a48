"""Effect against the number of latents, with the random controls that belong beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool
from tqdm import tqdm

from saepatch.dictionaries import Dictionary
from saepatch.metrics import Metric, logit_difference
from saepatch.models import LanguageModel
from saepatch.patching import Direction, Effects, Group, patch_latents
from saepatch.positions import Positions
from saepatch.prompts import PromptPair
from saepatch.quality import LatentStatistics
from saepatch.statistics import Interval, bootstrap_ratio, matched_latents, random_latents

DRAWS = 5


@dataclass(frozen=True, eq=False)
class Curve:
    """Normalised effect of the first k latents of a ranking, for each k, and of as many others.

    `random` draws from all live latents outside the top set; `matched` draws latents that fire as often and write as
    much as those of the top set. Most of these do not differ between the two runs of a pair, so patching them is no
    edit at all; `differing`, the hardest control, draws from those that do (None where one ranking serves all pairs).
    All are means over the draws; `every` patches the whole dictionary, error term kept. Intervals are over prompts.
    """

    sizes: tuple[int, ...]
    top: tuple[Interval, ...]
    random: tuple[Interval, ...]
    matched: tuple[Interval, ...]
    differing: tuple[Interval, ...] | None
    every: Interval
    effects: tuple[Effects, ...]


def control_sets(
    ranking: Sequence[int], k: int, statistics: LatentStatistics, seed: int = 0
) -> tuple[list[Group], list[Group]]:
    """`DRAWS` random sets and `DRAWS` matched sets for the first `k` latents of a ranking; none holds one of those."""
    chosen = list(ranking[:k])
    size = statistics.mean_active * statistics.norm
    random = random_latents(statistics.alive, chosen, k, DRAWS, seed)
    return random, matched_latents(chosen, statistics.frequency, size, DRAWS, seed=seed)


def differing_sets(ranking: Sequence[int], k: int, differs: Bool[np.ndarray, "d_sae"], seed: int = 0) -> list[Group]:
    """`DRAWS` random sets of `k` latents that differ between the runs, the first `k` of the ranking left out.

    Where fewer are left, each set is all of them; where none is, it is one latent that does not differ, so no edit.
    """
    left = np.setdiff1d(differs.nonzero()[0], np.asarray(ranking[:k], dtype=int))
    if not len(left):
        left = np.array([differs.argmin()])
    rng = np.random.default_rng(seed)
    return [tuple(int(i) for i in rng.choice(left, size=min(k, len(left)), replace=False)) for _ in range(DRAWS)]


def effect_curve(
    model: LanguageModel,
    dictionary: Dictionary,
    pairs: Sequence[PromptPair],
    ranking: Sequence[int],
    sizes: Sequence[int],
    statistics: LatentStatistics,
    direction: Direction = "denoise",
    positions: Positions = "all",
    metric: Metric = logit_difference,
    seed: int = 0,
) -> Curve:
    """Patch the first k latents of one ranking together, for each k, and random and matched sets of the same size."""
    groups, roles = _groups(dictionary, ranking, sizes, statistics, seed)
    effects = patch_latents(model, dictionary, pairs, groups, positions, direction, metric)
    return _curve(sizes, [replace(effects, roles=roles)], seed)


def effect_curve_by_pair(
    model: LanguageModel,
    dictionary: Dictionary,
    pairs: Sequence[PromptPair],
    rankings: Sequence[Sequence[int]],
    differing: Bool[np.ndarray, "pairs d_sae"],
    sizes: Sequence[int],
    statistics: LatentStatistics,
    direction: Direction = "denoise",
    positions: Positions = "all",
    metric: Metric = logit_difference,
    seed: int = 0,
    progress: bool = False,
) -> Curve:
    """The same with a ranking of its own for each pair; `differing` says which latents differ in each pair."""
    effects = []
    bar = tqdm(pairs, direction, unit="pair", disable=not progress, leave=False)
    for number, (pair, ranking, differs) in enumerate(zip(bar, rankings, differing, strict=True)):
        groups, roles = _groups(dictionary, ranking, sizes, statistics, seed + number)
        for k in sizes:
            groups += differing_sets(ranking, k, differs, seed + number)
            roles += ("differing",) * DRAWS
        one = patch_latents(model, dictionary, [pair], groups, positions, direction, metric)
        effects.append(replace(one, roles=roles))
    return _curve(sizes, effects, seed)


def _groups(
    dictionary: Dictionary, ranking: Sequence[int], sizes: Sequence[int], statistics: LatentStatistics, seed: int
) -> tuple[list[Group], tuple[str, ...]]:
    groups: list[Group] = [tuple(range(dictionary.d_sae))]
    roles: tuple[str, ...] = ("every",)
    for k in sizes:
        random, matched = control_sets(ranking, k, statistics, seed)
        groups += [tuple(ranking[:k]), *random, *matched]
        roles += ("top", *("random",) * DRAWS, *("matched",) * DRAWS)
    return groups, roles


def _curve(sizes: Sequence[int], effects: Sequence[Effects], seed: int) -> Curve:
    roles = np.array(effects[0].roles)
    change = np.concatenate([one.change for one in effects])
    gap = np.concatenate([one.gap for one in effects])

    def of(role: str) -> tuple[Interval, ...]:
        by_size = np.split(change[:, roles == role], len(sizes), axis=1)  # groups of one role stand in order of size
        return tuple(bootstrap_ratio(some.mean(1), gap, seed=seed) for some in by_size)

    return Curve(
        sizes=tuple(sizes),
        top=of("top"),
        random=of("random"),
        matched=of("matched"),
        differing=of("differing") if "differing" in roles else None,
        every=bootstrap_ratio(change[:, roles == "every"][:, 0], gap, seed=seed),
        effects=tuple(effects),
    )
