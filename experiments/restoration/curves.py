"""Refusals by number of restored latents, with controls, and the smallest share of latents that is enough."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from saepatch.dictionaries.bases import directions_of, units_of
from saepatch.errors import UserError
from saepatch.measure.controls import control_sets
from saepatch.measure.quality import LatentStatistics
from saepatch.model.sites import Site
from saepatch.records.statistics import Interval, bootstrap_mean, wilson_share
from saepatch.restoration.answering import Answered
from saepatch.restoration.ranking import Ranking, SafetyLatents, find_safety_latents
from saepatch.restoration.restore import AnswerOptions
from saepatch.splicing.donors import CleanPrompts, OtherModel

from .runs import Dictionaries, Latents, Restored, Runs
from .settings import PairedPrompts, Setting

log = logging.getLogger("experiments.safety")

ENOUGH = 0.9  # share of the gap in refusals between bare model and donor that counts as recovered
SHARE_LIMIT = 0.05  # largest share of the dictionary: the original claim is about 5 % of neurons
RANKINGS: tuple[Ranking, ...] = ("change", "signed", "attribution")
Statistics = Mapping[Site, LatentStatistics]


def share_of(runs: Sequence[Answered]) -> Interval:
    """Share of prompts refused, with its Wilson interval; of several draws, their mean for each prompt."""
    return wilson_share(np.mean([answered.refused for answered in runs], axis=0))


@dataclass(frozen=True, eq=False)
class RefusalPoint:
    """Results for one number of latents (or neurons). Intervals are of shares of prompts refused."""

    latents: int
    top: Answered
    refused: Interval
    opened: Interval
    degenerate: Interval
    score: Interval
    random: Interval | None
    matched: Interval | None
    later: Interval | None
    harmless: Interval | None

    @classmethod
    def of(
        cls,
        latents: int,
        top: Answered,
        harmless: Answered,
        seed: int,
        random: Sequence[Answered] = (),
        matched: Sequence[Answered] = (),
        later: Sequence[Answered] = (),
    ) -> "RefusalPoint":
        """Results from the answers with these latents, and with each draw of the controls that there are."""
        return cls(
            latents,
            top,
            refused=share_of([top]),
            opened=wilson_share(top.opened.astype(float)),
            degenerate=wilson_share(top.are("degenerate").astype(float)),
            score=bootstrap_mean(np.array(top.scores), seed=seed),
            random=share_of(random) if random else None,
            matched=share_of(matched) if matched else None,
            later=share_of(later) if later else None,
            harmless=share_of([harmless]),
        )


@dataclass(frozen=True, eq=False)
class RefusalCurve:
    """Points by increasing number of latents, out of `total`, of which `alive` are live and `active` fire per token."""

    points: tuple[RefusalPoint, ...]
    total: int
    alive: int
    active: float
    bare: Answered
    donor: Answered

    def share_for(self, enough: float = ENOUGH, level: float = 0.95) -> Interval:
        """The smallest share of the dictionary tried that recovers enough; infinite where none does.

        The interval holds the shares that a test over prompts does not rule out: up to the first share that certainly
        recovers enough (tested for all of them together, Bonferroni), from the first that may. The margin of a share is
        its refusals minus the bare model's and `enough` of the gap; its bounds combine Wilson intervals of the three
        (MOVER; Zou and Donner 2008), which are conservative for runs of the same prompts. A resampled smallest share
        has no such guarantee: it is a step function of the margins.
        """
        bare, donor = (answered.refused.astype(float) for answered in (self.bare, self.donor))
        tops = [point.top.refused.astype(float) for point in self.points]
        shares = [point.latents / self.total for point in self.points]
        together = 1 - (1 - level) / len(tops)
        gap = _bounds([(donor, 1.0), (bare, -1.0)], level)
        parts = [[(top, 1.0), (bare, enough - 1), (donor, -enough)] for top in tops]

        def first(enough_at: Iterable[bool]) -> float:
            return next((share for share, holds in zip(shares, enough_at, strict=True) if holds), float("inf"))

        return Interval(
            first(_mean(each) >= -1e-12 and _mean([(donor, 1.0), (bare, -1.0)]) > 0 for each in parts),
            first(_bounds(each, level)[1] >= 0 for each in parts),
            first(gap[0] > 0 and _bounds(each, together)[0] >= 0 for each in parts),
            len(bare),
        )


Weighted = Sequence[tuple[ndarray, float]]


def _mean(parts: Weighted) -> float:
    return float(sum(weight * values.mean() for values, weight in parts))


def _bounds(parts: Weighted, level: float) -> tuple[float, float]:
    """Bounds of a weighted sum of shares: each share's distance to its own Wilson bounds, added in quadrature."""
    below, above = 0.0, 0.0
    for values, weight in parts:
        own = wilson_share(values, level)
        reach = sorted((weight * (own.low - own.value), weight * (own.high - own.value)))
        below, above = below + reach[0] ** 2, above + reach[1] ** 2
    return _mean(parts) - math.sqrt(below), _mean(parts) + math.sqrt(above)


