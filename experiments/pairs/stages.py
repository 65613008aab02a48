"""The parts of an experiment: maps, a site, its latents, attribution against exact, other directions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.components import PATCH_DIRECTIONS, Component, Directions, Edit, LatentUnits, PatchDirection
from saepatch.engine.gradients import Method
from saepatch.errors import UserError
from saepatch.measure.attribution import Attribution, FirstOrder, GradDrop, IntegratedGradients, attribute
from saepatch.measure.baselines import difference_of_means, dimensions, principal_components
from saepatch.measure.curves import Curve, effect_curve
from saepatch.measure.effects import Effects
from saepatch.measure.patching import patch_components, patch_heads, patch_latents, patch_streams
from saepatch.measure.quality import LatentStatistics, splice_quality
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.sites import Site
from saepatch.records.statistics import Interval, bootstrap_ratio

CHOOSE_BY = 16  # the site is chosen by the effect of this many latents
SHOWN = 12  # latents that are looked at one by one
DENSE = "difference of means"
METHODS: tuple[Method, ...] = (FirstOrder(), IntegratedGradients(), GradDrop())

Result = TypeVar("Result")
Both = Mapping[PatchDirection, Effects]


def both(run: Callable[[PatchDirection], Result]) -> dict[PatchDirection, Result]:
    """The same in both directions."""
    return {direction: run(direction) for direction in PATCH_DIRECTIONS}


# Sites


def stream_effects(model: LanguageModel, pairs: Sequence[PromptPair]) -> Both:
    """Every layer's output at every position."""
    return both(lambda d: patch_streams(model, pairs, direction=d, progress=True))


def head_effects(model: LanguageModel, pairs: Sequence[PromptPair]) -> Both | None:
    """Every attention head, at all positions; None where the family does not offer them."""
    if "z" not in model.layout.streams:
        return None
    return both(lambda d: patch_heads(model, pairs, direction=d, progress=True))


@dataclass(frozen=True, eq=False)
class RankedSite:
    """A site's latents, ranked on one half of `select` by their own denoising effect, and the effect of the first
    `CHOOSE_BY` on the other half."""

    dictionary: Dictionary
    ranking: tuple[int, ...]
    chosen_by: Interval  # on the half of select that nothing was ranked on
    report: Mapping[PatchDirection, Interval]
    ce_recovered: float

    @property
    def site(self) -> Site:
        return self.dictionary.site


def rank_sites(
    model: LanguageModel,
    dictionaries: Sequence[Dictionary],
    select: Sequence[PromptPair],
    report: Sequence[PromptPair],
    most: int,
    seed: int,
) -> list[RankedSite]:
    """Rank the latents of every site, the first `most` of them, and patch the first ones together.

    Ranking and choice go by different halves of `select`: on the pairs it was ranked on, a list that fits their noise
    looks better than one that holds.
    """
    ranked_on, chosen_on = halves(select)
    prompts = model.tokenize([text for pair in select for text in (pair.clean, pair.corrupted)])
    ranked = []
    for dictionary in dictionaries:
        singles = patch_latents(model, dictionary, ranked_on, progress=True)
        ranking = tuple(edit.units[0] for edit in singles.top(max(most, CHOOSE_BY)))
        first = [Edit(dictionary.site, ranking[:CHOOSE_BY], role="top")]
        on_report = _together(model, LatentUnits(dictionary), report, first)
        ranked.append(
            RankedSite(
                dictionary,
                ranking,
                patch_components(model, dictionary, chosen_on, first).of(0, seed),
                {direction: effects.of(0, seed) for direction, effects in on_report.items()},
                _ce_recovered(model, dictionary, prompts),
            )
        )
    return ranked


def halves(select: Sequence[PromptPair]) -> tuple[Sequence[PromptPair], Sequence[PromptPair]]:
    """The pairs of `select` to rank on, and those to choose on."""
    middle = (len(select) + 1) // 2
    return select[:middle], select[middle:]


def best_site(sites: Sequence[RankedSite]) -> RankedSite:
    """The site whose first latents restore most on the half of `select` that they were not ranked on."""
    return max(sites, key=lambda site: site.chosen_by.value)


def _ce_recovered(model: LanguageModel, dictionary: Dictionary, prompts: Tokens) -> float:
    """As training measured it on held-out text of this very model; for other dictionaries, over the select prompts."""
    known = dictionary.metrics_on(model).get("ce_recovered")
    return splice_quality(model, dictionary, prompts).ce_recovered if known is None else known


# Latents of the chosen site


