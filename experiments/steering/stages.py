"""Measurements of the steering experiment: methods of steering, at equal norm and at equal divergence."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.errors import UserError
from saepatch.measure.baselines import difference_of_means
from saepatch.measure.controls import random_latents
from saepatch.measure.quality import LatentStatistics
from saepatch.model.language_model import LanguageModel
from saepatch.records.statistics import Interval, bootstrap_mean, bootstrap_ratio, wilson_share
from saepatch.splicing.interventions import Intervention, SteerAtNorm
from saepatch.splicing.splice import splice, whole_prompt
from saepatch.steering.contrasts import (
    attribution_contrast,
    auroc_contrast,
    contrast,
    first_alive,
    output_scores,
    refine,
)
from saepatch.steering.degenerate import is_degenerate
from saepatch.steering.fluency import continuation_kl, distinct, repetition
from saepatch.steering.generate import Concept, direction_dictionary, equal_norm_steer, generate_steered

from ..common.kept import KeptValues

CANDIDATES = 40  # number of latents whose output scores are measured
NEUTRAL = 4  # number of prompts they are measured on
SPARE = 4  # spare random latents per draw, for draws that cannot reach a divergence
UNSTEERED, RANDOM, DENSE, PROMPTING = "unsteered", "random latent", "difference of means", "prompting"
CONTRASTS: Mapping[str, Callable[..., Float[Tensor, "d_sae"]]] = {
    "mean difference": contrast,
    "AUROC": auroc_contrast,
    "attribution": attribution_contrast,
}
REFINED = "mean difference, refined by output score"


@dataclass(frozen=True, eq=False)
class KnownDictionary:
    """A dictionary with the statistics of its latents over the reference texts.

    With `largest`, latents are measured by their largest activation, or else by the 0.95 quantile of the positive ones.
    """

    dictionary: Dictionary
    statistics: LatentStatistics
    largest: bool = False

    @property
    def units(self) -> Float[Tensor, "d_sae"]:
        """Activation that stands for each latent."""
        return self.statistics.maximum if self.largest else self.statistics.unit

    def unit(self, latent: int) -> float:
        """Norm of the perturbation by one latent at that activation."""
        return float((self.statistics.reach if self.largest else self.statistics.unit_reach)[latent])


@dataclass(frozen=True, eq=False)
class Way:
    """A method of steering: sets of latents (several sets are draws of one kind) that move the site by a given norm.

    `spare` has further draws, which replace sets that cannot reach a divergence.
    """

    name: str
    dictionary: Dictionary
    sets: tuple[tuple[int, ...], ...]
    units: Float[Tensor, "d_sae"]
    positions: str
    spare: tuple[tuple[int, ...], ...] = ()
    fade: float | None = None  # share of the strength lost with a generated token, the site's norm kept; None: neither

    def only(self, latents: tuple[int, ...]) -> "Way":
        return replace(self, sets=(latents,), spare=())

    def steer(self, draw: int, norm: float) -> Intervention:
        steer = equal_norm_steer(self.dictionary, self.sets[draw], self.units, norm, positions=self.positions)
        if self.fade is None:
            return steer
        return SteerAtNorm(steer.latents, steer.strength, steer.unit, steer.positions, fade=self.fade)


@dataclass(frozen=True, eq=False)
class Point:
    """Results of one method at one strength: measurements of each draw on the same prompts.

    `norm` is the norm of the perturbation, in units of the first latent's (`KnownDictionary.unit`). Values per prompt
    are means over draws.
    """

    way: str
    norm: float
    draws: tuple[Mapping[str, Any], ...]

    def _mean(self, values: Callable[[Mapping[str, Any]], Sequence[float]]) -> Float[np.ndarray, "prompts"]:
        return np.mean([np.array(values(draw), dtype=float) for draw in self.draws], 0)

    @cached_property
    def shown(self) -> Float[np.ndarray, "prompts"]:
        """Whether each prompt's continuation shows the concept."""
        return self._mean(lambda draw: draw["shown"])

    @property
    def success(self) -> Interval:
        return wilson_share(self.shown)

    @property
    def degenerate(self) -> Interval:
        return wilson_share(self._mean(lambda draw: [is_degenerate(text) for text in draw["texts"]]))

    @cached_property
    def perplexity(self) -> Interval:
        """Perplexity under the unsteered model, over the tokens of all prompts and draws."""
        nll, tokens = (self._mean(lambda draw, k=k: draw[k]) for k in ("nll", "tokens"))  # type: ignore[misc]
        if not tokens.sum():
            return Interval.withheld(math.nan, 0, "no tokens")
        ratio = bootstrap_ratio(nll, tokens)
        value, low, high = (math.exp(min(each, 700)) for each in (ratio.value, ratio.low, ratio.high))
        return Interval(value, low, high, ratio.n, ratio.reason)

    def _over_texts(self, value: Callable[[Sequence[int]], float]) -> Interval:
        each = np.array([[value(ids) for ids in draw["ids"]] for draw in self.draws], dtype=float)
        there = ~np.isnan(each)
        sums, count = np.where(there, each, 0).sum(0), there.sum(0)
        return bootstrap_mean(np.where(count > 0, sums / np.maximum(count, 1), np.nan))

    def distinct(self, n: int) -> Interval:
        return self._over_texts(lambda ids: distinct(ids, n))

    @property
    def repetition(self) -> Interval:
        return self._over_texts(repetition)

    @cached_property
    def kl(self) -> Interval:
        """KL(model ‖ steered) of the predictions over the unsteered continuations, in nats per token."""
        if any(draw["kl"] is None for draw in self.draws):
            return Interval.withheld(math.nan, 0, "not measured")
        return bootstrap_mean(self._mean(lambda draw: [math.nan if v is None else v for v in draw["kl"]]))

    @property
    def texts(self) -> Sequence[str]:
        """Continuations of the first draw."""
        return self.draws[0]["texts"]


