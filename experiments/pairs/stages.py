"""The stages of an experiment: maps, choice of a site, its latents, attribution, other directions."""

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
from saepatch.measure.patching import patch_components, patch_heads, patch_latents, patch_streams
from saepatch.measure.quality import LatentStatistics, splice_quality
from saepatch.measure.results.effects import Effects
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.sites import Site
from saepatch.records.statistics import Interval, bootstrap_ratio

from .question import StudyConfig

CHOOSE_BY = 16  # number of latents by whose joint effect the site is chosen
SHOWN = 12  # number of latents that are also patched one by one
DENSE = "difference of means"
METHODS: tuple[Method, ...] = (FirstOrder(), IntegratedGradients(), GradDrop())

Result = TypeVar("Result")
Both = Mapping[PatchDirection, Effects]


def both(run: Callable[[PatchDirection], Result]) -> dict[PatchDirection, Result]:
    """Results of `run` by direction."""
    return {direction: run(direction) for direction in PATCH_DIRECTIONS}


# Sites


def stream_effects(model: LanguageModel, pairs: Sequence[PromptPair], direction: PatchDirection) -> Effects:
    """Effect of every layer's output at every position."""
    return patch_streams(model, pairs, direction=direction, progress=True)


def has_heads(model: LanguageModel) -> bool:
    """Whether the family's layout offers the outputs of attention heads."""
    return "z" in model.layout.streams


def head_effects(model: LanguageModel, pairs: Sequence[PromptPair], direction: PatchDirection) -> Effects:
    """Effect of every attention head, at all positions."""
    return patch_heads(model, pairs, direction=direction, progress=True)


@dataclass(frozen=True, eq=False)
class SiteRanking:
    """Latents of a site, ranked on one half of `select` by their own denoising effect, and the effect of the first
    `CHOOSE_BY` of them together."""

    ranking: tuple[int, ...]
    chosen_by: Interval  # on the other half of select, which the ranking did not use
    report: Mapping[PatchDirection, Interval]
    ce_recovered: float


@dataclass(frozen=True, eq=False)
class RankedSite:
    """A site's dictionary with the ranking of its latents."""

    dictionary: Dictionary
    ranked: SiteRanking

    @property
    def site(self) -> Site:
        return self.dictionary.site

    @property
    def ranking(self) -> tuple[int, ...]:
        return self.ranked.ranking


def rank_site(
    model: LanguageModel,
    dictionary: Dictionary,
    select: Sequence[PromptPair],
    report: Sequence[PromptPair],
    most: int,
    seed: int,
) -> SiteRanking:
    """Rank the latents of a site, keep the first `most` of them, and patch the first `CHOOSE_BY` together.

    Latents are ranked and the site is chosen on different halves of `select`: on the pairs that a ranking was made on,
    its first latents look better than they are.
    """
    ranked_on, chosen_on = halves(select)
    prompts = model.tokenize([text for pair in select for text in (pair.clean, pair.corrupted)])
    singles = patch_latents(model, dictionary, ranked_on, progress=True)
    ranking = tuple(edit.units[0] for edit in singles.top(max(most, CHOOSE_BY)))
    first = [Edit(dictionary.site, ranking[:CHOOSE_BY], role="top")]
    on_report = _together(model, LatentUnits(dictionary), report, first)
    return SiteRanking(
        ranking,
        patch_components(model, dictionary, chosen_on, first).of(0, seed),
        {direction: effects.of(0, seed) for direction, effects in on_report.items()},
        _ce_recovered(model, dictionary, prompts),
    )


def halves(select: Sequence[PromptPair]) -> tuple[Sequence[PromptPair], Sequence[PromptPair]]:
    """The pairs of `select` that latents are ranked on, and those that the site is chosen on."""
    middle = (len(select) + 1) // 2
    return select[:middle], select[middle:]


def best_site(sites: Sequence[RankedSite]) -> RankedSite:
    """The site whose first latents restore most on the half of `select` that they were not ranked on."""
    return max(sites, key=lambda site: site.ranked.chosen_by.value)


def _ce_recovered(model: LanguageModel, dictionary: Dictionary, prompts: Tokens) -> float:
    """CE recovered as training measured it on held-out text of this model; else over the select prompts."""
    known = dictionary.metrics_on(model).get("ce_recovered")
    return splice_quality(model, dictionary, prompts).ce_recovered if known is None else known


# Latents of the chosen site


def by_position(
    model: LanguageModel, best: RankedSite, group: Sequence[PromptPair], direction: PatchDirection
) -> Effects:
    """Effects of the first latents of the ranking, each alone at every position."""
    return patch_latents(
        model, best.dictionary, group, best.ranking[:SHOWN], each_position=True, direction=direction, controls=0
    )