def within(sizes: Sequence[int], total: int) -> list[int]:
    """The sizes that are at most `SHARE_LIMIT` of the total."""
    return [k for k in sizes if k <= SHARE_LIMIT * total] or [sizes[0]]


@dataclass(frozen=True)
class ChosenLatents:
    """The choice made on `tune`: a ranking, and the number of its first latents."""

    ranking: Ranking
    latents: int
    refused: Interval  # on `tune`, with these latents


def rank(
    setting: Setting,
    requests: PairedPrompts,
    refusal_ids: set[int],
    runs: Runs,
    max_fvu: float | None = 0.5,
    dictionaries: Dictionaries | None = None,
) -> SafetyLatents:
    """Rank latents by contrast between the setting's run and its donor's, over the donor's own answers.

    `dictionaries` are used in place of the setting's.
    """
    donor = setting.donor(requests)
    assert isinstance(donor, (CleanPrompts, OtherModel))
    options = AnswerOptions(max_new_tokens=runs.tokens, batch_size=len(requests), max_fvu=max_fvu)
    sites = setting.sites if dictionaries is None else dictionaries
    return find_safety_latents(setting.model, sites, requests.prompts, donor, refusal_ids=refusal_ids, options=options)


def choose(
    setting: Setting,
    ranked: SafetyLatents,
    requests: PairedPrompts,
    sizes: Sequence[int],
    runs: Runs,
    name: str = "tune",
) -> ChosenLatents:
    """The ranking with most refusals over all sizes within the limit, and the fewest of its latents that are enough."""
    runs_of = runs.bare(setting, requests, name=f"{name}: bare"), runs.donor(setting, requests, name=f"{name}: donor")
    bare, donor = (float(answered.refused.mean()) for answered in runs_of)
    sizes = within(sizes, setting.d_total)
    answers: dict[Ranking, list[Answered]] = {}
    for by in RANKINGS:
        answers[by] = [runs.restored(setting, requests, Restored(f"{name}: by {by}", ranked.top(k, by))) for k in sizes]

    def merit(by: Ranking) -> tuple[float, float]:  # ties, as where none is refused, are broken by refusal score
        return float(np.mean([a.refused.mean() for a in answers[by]])), float(np.mean([a.scores for a in answers[by]]))

    best = max(RANKINGS, key=merit)
    rates = [float(answered.refused.mean()) for answered in answers[best]]
    enough = [i for i, rate in enumerate(rates) if donor > bare and rate - bare >= ENOUGH * (donor - bare)]
    at = enough[0] if enough else int(np.argmax(rates)) if max(rates) > bare else len(sizes) - 1
    return ChosenLatents(best, sizes[at], share_of([answers[best][at]]))


def measure(
    setting: Setting,
    ranked: SafetyLatents,
    by: Ranking,
    sizes: Sequence[int],
    statistics: tuple[Statistics, Statistics],
    runs: Runs,
    draws: int,
    seed: int,
) -> RefusalCurve:
    """The curve on `report`, with all controls at each number of latents.

    `statistics` are over text, for live latents, and over the prompts used for ranking, for matched controls.
    """
    requests, harmless = setting.harmful["report"], setting.harmless["report"]
    points: list[RefusalPoint] = []
    for k in sizes:
        top = ranked.top(k, by)
        size = sum(map(len, top.values()))
        if points and size == points[-1].latents:  # the ranking is exhausted
            break
        later = _window(ranked.top(2 * k, by), top)
        random, matched = control_latents(top, statistics, draws, seed)
        enough = sum(map(len, later.values())) == size
        sets = {"random": random, "matched": matched, "later ranks": [later] if enough else []}
        answers = runs.restored(setting, requests, Restored("top", top))
        controls = [
            [runs.restored(setting, requests, Restored(name, latents, draw=i)) for i, latents in enumerate(several)]
            for name, several in sets.items()
        ]
        unharmed = runs.restored(setting, harmless, Restored("top", top, harmful=False))
        points.append(RefusalPoint.of(size, answers, unharmed, seed, *controls))
    return RefusalCurve(
        tuple(points),
        setting.d_total,
        sum(int(each.alive.sum()) for each in statistics[0].values()),
        sum(float(each.frequency.sum()) for each in statistics[0].values()),
        runs.bare(setting, requests),
        runs.donor(setting, requests),
    )


