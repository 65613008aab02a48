"""Does one latent steer better than several? Steering by the top K latents, at equal norm and at equal divergence.

    python -m experiments.steering --out runs/steering
    python -m experiments.steering --model MODEL --sae FOLDER_OR_RELEASE --reference TEXTS.jsonl --out runs/steering
    python -m experiments.steering --model gpt2 --sae gpt2-small-res-jb/blocks.8.hook_resid_pre \\
        --reference TEXTS.txt --concepts CONCEPTS.yaml

Latents are ranked on a concept's `select` prompts; site, ranking and strengths are chosen on `tune`; all figures are
from `report`. The embedded model is steered towards refusal, towards the sentiment that its reviews lack, and towards
French; other models towards the gender that their characters lack, or towards the concepts of a file. A stopped run
continues when the same command is given again.
"""

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from saepatch.data.texts import load_texts
from saepatch.demo.concepts import organism_concepts
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.errors import UserError
from saepatch.measure.quality import latent_statistics
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site
from saepatch.organism import is_checkpoint
from saepatch.records.bars import progress_bar
from saepatch.records.provenance import json_hash, versions
from saepatch.runs.measurements import Measurements, measurements
from saepatch.runs.ownership import check_owner
from saepatch.steering.generate import Concept

from ..common.tracked import show
from ..pairs.question import StudyConfig
from ..pairs.study import load
from . import concepts
from .baselines import ONE_TOKEN, best_prefix, fading, one_token_prefixes, overall, predictions, probe
from .page import printed, write
from .results import SteeringConfig, SteeringResult
from .stages import Bench, KnownDictionary, choose_order, choose_site, dense, random_way, top

log = logging.getLogger(__name__)

LONGEST = 128  # tokens of a reference text that are used


QUICK = {"sizes": (1, 5), "strengths": (1.0, 2.0), "divergences": (0.3,), "prompts": 16, "continued": 6, "draws": 2}


def run(config: SteeringConfig) -> list[SteeringResult]:
    """Steer towards every concept; files go to `config.out`, tables to the terminal.

    Raises:
        UserError: an output folder that cannot be written or holds another run, a model and dictionaries that do not
            fit, or a file that cannot be read.
    """
    config = replace(config, **QUICK) if config.quick else config  # type: ignore[arg-type]
    torch.manual_seed(config.seed)
    out, start = Path(config.out), time.monotonic()
    check_owner(out, "steering")
    model, saes = load(StudyConfig(config.model, config.sae, device=config.device, dtype=config.dtype,
                                   prepend_bos=config.prepend_bos))  # fmt: skip
    wanted = _concepts(config, model)
    sites = _sites(config, model, saes)
    decides = _deciding(config, model, [site.dictionary for site in sites], wanted)
    with measurements(out, "steering", decides, "cells.jsonl", json_hash(list(decides.values()))) as kept:
        with progress_bar(True, unit="run") as bar:
            steered = [_steer(config, model, sites, concept, kept, bar) for concept in wanted]
        show(config, "steering", *write(steered, config, model, out, time.monotonic() - start))
    sys.stdout.write(f"{printed(steered)}\n\nReport: {out / 'report.html'}   Figures: {out / 'summary.json'}\n")
    return steered


def _concepts(config: SteeringConfig, model: LanguageModel) -> list[Concept]:
    if config.concepts:
        wanted = concepts.read_concepts(config.concepts)
    elif is_checkpoint(config.model):
        wanted = organism_concepts(model, config.prompts, config.seed)
    else:
        wanted = [concepts.gender(model, config.new_tokens)]
    n, m = config.prompts, config.continued
    return [
        replace(each, present=each.present[:n], absent=each.absent[:n], tune=each.tune[:m], report=each.report[:m])
        for each in wanted
    ]


def _sites(config: SteeringConfig, model: LanguageModel, saes: Mapping[Site, Dictionary]) -> list[KnownDictionary]:
    """The dictionaries to steer with, and the statistics of their latents over the reference texts."""
    wanted = [d for place, d in saes.items() if not config.site or place.same_tensor(Site.parse(config.site))]
    if not wanted:
        raise UserError(f"there is no dictionary for {config.site}: there are {', '.join(map(str, saes))}")
    texts = load_texts(config.reference or "organism")[: config.reference_texts]
    tokens = model.pad([model.encode(text)[:LONGEST] for text in texts])
    return [KnownDictionary(each, latent_statistics(model, each, tokens), config.largest) for each in wanted]


def _deciding(
    config: SteeringConfig, model: LanguageModel, dictionaries: Sequence[Dictionary], wanted: Sequence[Concept]
) -> dict[str, Any]:
    """By name, what must be the same for measurements to belong to one run."""
    free = ("out", "quick", "device", "track")
    return {
        "settings": {name: value for name, value in asdict(config).items() if name not in free},
        "model's weights": model.fingerprint,
        "dictionaries": [d.fingerprint for d in dictionaries],
        "concepts": [[c.name, c.present, c.absent, c.tune, c.report, c.positions, c.prefixes] for c in wanted],
        "versions": versions(),
    }


def _steer(
    config: SteeringConfig,
    model: LanguageModel,
    sites: Sequence[KnownDictionary],
    concept: Concept,
    kept: Measurements,
    bar: "tqdm[Any]",
) -> SteeringResult:
    bar.set_description_str(concept.name)

    def tick() -> None:
        bar.update()

    bench = Bench(model, concept, kept, config.new_tokens, config.limit, tick)
    log.info("%s: choosing a site …", concept.name)
    some = config.sizes[::2]
    site, by_site = choose_site(bench, sites, some, config.strengths)
    log.info("%s: choosing latents of %s …", concept.name, site.dictionary.site)
    name, order, by_order = choose_order(bench, site, some, max(config.sizes), config.strengths)
    unit = site.unit(order[0])
    ways = [top(bench, site, order, k) for k in config.sizes]
    ways += [random_way(bench, site, order, config.draws, config.seed), dense(bench, site.dictionary)]
    ways += [probe(bench, site.dictionary), fading(bench, site, order)]
    norms, reached, chosen, fluent = {}, {}, {}, {}
    for way in ways:
        log.info("%s: %s …", concept.name, way.name)
        tune = [bench.at(way, strength, unit, "tune", divergence=False) for strength in config.strengths]
        norms[way.name] = [bench.at(way, strength, unit, "report") for strength in config.strengths]
        reached[way.name] = [bench.at_divergence(way, t, unit, config.strengths) for t in config.divergences]
        fluent[way.name] = list(map(bench.fluent, tune))
        chosen[way.name] = norms[way.name][tune.index(bench.best(tune))]
    prefix = best_prefix(bench, concept.prefixes) if concept.prefixes else ""
    words = one_token_prefixes(bench)
    word = best_prefix(bench, words) if words else ""
    bare, prompted = bench.unsteered("report"), bench.prompting("report", prefix) if prefix else None
    prefixed = replace(bench.prompting("report", word), way=ONE_TOKEN) if word else None
    judged = [bare, *chosen.values(), *(point for point in (prompted, prefixed) if point is not None)]
    return SteeringResult(
        concept,
        site,
        unit,
        order,
        name,
        by_site,
        by_order,
        bare,
        prompted,
        prefix,
        norms,
        reached,
        chosen,
        fluent,
        prefixed,
        word,
        predictions(bench, site, order, chosen["top-1"].norm),
        {point.way: overall(bench, point) for point in judged},
    )


def main(config: SteeringConfig) -> None:
    run(config)
