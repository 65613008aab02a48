"""Stage "steering": one latent, several, the dense difference of means, a prompt and a one-token prefix.

Strengths are norms of the perturbation in units of the median norm of the site at ordinary positions, since the largest
activation of a latent may be that of a massive activation. Latents steer together in proportion to their mean
activations where they are active.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.measure.controls import random_latents
from saepatch.measure.quality import latent_statistics
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site
from saepatch.records.statistics import Interval, bootstrap_mean
from saepatch.steering.contrasts import contrast, first_alive, output_scores, refine
from saepatch.steering.generate import Concept

from ...common.kept import KeptResults
from ...steering.stages import PROMPTING, RANDOM, Bench, Point, Way, dense
from ..settings import RealConfig
from .dictionaries import first_rows
from .texts import ONE_TOKEN_PREFIXES

SEVERAL = 8  # latents that steer together
ONE_LATENT, SEVERAL_LATENTS, ONE_TOKEN = "one latent", f"{SEVERAL} latents", "one-token prefix"
CANDIDATES = 24  # latents whose output scores are measured
STRENGTHS = (0.0625, 0.125, 0.25, 0.5, 1.0)
LIMIT = 10.0  # largest perplexity on `tune`, relative to that without steering, of a strength that may be chosen


@dataclass(frozen=True, eq=False)
class RankedLatents:
    """A site's latents for a concept, best first, and random ones; the weights with which latents steer together, and
    the unit of strength (the site's median norm)."""

    latents: tuple[int, ...]
    random: tuple[int, ...]
    weights: Float[np.ndarray, "d_sae"]
    unit: float


@dataclass(frozen=True, eq=False)
class SteeredConcept:
    """Results of one concept on `report`, each method at the strength that was best on `tune`.

    `prefixes` are the prompt and the one-token prefix, each chosen on `tune`.
    """

    name: str
    site: str
    latents: tuple[int, ...]
    unsteered: Point
    chosen: Mapping[str, Point]
    prefixes: Mapping[str, str]

    @property
    def reached(self) -> bool:
        """Whether some method makes the model show the concept."""
        return any(point.success.value > 0 for point in self.chosen.values())


def steer(
    config: RealConfig, model: LanguageModel, saes: Mapping[Site, Dictionary], concept: Concept, kept: KeptResults
) -> SteeredConcept:
    """Steer towards a concept, at the site where latents succeed most on `tune`."""
    short = replace(concept, tune=concept.tune[: config.prompts], report=concept.report[: config.prompts])
    bench = Bench(model, short, kept.of_stage("steering"), config.new_tokens, LIMIT, lambda: None)
    for split in ("tune", "report"):  # before the others, which compare with it
        bench.unsteered(split)
    ranked = {}
    for site, dictionary in saes.items():
        name = f"steering/{concept.name}/ranking/{site} {dictionary.fingerprint}"
        ranked[site] = kept.get(name, RankedLatents, partial(rank, config, model, dictionary, concept))
    return _steer(bench, saes, ranked)


@torch.no_grad()
def rank(config: RealConfig, model: LanguageModel, dictionary: Dictionary, concept: Concept) -> RankedLatents:
    """Rank latents by the mean difference on `select`; of the first, the half with higher output scores is kept."""
    rows = [model.encode(text) for text in (*concept.present, *concept.absent)]
    tokens = model.pad(rows + (first_rows(model, config.data) if config.data else []))
    statistics = latent_statistics(model, dictionary, tokens)
    x = model.capture(tokens, [dictionary.site])[dictionary.site]
    unit = float(x[tokens.ordinary].float().norm(dim=-1).median())
    count = min(CANDIDATES, int(statistics.alive.sum()) - 1)
    scores = contrast(model, dictionary, concept.present, concept.absent, concept.positions)
    candidates = first_alive(scores, statistics, count)
    lengths = unit / dictionary.rows.norm(dim=-1).clamp(min=1e-6)
    output = output_scores(model, dictionary, candidates, lengths, concept.tune[:2], 1.0)
    latents = refine(candidates, output, min(count, max(SEVERAL, count // 2)))
    random = random_latents(statistics.alive, candidates, 1, config.draws, config.seed)
    weights = statistics.mean_active.float().cpu().numpy()
    return RankedLatents(tuple(latents), tuple(each[0] for each in random), weights, unit)


def _steer(bench: Bench, saes: Mapping[Site, Dictionary], ranked: Mapping[Site, RankedLatents]) -> SteeredConcept:
    """Choose site, strengths and prefixes on `tune`, and measure on `report`."""
    tried = {}
    for site, ranking in ranked.items():
        ways = _latent_ways(saes[site], ranking)
        tried[site] = {way.name: (way, _best(bench, way, ranking.unit)) for way in ways}
    site = max(tried, key=lambda site: sum(point.success.value for _, point in tried[site].values()))
    ranking, unit, best = ranked[site], ranked[site].unit, tried[site]
    random = tuple((latent,) for latent in ranking.random)
    for way in (_way(RANDOM, saes[site], random, ranking), dense(bench, saes[site])):
        best[way.name] = (way, _best(bench, way, unit))
    chosen = {name: bench.at(way, point.norm, unit, "report") for name, (way, point) in best.items()}
    words = {PROMPTING: bench.concept.prefixes, ONE_TOKEN: _single_tokens(bench.model, bench.concept.name)}
    prefixes = {}
    for name, texts in words.items():
        if texts:
            on_tune = {text: bench.prompting("tune", text) for text in texts}
            prefixes[name] = max(texts, key=lambda text: on_tune[text].success.value)
            chosen[name] = replace(bench.prompting("report", prefixes[name]), way=name)
    latents = ranking.latents[:SEVERAL]
    return SteeredConcept(bench.concept.name, str(site), latents, bench.unsteered("report"), chosen, prefixes)


def _latent_ways(dictionary: Dictionary, ranking: RankedLatents) -> list[Way]:
    sets = {ONE_LATENT: ranking.latents[:1], SEVERAL_LATENTS: ranking.latents[:SEVERAL]}
    return [_way(name, dictionary, (latents,), ranking) for name, latents in sets.items()]


def _way(name: str, dictionary: Dictionary, sets: tuple[tuple[int, ...], ...], ranking: RankedLatents) -> Way:
    return Way(name, dictionary, sets, torch.tensor(ranking.weights).to(dictionary.W_dec), "all")


def _best(bench: Bench, way: Way, unit: float) -> Point:
    """The best strength on `tune`; of random latents, the first draw is tried."""
    first = way.only(way.sets[0])
    return bench.best([bench.at(first, strength, unit, "tune", divergence=False) for strength in STRENGTHS])


def _single_tokens(model: LanguageModel, concept: str) -> list[str]:
    """The concept's prefixes that are one token of the model before a prompt, with the space that follows them."""
    start = len(model.encode(""))
    return [f"{text} " for text in ONE_TOKEN_PREFIXES.get(concept, ()) if len(model.encode(text)) == start + 1]


def success_gap(steered: Sequence[SteeredConcept], name: str, other: str) -> Interval:
    """Share of continuations that show their concept, one method minus another, over the prompts of all concepts."""
    both = [each.chosen for each in steered if name in each.chosen and other in each.chosen]
    return bootstrap_mean(np.concatenate([chosen[name].shown - chosen[other].shown for chosen in both]))