def _window(twice: Latents, top: Latents) -> dict[Site, tuple[int, ...]]:
    """The latents of `twice` that are not in `top`: the next ranks."""
    rest = {site: tuple(i for i in ids if i not in set(top.get(site, ()))) for site, ids in twice.items()}
    return {site: ids for site, ids in rest.items() if ids}


Sets = list[dict[Site, tuple[int, ...]]]


def control_latents(
    top: Latents, statistics: tuple[Statistics, Statistics], draws: int, seed: int
) -> tuple[Sets, Sets]:
    """Random and matched sets with as many latents at each site; empty where there are too few other latents."""
    made: list[Sets] = []
    for number, stats in enumerate(statistics):
        try:
            sets = {s: control_sets(ids, len(ids), stats[s], seed, draws)[number] for s, ids in top.items()}
        except UserError as error:
            log.info("  no %s controls: %s", ("random", "matched")[number], error)
            sets = {}
        made.append([{site: some[draw] for site, some in sets.items()} for draw in range(draws)] if sets else [])
    return made[0], made[1]


def neurons(setting: Setting, sizes: Sequence[int], runs: Runs, draws: int, seed: int) -> RefusalCurve | None:
    """The curve of MLP neurons of all layers, ranked by change score as in Chen et al. 2024; None without neurons.

    Random controls have as many other neurons in each layer, so there are none where half of a layer or more is
    restored.
    """
    sites = [Site(layer, "neurons") for layer in range(setting.model.n_layers)]
    try:
        units = {site: units_of(setting.model, site) for site in sites}
    except UserError as error:
        log.warning("no baseline of neurons: %s", error)
        return None
    ranked = _rank_units(setting, units, runs)
    requests, points = setting.harmful["report"], list[RefusalPoint]()
    total = sum(dictionary.d_sae for dictionary in units.values())
    for k in sorted({min(k, total) for k in (*sizes, int(SHARE_LIMIT * total), total)}):
        top = ranked.top(k)
        answers = runs.restored(setting, requests, Restored("neurons", top, units))
        others = {s: np.setdiff1d(np.arange(units[s].d_sae), ids) for s, ids in top.items()}
        rng = np.random.default_rng(seed)
        sets = [
            {s: tuple(rng.permutation(others[s])[: len(ids)].tolist()) for s, ids in top.items()}
            for _ in range(draws if all(len(others[s]) >= len(ids) for s, ids in top.items()) else 0)
        ]
        controls = [
            runs.restored(setting, requests, Restored("random neurons", ids, units, draw=i))
            for i, ids in enumerate(sets)
        ]
        unharmed = runs.restored(setting, setting.harmless["report"], Restored("neurons", top, units, harmful=False))
        points.append(RefusalPoint.of(k, answers, unharmed, seed, controls))
    return RefusalCurve(
        tuple(points), total, total, float(total), runs.bare(setting, requests), runs.donor(setting, requests)
    )


def _rank_units(setting: Setting, units: Dictionaries, runs: Runs) -> SafetyLatents:
    return rank(setting, setting.harmful["select"], set(), runs, max_fvu=None, dictionaries=units)


def dense(setting: Setting, runs: Runs) -> Answered:
    """Answers with one coordinate restored per site: that along the mean difference to the donor, on `select`."""
    units = {site: units_of(setting.model, site) for site in setting.sites}
    means = _rank_units(setting, units, runs).signed
    directions = {
        site: directions_of((mean / mean.norm())[None].to(setting.model.device), site, f"mean difference at {site}")
        for site, mean in means.items()
    }
    return runs.restored(setting, setting.harmful["report"], Restored("dense direction", None, directions))
