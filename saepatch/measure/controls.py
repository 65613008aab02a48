"""Control sets for a chosen set of latents."""

import logging
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.components import Edit, EditPart
from saepatch.errors import UserError
from saepatch.measure.quality import LatentStatistics, latent_statistics
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site

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


def random_latents(
    among: Bool[Tensor, "d_sae"], exclude: Collection[int], k: int, draws: int = 5, seed: int = 0
) -> list[tuple[int, ...]]:
    """`draws` sets of `k` latents, each set drawn without replacement from `among` minus `exclude`.

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

    `frequency` is the share of positions where a latent is active, `size` its mean activation times the norm of its
    decoder row. For each chosen latent, a control is drawn from its `neighbours` nearest in the ranks of both, among
    live latents that are neither chosen nor already in this set.

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
            centre = rank[place[latent]] if latent in place else np.zeros(2)  # a dead latent: match the rarest
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