def by_position(model: LanguageModel, best: RankedSite, group: Sequence[PromptPair]) -> Both:
    """The first latents of the ranking at every position, each alone."""
    return both(
        lambda d: patch_latents(
            model, best.dictionary, group, best.ranking[:SHOWN], each_position=True, direction=d, controls=0
        )
    )


def patch_tops(model: LanguageModel, best: RankedSite, report: Sequence[PromptPair], seed: int) -> Both:
    """The first latents of the ranking, each alone at all positions, with controls beside them."""
    return both(lambda d: patch_latents(model, best.dictionary, report, best.ranking[:SHOWN], direction=d, seed=seed))


def curves(
    model: LanguageModel,
    best: RankedSite,
    report: Sequence[PromptPair],
    sizes: Sequence[int],
    statistics: LatentStatistics,
    seed: int,
) -> dict[PatchDirection, Curve]:
    """The first k latents together, with as many random and matched ones; for sizes that leave enough live ones."""
    alive = np.flatnonzero(statistics.alive.cpu().numpy())
    usable = [k for k in sizes if len(np.setdiff1d(alive, best.ranking[:k])) >= k]
    if not usable:
        raise UserError(
            f"only {len(alive)} latents of {best.dictionary.name} are ever active on the select prompts, too few for "
            "controls of any size: use more pairs, or other sizes"
        )
    return both(
        lambda d: effect_curve(
            model, best.dictionary, report, best.ranking, usable, statistics, seed, direction=d, progress=True
        )
    )


# Attribution against exact


