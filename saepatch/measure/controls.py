"""Sets of latents that a chosen set is compared with."""

import logging
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.components import Edit
from saepatch.measure.quality import LatentStatistics, latent_statistics
from saepatch.model.language_model import LanguageModel
from saepatch.records.statistics import matched_latents, random_latents

log = logging.getLogger(__name__)

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


def with_controls(
    model: LanguageModel,
    dictionary: Dictionary,
    pairs: Sequence[PromptPair],
    groups: Sequence[Group],
    draws: int,
    seed: int,
) -> list[Edit]:
    """An edit for each group, and `draws` random and as many matched sets beside it.

    How often latents fire is counted in the pairs' own prompts: over parts of the pairs, others would be drawn.
    """
    for group in groups:
        dictionary.check_ids(group)
    edits = [Edit(dictionary.site, group, role="given") for group in groups]
    if not draws:
        return edits
    dictionary.check(model)
    texts = [text for pair in pairs for text in (pair.clean, pair.corrupted)]
    statistics = latent_statistics(model, dictionary, model.tokenize(texts))
    alive = int(statistics.alive.sum())
    for group in groups:
        left = alive - int(statistics.alive[list(group)].sum())
        if left < len(group):
            log.warning("%d latents have no controls of their size: only %d others are alive", len(group), left)
            continue
        sets = control_sets(group, len(group), statistics, seed, draws)
        for role, drawn in zip(("random", "matched"), sets, strict=True):
            edits += [Edit(dictionary.site, tuple(sorted(one)), role=role, beside=group) for one in drawn]
    return edits