@dataclass(frozen=True, eq=False)
class Bench:
    """Measurements of one concept in one model; those already kept are not repeated."""

    model: LanguageModel
    concept: Concept
    kept: KeptValues
    new_tokens: int
    limit: float  # largest perplexity, relative to that without steering
    tick: Callable[[], None]

    def prompts(self, split: str) -> tuple[str, ...]:
        return self.concept.tune if split == "tune" else self.concept.report

    def _name(self, *parts: object) -> str:
        return "/".join(map(str, (self.concept.name, *parts)))

    def _judged(self, *name: object, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A measurement with the concept's judgements, which are not kept, so that the judge may change."""
        kept = self.kept.get(self._name(*name), measure)
        return {**kept, "shown": [self.concept.shown(text) for text in kept["texts"]]}

    def unsteered(self, split: str) -> Point:
        run = self._judged(UNSTEERED, split, measure=lambda: self._run(split, None, None, divergence=False))
        return Point(UNSTEERED, 0.0, (run,))

    def prompting(self, split: str, prefix: str) -> Point:
        run = self._judged(
            PROMPTING, split, prefix, measure=lambda: self._run(split, None, None, prefix, divergence=False)
        )
        return Point(PROMPTING, 0.0, (run,))

    def at(self, way: Way, norm: float, unit: float, split: str, divergence: bool = True) -> Point:
        """Generate with a method at a norm in units of `unit`: every draw on all prompts of the split."""
        draws = []
        for draw in range(len(way.sets)):
            steer = way.steer(draw, norm * unit)
            what = (way.dictionary.site, way.name, ",".join(map(str, way.sets[draw])), split, f"{norm * unit:.8g}")
            run = partial(self._run, split, way.dictionary, steer, divergence=divergence)
            draws.append(self._judged(*what, divergence, measure=run))
        return Point(way.name, norm, tuple(draws))

    def divergence(self, way: Way, norm: float) -> float:
        """Mean divergence on `tune` of a method's first draw at a norm."""
        name = self._name(way.dictionary.site, way.name, ",".join(map(str, way.sets[0])), "kl", f"{norm:.8g}")

        def measure() -> float:
            self.tick()
            return float(np.nanmean(self._kl("tune", way.dictionary, way.steer(0, norm))))

        return float(self.kept.get(name, measure))

    def _run(
        self,
        split: str,
        dictionary: Dictionary | None,
        steer: Intervention | None,
        prefix: str = "",
        divergence: bool = True,
    ) -> dict[str, Any]:
        self.tick()
        prompts = self.prompts(split)
        out = generate_steered(self.model, dictionary, prompts, steer, self.concept.shown, self.new_tokens, prefix)
        kl = None
        if divergence and dictionary is not None and steer is not None:
            kl = [None if math.isnan(value) else value for value in self._kl(split, dictionary, steer)]
        return {
            "texts": out.texts,
            "ids": out.ids,
            "nll": out.nll,
            "tokens": [len(ids) for ids in out.ids],
            "kl": kl,
        }

    def _kl(self, split: str, dictionary: Dictionary, steer: Intervention) -> list[float]:
        own = self.unsteered(split).draws[0]["ids"]
        return continuation_kl(self.model, splice(self.model, dictionary, steer), self.prompts(split), own)

    # Choices, all made on `tune`

    def fluent(self, point: Point) -> bool:
        """Whether a point of `tune` is within the limit on perplexity."""
        return point.perplexity.value <= self.limit * self.unsteered("tune").perplexity.value

    def best(self, points: Sequence[Point]) -> Point:
        """The point with most success (of equal ones, the lowest perplexity) within the limit on perplexity."""
        fluent = [point for point in points if self.fluent(point)]
        if not fluent:
            return min(points, key=lambda point: point.norm)
        return max(fluent, key=lambda point: (point.success.value, -point.perplexity.value))

    def solve(self, way: Way, target: float, unit: float, strengths: Sequence[float]) -> float:
        """The norm, in units of `unit`, at which a method's first draw has the target divergence on `tune`; NaN if none
        has."""
        low, high = min(strengths) * unit / 8, max(strengths) * unit * 8
        if not self.divergence(way, low) < target < self.divergence(way, high):
            return math.nan
        norm = math.sqrt(low * high)
        for _ in range(12):
            here = self.divergence(way, norm)
            if abs(math.log(max(here, 1e-12) / target)) < 0.05:
                break
            low, high = (norm, high) if here < target else (low, norm)
            norm = math.sqrt(low * high)
        return norm / unit

    def at_divergence(self, way: Way, target: float, unit: float, strengths: Sequence[float]) -> Point | None:
        """On `report`, each draw at the norm that gives it the target divergence on `tune`; None if none reaches it.

        Spare draws replace those that do not reach it, while there are any, so the point may have fewer draws.
        """
        there: list[tuple[Way, float]] = []
        for latents in (*way.sets, *way.spare):
            norm = self.solve(way.only(latents), target, unit, strengths)
            if not math.isnan(norm):
                there.append((way.only(latents), norm))
            if len(there) == len(way.sets):
                break
        if not there:
            return None
        points = [self.at(each, norm, unit, "report") for each, norm in there]
        return Point(way.name, float(np.mean([p.norm for p in points])), tuple(p.draws[0] for p in points))


# Methods of steering


def top(bench: Bench, site: KnownDictionary, order: Sequence[int], k: int) -> Way:
    chosen = tuple(order[:k])
    return Way(f"top-{k}", site.dictionary, (chosen,), site.units, bench.concept.positions)


def random_way(bench: Bench, site: KnownDictionary, order: Sequence[int], draws: int, seed: int) -> Way:
    drawn = random_latents(site.statistics.alive, order[:CANDIDATES], 1, (1 + SPARE) * draws, seed)
    sets = drawn[:draws]
    spare = [latents for latents in dict.fromkeys(drawn[draws:]) if latents not in sets]
    return Way(RANDOM, site.dictionary, tuple(sets), site.units, bench.concept.positions, tuple(spare))


@torch.no_grad()
def dense(bench: Bench, dictionary: Dictionary) -> Way:
    """The direction from the site's mean without the concept to its mean with it."""
    at = dictionary.site
    held = []
    for texts in (bench.concept.present, bench.concept.absent):
        values = []
        for part in bench.model.tokenize(texts).batches(32):
            x = bench.model.capture(part, [at])[at]
            values.append(x[whole_prompt(bench.model, part).select(bench.concept.positions)])
        held.append(torch.cat(values))
    vector = direction_dictionary(difference_of_means(held[0], held[1], at), dictionary.W_dec.device)
    ones = torch.ones(1, device=dictionary.W_dec.device)
    return Way(DENSE, vector, ((0,),), ones, bench.concept.positions)


def orders(bench: Bench, site: KnownDictionary, k: int) -> dict[str, list[int]]:
    """The first latents, at least `k`, of each ranking."""
    concept, many = bench.concept, max(CANDIDATES, k)
    many = min(many, int(site.statistics.alive.sum()))
    given = (bench.model, site.dictionary, concept.present, concept.absent, concept.positions)
    ranked: dict[str, list[int]] = {}
    for name, score in CONTRASTS.items():
        try:
            ranked[name] = first_alive(score(*given), site.statistics, many)
        except UserError:  # equal predictions after both sets of prompts: nothing to attribute
            if name != "attribution":
                raise
    candidates = ranked["mean difference"]
    scores = output_scores(
        bench.model,
        site.dictionary,
        candidates,
        site.units,
        concept.tune[:NEUTRAL],
        1.5,
        concept.positions,
    )
    ranked[REFINED] = refine(candidates, scores, max(min(k, many), many // 2))
    return ranked


Choice = tuple[float, float]  # success at the best strengths, and over all strengths: larger is better


def _choice(tried: Sequence[Sequence[Point]], best: Sequence[Point]) -> Choice:
    return (
        float(np.mean([point.success.value for point in best])),
        float(np.mean([point.success.value for points in tried for point in points])),
    )


def _try(
    bench: Bench, site: KnownDictionary, order: Sequence[int], sizes: Sequence[int], strengths: Sequence[float]
) -> tuple[Choice, list[Point]]:
    """How well a ranking steers on `tune`, averaged over sizes, and the best point of each size."""
    unit = site.unit(order[0])
    tried = [
        [bench.at(top(bench, site, order, k), s, unit, "tune", divergence=False) for s in strengths] for k in sizes
    ]
    best = [bench.best(points) for points in tried]
    return _choice(tried, best), best


def choose_site(
    bench: Bench, sites: Sequence[KnownDictionary], sizes: Sequence[int], strengths: Sequence[float]
) -> tuple[KnownDictionary, dict[str, list[Point]]]:
    """The site where latents ranked by mean difference steer best, averaged over sizes; and each site's best points."""
    concept, tried = bench.concept, []
    for site in sites:
        scores = contrast(bench.model, site.dictionary, concept.present, concept.absent, concept.positions)
        order = first_alive(scores, site.statistics, max(sizes))
        tried.append(_try(bench, site, order, sizes, strengths))
    best = max(range(len(sites)), key=lambda number: tried[number][0])
    return sites[best], {str(site.dictionary.site): points for site, (_, points) in zip(sites, tried, strict=True)}


def choose_order(
    bench: Bench, site: KnownDictionary, sizes: Sequence[int], longest: int, strengths: Sequence[float]
) -> tuple[str, list[int], dict[str, list[Point]]]:
    """The name of the ranking that steers best, averaged over sizes; its latents, at least `longest`; and the best
    points of each ranking."""
    ranked = orders(bench, site, longest)
    tried = {name: _try(bench, site, order, sizes, strengths) for name, order in ranked.items()}
    name = max(tried, key=lambda name: tried[name][0])
    return name, ranked[name], {name: points for name, (_, points) in tried.items()}
