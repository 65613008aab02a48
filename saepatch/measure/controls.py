"""Control sets for a chosen set of latents."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool

from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.components import Edit, EditPart
from saepatch.measure.quality import LatentStatistics, latent_statistics
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site
from saepatch.records.statistics import matched_latents, random_latents

log = logging.getLogger(__name__)

DRAWS = 5
Group = tuple[int, ...]


def control_sets(
    ranking: Sequence[int], k: int, statistics: LatentStatistics, seed: int = 0, draws: int = DRAWS
) -> tuple[list[Group], list[Group]]:
    """`draws` random and `draws` matched control sets for the first `k` latents of a ranking, disjoint from these."""
    chosen = list(ranking[:k])
    size = statistics.mean_active * statistics.norm
    random = random_latents(statistics.alive, chosen, k, draws, seed)
    return random, matched_latents(chosen, statistics.frequency, size, draws, seed=seed)


def differing_sets(ranking: Sequence[int], k: int, differs: Bool[np.ndarray, "d_sae"], seed: int = 0) -> list[Group]:
    """`DRAWS` random sets of `k` latents that differ between the runs, excluding the first `k` of the ranking.

    Where fewer remain, each set is all of them; where none remain, it is a latent that does not differ, so that the
    edit changes nothing.
    """
    left = np.setdiff1d(differs.nonzero()[0], np.asarray(ranking[:k], dtype=int))
    if not len(left):
        left = np.array([differs.argmin()])
    rng = np.random.default_rng(seed)
    return [tuple(int(i) for i in rng.choice(left, size=min(k, len(left)), replace=False)) for _ in range(DRAWS)]


def with_controls(
    model: LanguageModel,
    dictionaries: Sequence[Dictionary],
    pairs: Sequence[PromptPair],
    groups: Sequence[Mapping[Site, Group]],
    draws: int,
    seed: int,
) -> list[Edit]:
    """An edit for each group, with `draws` random and `draws` matched control sets, drawn site by site.

    Firing frequencies are measured on the prompts of all pairs, so pass all of them: a subset would draw other sets.
    """
    edits = [Edit.of([EditPart(site, ids) for site, ids in group.items()]) for group in groups]
    if not draws:
        return edits
    texts = [text for pair in pairs for text in (pair.clean, pair.corrupted)]
    statistics = {}
    for dictionary in dictionaries:
        for group in groups:
            dictionary.check_ids(group.get(dictionary.site, ()))
        if any(dictionary.site in group for group in groups):
            dictionary.check(model)
            statistics[dictionary.site] = latent_statistics(model, dictionary, model.tokenize(texts))
    for group in groups:
        drawn: dict[str, list[list[EditPart]]] = {
            "random": [[] for _ in range(draws)],
            "matched": [[] for _ in range(draws)],
        }
        for number, (site, ids) in enumerate(group.items()):
            alive = statistics[site].alive
            left = int(alive.sum()) - int(alive[list(ids)].sum())
            if left < len(ids):
                log.warning("no controls for a set of %d latents: only %d others are alive", len(ids), left)
                break
            sets = control_sets(ids, len(ids), statistics[site], seed + number, draws)
            for parts, of_role in zip(drawn.values(), sets, strict=True):
                for some, control in zip(parts, of_role, strict=True):
                    some.append(EditPart(site, tuple(sorted(control)), beside=ids))
        else:
            edits += [Edit.of(parts, role) for role, several in drawn.items() for parts in several]
    return edits
