"""Effect as a function of the number of latents, with random controls."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from typing_extensions import Unpack

from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.components import Edit
from saepatch.engine.options import SweepKeywords, SweepOptions, with_keywords
from saepatch.errors import UserError
from saepatch.measure.controls import control_sets, differing_sets
from saepatch.measure.patching import patch_by_pair, patch_components
from saepatch.measure.quality import LatentStatistics
from saepatch.measure.results.effects import Effects
from saepatch.model.language_model import LanguageModel
from saepatch.records.statistics import Interval, bootstrap_ratio


class PairRanking(NamedTuple):
    """Latents ranked for one pair, most important first, and a mask of those that differ between its two runs."""

    latents: Sequence[int]
    differs: Bool[np.ndarray, "d_sae"]


@dataclass(frozen=True, eq=False)
class Curve:
    """Normalised effect of the first k latents of a ranking, for each k, and of control sets of the same size.

    `random` draws from all live latents outside the top set; `matched` draws latents with about the same frequency and
    size as those of the top set. Most of these do not differ between the two runs of a pair, so patching them changes
    nothing; `differing`, the strictest control, draws from those that do (None where all pairs share a ranking).
    Controls are means over draws; `every` patches the whole dictionary, error term kept. Intervals are over pairs.
    """

    sizes: tuple[int, ...]
    top: tuple[Interval, ...]
    random: tuple[Interval, ...]
    matched: tuple[Interval, ...]
    differing: tuple[Interval, ...] | None
    every: Interval
    effects: tuple[Effects, ...]


def effect_curve(
    model: LanguageModel,
    dictionary: Dictionary,
    pairs: Sequence[PromptPair],
    ranking: Sequence[int],
    sizes: Sequence[int],
    statistics: LatentStatistics,
    seed: int = 0,
    options: SweepOptions | None = None,
    **keywords: Unpack[SweepKeywords],
) -> Curve:
    """Patch the first k latents of one ranking together, for each k in `sizes`, with random and matched controls.

    Raises:
        UserError: the ranking has fewer than `max(sizes)` latents; otherwise as for `patch_latents`.
    """
    edits = _edits(dictionary, ranking, sizes, statistics, seed)
    effects = patch_components(model, dictionary, pairs, edits, with_keywords(options or SweepOptions(), keywords))
    return _curve(sizes, [effects], seed)


def effect_curve_by_pair(
    model: LanguageModel,
    dictionary: Dictionary,
    pairs: Sequence[PromptPair],
    rankings: Sequence[PairRanking],
    sizes: Sequence[int],
    statistics: LatentStatistics,
    seed: int = 0,
    options: SweepOptions | None = None,
    **keywords: Unpack[SweepKeywords],
) -> Curve:
    """`effect_curve` with a separate ranking for each pair, and controls from the pair's differing latents too."""
    edits = []
    for number, (ranking, differs) in enumerate(rankings):
        own = _edits(dictionary, ranking, sizes, statistics, seed + number)
        own += [
            Edit(dictionary.site, drawn, role="differing", beside=tuple(ranking[:k]))
            for k in sizes
            for drawn in differing_sets(ranking, k, differs, seed + number)
        ]
        edits.append(own)
    effects = patch_by_pair(model, dictionary, pairs, edits, with_keywords(options or SweepOptions(), keywords))
    return _curve(sizes, effects, seed)


def _edits(
    dictionary: Dictionary, ranking: Sequence[int], sizes: Sequence[int], statistics: LatentStatistics, seed: int
) -> list[Edit]:
    site = dictionary.site
    edits = [Edit(site, tuple(range(dictionary.d_sae)), role="every")]
    if max(sizes) > len(set(ranking)):
        raise UserError(f"{max(sizes)} latents wanted, but the ranking has {len(set(ranking))}: rank more")
    for k in sizes:
        top = tuple(ranking[:k])
        edits.append(Edit(site, top, role="top"))
        for role, sets in zip(("random", "matched"), control_sets(ranking, k, statistics, seed), strict=True):
            edits += [Edit(site, drawn, role=role, beside=top) for drawn in sets]
    return edits


def _curve(sizes: Sequence[int], effects: Sequence[Effects], seed: int) -> Curve:
    roles = np.array([edit.role for edit in effects[0].edits])
    change = np.concatenate([some.change for some in effects])
    gap = np.concatenate([some.gap for some in effects])

    def of(role: str) -> tuple[Interval, ...]:
        by_size = np.split(change[:, roles == role], len(sizes), axis=1)  # edits of one role are in order of size
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
