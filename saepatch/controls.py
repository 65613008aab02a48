"""Effect against the number of latents, with the random controls that belong beside it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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

    `random` draws from all live latents outside the largest top set; `matched` draws latents that fire as often and
    write as much as those of the top set. Both are means over the draws; all intervals are over prompts.
    """

    sizes: tuple[int, ...]
    top: tuple[Interval, ...]
    random: tuple[Interval, ...]
    matched: tuple[Interval, ...]
    effects: Effects


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
    ranking: Sequence[int],
    sizes: Sequence[int],
    statistics: LatentStatistics,
    direction: Direction = "denoise",
    positions: Positions = "all",
    metric: Metric = logit_difference,
    seed: int = 0,
) -> Curve:
    """Patch the first k latents of a ranking together, for each k, and random and matched sets of the same size."""
    groups: list[Group] = [tuple(ranking[:k]) for k in sizes]
    for k in sizes:
        random, matched = control_sets(ranking, k, statistics, seed)
        groups += random + matched
    effects = patch_latents(model, dictionary, pairs, groups, positions, direction, metric)
    top, random_curve, matched_curve = [], [], []
    for number in range(len(sizes)):
        start = len(sizes) + 2 * DRAWS * number
        top.append(effects.of(number, seed))
        random_curve.append(_mean_over_draws(effects, range(start, start + DRAWS), seed))
        matched_curve.append(_mean_over_draws(effects, range(start + DRAWS, start + 2 * DRAWS), seed))
    return Curve(tuple(sizes), tuple(top), tuple(random_curve), tuple(matched_curve), effects)


def _mean_over_draws(effects: Effects, groups: range, seed: int) -> Interval:
    change = effects.change[:, list(groups)].mean(1)
    return bootstrap_ratio(np.asarray(change), effects.gap, seed=seed)