def patch_tops(
    model: LanguageModel, best: RankedSite, report: Sequence[PromptPair], seed: int, direction: PatchDirection
) -> Effects:
    """Effects of the first latents of the ranking, each alone at all positions, and of their controls."""
    return patch_latents(model, best.dictionary, report, best.ranking[:SHOWN], direction=direction, seed=seed)


def curve(
    model: LanguageModel,
    best: RankedSite,
    report: Sequence[PromptPair],
    sizes: Sequence[int],
    statistics: LatentStatistics,
    seed: int,
    direction: PatchDirection,
) -> Curve:
    """Effects of the first k latents together and of as many random and matched ones, for each k with enough live ones.

    Raises:
        UserError: there are too few live latents for controls of any size.
    """
    alive = np.flatnonzero(statistics.alive.cpu().numpy())
    usable = [k for k in sizes if len(np.setdiff1d(alive, best.ranking[:k])) >= k]
    if not usable:
        raise UserError(
            f"only {len(alive)} latents of {best.dictionary.name} are ever active on the select prompts, too few for "
            "controls of any size: use more pairs, or other sizes"
        )
    return effect_curve(
        model, best.dictionary, report, best.ranking, usable, statistics, seed, direction=direction, progress=True
    )


# Attribution against exact


@dataclass(frozen=True, eq=False)
class Agreement:
    """Correlations of one method's estimates with exact effects, over the nodes that any of the methods ran exactly.

    `pearson` and `spearman` are of signed values (NaN for a method that estimates magnitudes), the others of
    magnitudes.
    """

    attribution: Attribution
    pearson: float
    spearman: float
    pearson_of_sizes: float
    spearman_of_sizes: float
    nodes: int

    @property
    def bound(self) -> tuple[int, int, float, int]:
        """Bound on the nodes that the method missed: those with an exact effect as large as number k of its top.

        Returns k, the number of such nodes in the random sample, the upper bound (95 %) on their number among the
        nodes that were not run, and the number of nodes that were not run.
        """
        verified = self.attribution.verified
        assert verified is not None
        k = max(1, verified.largest // 5)
        if not verified.sampled:  # every node was run
            return k, 0, 0.0, 0
        drawn, _, most = verified.missed(k)
        return k, drawn, most, verified.others - verified.sampled

    @property
    def correlations(self) -> tuple[float, float, float, float]:
        return self.pearson, self.spearman, self.pearson_of_sizes, self.spearman_of_sizes


def attribute_by(
    model: LanguageModel, dictionary: Dictionary, report: Sequence[PromptPair], config: StudyConfig, number: int
) -> Attribution:
    """Estimates of one of `METHODS`, verified on a random sample of its own: together, the samples are larger."""
    verify, sample, seed = config.verify, config.sample, config.seed + number
    method = METHODS[number]
    return attribute(model, dictionary, report, method=method, verify=verify, sample=sample, seed=seed, progress=True)


def agreements(attributions: Sequence[Attribution]) -> list[Agreement]:
    """Compare all methods on the same nodes: those that any of them ran exactly."""
    exact: dict[tuple[int, int, int], float] = {}
    for attribution in attributions:
        verified = attribution.verified
        assert verified is not None
        exact |= dict(zip(_nodes(attribution, verified.index), verified.exact.tolist(), strict=True))
    truth = np.array(list(exact.values()))
    compared = []
    for attribution in attributions:
        every = np.arange(len(attribution))
        scores = dict(zip(_nodes(attribution, every), attribution.score.tolist(), strict=True))
        estimates = np.array([scores.get(node, 0.0) for node in exact])
        signed = (np.nan, np.nan) if attribution.sizes else _correlations(estimates, truth)
        compared.append(Agreement(attribution, *signed, *_correlations(np.abs(estimates), np.abs(truth)), len(exact)))
    return compared


def _nodes(attribution: Attribution, index: np.ndarray) -> list[tuple[int, int, int]]:
    columns = (attribution.pair, attribution.unit, attribution.position)
    return list(zip(*(column[index].tolist() for column in columns), strict=True))


def _correlations(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> tuple[float, float]:
    """Pearson's and Spearman's correlations; NaN where one of the sides is constant."""
    from scipy.stats import pearsonr, spearmanr

    if len(a) < 2 or not np.ptp(a) or not np.ptp(b):
        return float("nan"), float("nan")
    return float(pearsonr(a, b)[0]), float(spearmanr(a, b)[0])


# Other directions


@dataclass(frozen=True, eq=False)
class DirectionKind:
    """One kind of directions, ranked on half of `select`, and the effects of its first k together on `report`.

    `sizes` is empty where there is no such direction.
    """

    name: str
    sizes: tuple[int, ...]
    effects: Both

    def __str__(self) -> str:
        """The name as part of a sentence."""
        return f"the {self.name}" if self.name == DENSE else self.name

    def at(self, k: int, direction: PatchDirection = "denoise", seed: int = 0) -> Interval | None:
        """The effect of the first `k`; None where there are fewer."""
        return self.effects[direction].of(self.sizes.index(k), seed) if k in self.sizes else None

    def beyond(self, other: "DirectionKind", k: int, direction: PatchDirection = "denoise", seed: int = 0) -> Interval:
        """The effect of the first `k` minus that of the other kind's, paired by prompt."""
        mine, others = (kind.effects[direction].change[:, kind.sizes.index(k)] for kind in (self, other))
        return bootstrap_ratio(mine - others, self.effects[direction].gap, seed=seed)


Ranked = tuple[Component, Sequence[int]]


@dataclass(frozen=True, eq=False)
class DirectionComparison:
    """Latents, dimensions, principal components and the difference of means, at equal numbers of directions.

    Single units of each kind are ranked on the half of `select` that latents are ranked on, by their own exact
    denoising effect, at all positions; the first k are one set for all prompts of `report`. `first` holds the answers
    on one side of a two-sided task.
    """

    model: LanguageModel
    best: RankedSite
    select: Sequence[PromptPair]
    report: Sequence[PromptPair]
    sizes: Sequence[int]
    first: frozenset[str] | None

    @property
    def kinds(self) -> Mapping[str, Callable[[], Ranked | None]]:
        """How units of each kind are made and ranked; None: there is no such direction."""
        return {
            "latents": lambda: (LatentUnits(self.best.dictionary), self.best.ranking),
            "residual dimensions": lambda: self._ranked(dimensions(self.best.site, self.model.width(self.best.site))),
            "principal components": lambda: self._ranked(self._principal_components()),
            DENSE: self._dense,
        }

    def measure(self, name: str) -> DirectionKind:
        """Patch the first k of a kind together, for every size that there are enough for."""
        ranked = self.kinds[name]()
        if ranked is None:
            return DirectionKind(name, (), {})
        component, ranking = ranked
        usable = tuple(k for k in self.sizes if k <= len(ranking))
        edits = [Edit(self.best.site, tuple(ranking[:k]), kind=component.kind, role="top") for k in usable]
        return DirectionKind(name, usable, _together(self.model, component, self.report, edits) if usable else {})

    def _ranked(self, component: Component) -> Ranked:
        singles = patch_components(self.model, component, halves(self.select)[0], progress=True)
        return component, [edit.units[0] for edit in singles.top(max(self.sizes))]

    def _principal_components(self) -> Directions:
        texts = [text for pair in halves(self.select)[0] for text in (pair.clean, pair.corrupted)]
        values, _ = site_values(self.model, self.best.site, texts)
        return principal_components(values, min(values.shape[1], len(values) - 1), self.best.site)

    def _dense(self) -> Ranked | None:
        dense = mean_difference(self.model, self.best.site, *halves(self.select), self.first)
        return None if dense is None else (dense, (0,))


def _together(model: LanguageModel, component: Component, report: Sequence[PromptPair], edits: Sequence[Edit]) -> Both:
    return both(lambda d: patch_components(model, component, report, edits, direction=d, progress=True))


def mean_difference(
    model: LanguageModel,
    site: Site,
    pairs: Sequence[PromptPair],
    chosen_on: Sequence[PromptPair],
    first: frozenset[str] | None,
) -> Directions | None:
    """The difference of means between the two answers, or (where answers vary by pair) from corrupted to clean.

    Means are taken over `pairs`, once over all ordinary positions and once over last positions; the direction that
    restores more on `chosen_on` is returned. None where the means are equal.
    """
    sides = [
        (pair.clean, pair.corrupted) if first is None or pair.answer in first else (pair.corrupted, pair.clean)
        for pair in pairs
    ]
    a, b = (site_values(model, site, [side[i] for side in sides]) for i in (0, 1))
    ratios: list[tuple[float, Directions]] = []
    for mine, other in zip(a, b, strict=True):
        try:
            direction = difference_of_means(mine, other, site)
        except UserError:  # equal means, as at the last position of an early layer
            continue
        ratios.append((float(patch_components(model, direction, chosen_on).ratios()[0]), direction))
    return max(ratios, key=lambda ratio: ratio[0])[1] if ratios else None


@torch.no_grad()
def site_values(
    model: LanguageModel, site: Site, texts: Sequence[str]
) -> tuple[Float[Tensor, "positions width"], Float[Tensor, "texts width"]]:
    """The site's values at all ordinary positions of the texts, and at the last position of each."""
    everywhere, last = [], []
    for batch in model.tokenize(texts).batches(32):
        x = model.capture(batch, [site])[site].float()
        everywhere.append(x[batch.ordinary])
        last.append(x[torch.arange(len(batch), device=x.device), batch.last.to(x.device)])
    return torch.cat(everywhere), torch.cat(last)
