"""Effect against the number of latents, with the random controls that belong beside it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
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
    """Normalised effect of the first k latents of a ranking, for each k, and of as many random ones.

    `random` draws from all live latents outside the top set; `matched` draws latents that fire as often and write as
    much as those of the top set. Both are means over the draws; `every` patches the whole dictionary, error term
    kept. All intervals are over prompts.
    """

    sizes: tuple[int, ...]
    top: tuple[Interval, ...]
    random: tuple[Interval, ...]
    matched: tuple[Interval, ...]
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


def effect_curve(
    model: LanguageModel,
    dictionary: Dictionary,
    pairs: Sequence[PromptPair],
    rankings: Sequence[int] | Sequence[Sequence[int]],
    sizes: Sequence[int],
    statistics: LatentStatistics,
    direction: Direction = "denoise",
    positions: Positions = "all",
    metric: Metric = logit_difference,
    seed: int = 0,
    progress: bool = False,
) -> Curve:
    """Patch the first k latents of a ranking together, for each k, and random and matched sets of the same size.

    `rankings` is one ranking for all pairs, or one for each pair; controls are drawn for each ranking anew.
    """
    parts: list[tuple[Sequence[PromptPair], list[int]]] = []
    shared = [ranking for ranking in rankings if isinstance(ranking, int)]
    if shared:
        parts.append((pairs, shared))
    else:
        own = [list(ranking) for ranking in rankings if not isinstance(ranking, int)]
        parts += [([pair], ranking) for pair, ranking in zip(pairs, own, strict=True)]
    effects = []
    for number, (some, ranking) in enumerate(tqdm(parts, direction, unit="ranking", disable=not progress, leave=False)):
        groups: list[Group] = [tuple(ranking[:k]) for k in sizes]
        for k in sizes:
            random, matched = control_sets(ranking, k, statistics, seed + number)
            groups += random + matched
        groups.append(tuple(range(dictionary.d_sae)))
        effects.append(patch_latents(model, dictionary, some, groups, positions, direction, metric))
    change = np.concatenate([one.change for one in effects])
    gap = np.concatenate([one.gap for one in effects])

    def of(groups: range) -> Interval:
        return bootstrap_ratio(change[:, list(groups)].mean(1), gap, seed=seed)

    n = len(sizes)
    starts = [n + 2 * DRAWS * i for i in range(n)]
    return Curve(
        sizes=tuple(sizes),
        top=tuple(of(range(i, i + 1)) for i in range(n)),
        random=tuple(of(range(start, start + DRAWS)) for start in starts),
        matched=tuple(of(range(start + DRAWS, start + 2 * DRAWS)) for start in starts),
        every=of(range(change.shape[1] - 1, change.shape[1])),
        effects=tuple(effects),
    )