@dataclass(frozen=True, eq=False)
class Agreement:
    """How far the estimates of one method agree with exact effects, on the nodes that any of the methods had run.

    `pearson` and `spearman` are of signed values (NaN for a method that gives sizes only), the others of sizes.
    """

    attribution: Attribution
    pearson: float
    spearman: float
    pearson_of_sizes: float
    spearman_of_sizes: float
    nodes: int

    @property
    def bound(self) -> tuple[int, int, float, int]:
        """What the method can have missed: among nodes that were not run, those as large as number k of its top.

        k, how many of its random draw are as large, the bound on how many more there are (95 %), and of how many.
        """
        verified = self.attribution.verified
        assert verified is not None
        k = max(1, verified.largest // 5)
        if not verified.sampled:  # all nodes there are were run
            return k, 0, 0.0, 0
        drawn, _, most = verified.missed(k)
        return k, drawn, most, verified.others - verified.sampled

    @property
    def correlations(self) -> tuple[float, float, float, float]:
        return self.pearson, self.spearman, self.pearson_of_sizes, self.spearman_of_sizes


def screen(
    model: LanguageModel,
    dictionary: Dictionary,
    report: Sequence[PromptPair],
    verify: int,
    sample: int,
    seed: int,
) -> list[Agreement]:
    """Attribute with every method, and compare all of them on the same nodes: those that any of them had checked."""
    attributions = [
        attribute(
            model, dictionary, report, method=method, verify=verify, sample=sample, seed=seed + number, progress=True
        )
        for number, method in enumerate(METHODS)  # each draws other nodes, so that the common sample is larger
    ]
    exact: dict[tuple[int, int, int], float] = {}
    for attribution in attributions:
        verified = attribution.verified
        assert verified is not None
        exact |= dict(zip(_nodes(attribution, verified.index), verified.exact.tolist(), strict=True))
    truth = np.array(list(exact.values()))
    agreements = []
    for attribution, method in zip(attributions, METHODS, strict=True):
        every = np.arange(len(attribution))
        estimates = dict(zip(_nodes(attribution, every), attribution.score.tolist(), strict=True))
        mine = np.array([estimates.get(node, 0.0) for node in exact])
        signed = (np.nan, np.nan) if isinstance(method, GradDrop) else _correlations(mine, truth)
        agreements.append(Agreement(attribution, *signed, *_correlations(np.abs(mine), np.abs(truth)), len(exact)))
    return agreements


def _nodes(attribution: Attribution, index: np.ndarray) -> list[tuple[int, int, int]]:
    columns = (attribution.pair, attribution.unit, attribution.position)
    return list(zip(*(column[index].tolist() for column in columns), strict=True))


def _correlations(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> tuple[float, float]:
    """Pearson's and Spearman's; NaN where there is nothing to correlate."""
    from scipy.stats import pearsonr, spearmanr

    if len(a) < 2 or not np.ptp(a) or not np.ptp(b):
        return float("nan"), float("nan")
    return float(pearsonr(a, b)[0]), float(spearmanr(a, b)[0])


# Other directions


@dataclass(frozen=True, eq=False)
class DirectionKind:
    """One kind of directions, ranked on half of `select`: what its first k do together on `report`."""

    name: str
    sizes: tuple[int, ...]
    effects: Both

    def __str__(self) -> str:
        """As part of a sentence."""
        return f"the {self.name}" if self.name == DENSE else self.name

    def at(self, k: int, direction: PatchDirection = "denoise", seed: int = 0) -> Interval | None:
        """The effect of the first `k`; None where there are not as many."""
        return self.effects[direction].of(self.sizes.index(k), seed) if k in self.sizes else None

    def beyond(self, other: "DirectionKind", k: int, direction: PatchDirection = "denoise", seed: int = 0) -> Interval:
        """How much more the first `k` do than the other's, prompt by prompt."""
        mine, others = (kind.effects[direction].change[:, kind.sizes.index(k)] for kind in (self, other))
        return bootstrap_ratio(mine - others, self.effects[direction].gap, seed=seed)


def compare_directions(
    model: LanguageModel,
    best: RankedSite,
    select: Sequence[PromptPair],
    report: Sequence[PromptPair],
    sizes: Sequence[int],
    first: frozenset[str] | None,
) -> list[DirectionKind]:
    """Latents, dimensions, principal components and the difference of means at equal numbers of directions.

    Single units of each are ranked on the half of `select` that latents are ranked on, by their own exact denoising
    effect, at all positions; the first k are one set for all prompts of `report`. `first` holds the answers on one side
    of a two-sided task.
    """
    site, most = best.site, max(sizes)
    ranked_on, chosen_on = halves(select)
    texts = [text for pair in ranked_on for text in (pair.clean, pair.corrupted)]
    values, _ = _held(model, site, texts)
    several: list[tuple[str, Component, Sequence[int]]] = [
        ("latents", LatentUnits(best.dictionary), best.ranking),
    ]
    others: list[tuple[str, Component]] = [
        ("residual dimensions", dimensions(site, model.width(site))),
        ("principal components", principal_components(values, min(values.shape[1], len(values) - 1), site)),
    ]
    for name, component in others:
        singles = patch_components(model, component, ranked_on, progress=True)
        several.append((name, component, [edit.units[0] for edit in singles.top(most)]))
    if (dense := mean_difference(model, site, ranked_on, chosen_on, first)) is not None:
        several.append((DENSE, dense, (0,)))
    kinds = []
    for name, component, ranking in several:
        usable = tuple(k for k in sizes if k <= len(ranking))
        edits = [Edit(site, tuple(ranking[:k]), kind=component.kind, role="top") for k in usable]
        if usable:
            kinds.append(DirectionKind(name, usable, _together(model, component, report, edits)))
    return kinds


def _together(model: LanguageModel, component: Component, report: Sequence[PromptPair], edits: Sequence[Edit]) -> Both:
    return both(lambda d: patch_components(model, component, report, edits, direction=d, progress=True))


def mean_difference(
    model: LanguageModel,
    site: Site,
    pairs: Sequence[PromptPair],
    chosen_on: Sequence[PromptPair],
    first: frozenset[str] | None,
) -> Directions | None:
    """The dense direction between two answers, or (where answers differ from pair to pair) from corrupted to clean.

    Taken over `pairs`, once at all ordinary positions and once at the last one; the one that restores more on
    `chosen_on` is kept.
    None where the means are the same.
    """
    sides = [
        (pair.clean, pair.corrupted) if first is None or pair.answer in first else (pair.corrupted, pair.clean)
        for pair in pairs
    ]
    a, b = (_held(model, site, [side[i] for side in sides]) for i in (0, 1))
    ratios: list[tuple[float, Directions]] = []
    for mine, other in zip(a, b, strict=True):
        try:
            direction = difference_of_means(mine, other, site)
        except UserError:  # the same mean: nothing has happened yet at the last position of an early layer
            continue
        ratios.append((float(patch_components(model, direction, chosen_on).ratios()[0]), direction))
    return max(ratios, key=lambda ratio: ratio[0])[1] if ratios else None


@torch.no_grad()
def _held(
    model: LanguageModel, site: Site, texts: Sequence[str]
) -> tuple[Float[Tensor, "positions width"], Float[Tensor, "texts width"]]:
    """What the site holds at all ordinary positions of the texts, and at the last of each."""
    everywhere, last = [], []
    for batch in model.tokenize(texts).batches(32):
        x = model.capture(batch, [site])[site].float()
        everywhere.append(x[batch.ordinary])
        last.append(x[torch.arange(len(batch), device=x.device), batch.last.to(x.device)])
    return torch.cat(everywhere), torch.cat(last)
