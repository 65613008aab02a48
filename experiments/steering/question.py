"""Is one latent a steadier handle than several? Steering by the top K latents, at equal norm and at equal divergence.

    python -m experiments.steering --out runs/steering
    python -m experiments.steering --model MODEL --sae FOLDER_OR_RELEASE --reference TEXTS.jsonl --out runs/steering
    python -m experiments.steering --model gpt2 --sae gpt2-small-res-jb/blocks.8.hook_resid_pre \\
        --reference TEXTS.txt --concepts CONCEPTS.yaml

Latents are chosen on a concept's `select` prompts, site, way of choosing and strengths on `tune`, and every figure is
from `report`. The embedded model is steered to refuse, to the sentiment that its reviews lack, and into French; other
models to a gender of somebody who has none, or to whatever a file says.
"""

import hashlib
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
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
from saepatch.records.files import check_writable
from saepatch.records.provenance import versions
from saepatch.records.statistics import Interval, bootstrap_mean
from saepatch.runs.measurements import Measurements, measurements
from saepatch.steering.generate import Concept
from saepatch.tracking.open import read_spec

from ..common.tracked import show
from ..pairs.question import StudyConfig
from ..pairs.study import load
from . import concepts
from .page import printed, write
from .stages import Bench, KnownDictionary, Point, choose_order, choose_site, dense, random_way, top

log = logging.getLogger(__name__)

LONGEST = 128  # tokens of a reference text


@dataclass(frozen=True)
class SteeringConfig:
    """Steer by the top K latents at equal norm and divergence, beside random ones, a dense direction and words."""

    model: str = "organism"
    """Model: organism, a folder, or a Hugging Face id."""
    sae: str = "organism"
    """Dictionaries: organism, a folder (of one, or of one sub-folder a site) or RELEASE/SAE_ID, several with commas."""
    out: str = "runs/steering"
    """Folder for summary.json, report.html, rows.parquet, config.yaml, figures and what a stopped run goes on from."""
    site: str = ""
    """Site to steer at; empty: for each concept the one where latents, few and many alike, do best on `tune`."""
    concepts: str = ""
    """YAML file of concepts; empty: refusal, sentiment and French for organism, a character's gender for others."""
    reference: str = ""
    """Texts that maxima are taken over: a .txt file (one a line), or .jsonl (column text); organism has its own."""
    reference_texts: int = 1000
    """How many of them, at most."""
    sizes: tuple[int, ...] = (1, 2, 5, 10, 20)
    """Numbers of latents that steer together."""
    strengths: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
    """Norms of the perturbation, in units of the first latent's largest activation times its length."""
    divergences: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    """Divergences at which ways are compared, in nats a token."""
    prompts: int = 100
    """Prompts with and without a concept that latents are chosen on, at most."""
    continued: int = 48
    """Prompts that are continued, of `tune` and of `report`, at most."""
    new_tokens: int = 24
    """Tokens of a continuation, at most."""
    draws: int = 5
    """Random latents."""
    limit: float = 20.0
    """No strength is chosen whose perplexity on `tune` is more than so many times that without steering."""
    quick: bool = False
    """A small run of all of it."""
    seed: int = 0
    """Seed of prompts and random latents."""
    device: str = "cpu"
    """Where to run: cpu, cuda or mps."""
    dtype: str = "float32"
    """Precision of the model: float32, bfloat16 or float16."""
    track: str = "none"
    """Beside the local log: none, wandb, wandb:offline, wandb:online, trackio, or several with commas between."""
    prepend_bos: bool | None = None
    """Put a BOS in front of texts whose tokenizer adds none; unset: where the dictionaries were trained so."""

    def __post_init__(self) -> None:
        read_spec(self.track)
        for name in ("sizes", "strengths", "divergences"):
            values = getattr(self, name)
            if not values or min(values) <= 0 or sorted(set(values)) != list(values):
                raise UserError(f"{name} = {list(values)}: give rising numbers above 0, as in --{name} [1,2,5]")
        if self.sizes[0] != 1 or len(self.sizes) < 2:
            raise UserError(f"sizes = {list(self.sizes)}: begin with 1, which others are compared with")
        for name, least in (("prompts", 4), ("continued", 4), ("new_tokens", 2), ("draws", 1), ("reference_texts", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} = {getattr(self, name)}: use at least {least}")
        if self.limit < 1:
            raise UserError(f"limit = {self.limit}: use at least 1")
        if not self.reference and not is_checkpoint(self.model):
            raise UserError(f"which texts are latents' maxima in {self.model} taken over? Give --reference FILE")


QUICK = {"sizes": (1, 5), "strengths": (1.0, 2.0), "divergences": (0.3,), "prompts": 16, "continued": 6, "draws": 2}


@dataclass(frozen=True, eq=False)
class Found:
    """What steering towards one concept gave, on `report` unless said otherwise.

    `norms` has every way at every strength, `divergences` at every divergence (None: out of its reach), `chosen` at the
    strength that was best on `tune`. `fluent` says which of `norms` are within the limit on perplexity, `by_site` and
    `by_order` are the choices; these are on `tune`.
    """

    concept: Concept
    site: KnownDictionary
    unit: float
    order: Sequence[int]
    order_name: str
    by_site: Mapping[str, Sequence[Point]]
    by_order: Mapping[str, Sequence[Point]]
    unsteered: Point
    prompting: Point | None
    prefix: str
    norms: Mapping[str, Sequence[Point]]
    divergences: Mapping[str, Sequence[Point | None]]
    chosen: Mapping[str, Point]
    fluent: Mapping[str, Sequence[bool]]

    def at_equal_norm(self, size: int, level: float) -> Interval:
        """How much more often `size` latents succeed than one, averaged over the strengths at which both are fluent."""
        fluent = zip(self.fluent[f"top-{size}"], self.fluent["top-1"], strict=True)
        pairs = zip(self.norms[f"top-{size}"], self.norms["top-1"], strict=True)
        return _difference([pair for pair, both in zip(pairs, fluent, strict=True) if all(both)], level)

    def at_equal_divergence(self, size: int, level: float) -> Interval:
        """The same, averaged over the divergences that both reach."""
        pairs = zip(self.divergences[f"top-{size}"], self.divergences["top-1"], strict=True)
        return _difference([(a, b) for a, b in pairs if a and b], level)

    def at_chosen(self, size: int, level: float) -> Interval:
        """The same, each at its own strength."""
        return _difference([(self.chosen[f"top-{size}"], self.chosen["top-1"])], level)


def _difference(pairs: Sequence[tuple[Point, Point]], level: float) -> Interval:
    """Mean over pairs of points of the first's success less the second's; the interval is over prompts."""
    if not pairs:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    return bootstrap_mean(np.mean([a.shown - b.shown for a, b in pairs], 0), level)


def run(config: SteeringConfig) -> list[Found]:
    """Steer towards every concept; files go to `config.out`, tables to the terminal.

    Raises:
        UserError: an output folder that cannot be written or holds another run, a model and dictionaries that do not
            fit, or a file that cannot be read.
    """
    config = replace(config, **QUICK) if config.quick else config  # type: ignore[arg-type]
    torch.manual_seed(config.seed)
    check_writable(config.out)
    start = time.monotonic()
    model, saes = load(StudyConfig(config.model, config.sae, device=config.device, dtype=config.dtype,
                                   prepend_bos=config.prepend_bos))  # fmt: skip
    wanted = _concepts(config, model)
    sites = _sites(config, model, saes)
    out, decides = Path(config.out), _deciding(config, model, [site.dictionary for site in sites], wanted)
    with measurements(out / "cells.jsonl", decides, _key(list(decides.values()))) as kept:
        with tqdm(unit="run", disable=not sys.stderr.isatty()) as bar:
            found = [_steer(config, model, sites, concept, kept, bar) for concept in wanted]
        show(config, "steering", *write(found, config, model, out, time.monotonic() - start))
    sys.stdout.write(f"{printed(found)}\n\nReport: {out / 'report.html'}   Figures: {out / 'summary.json'}\n")
    return found


def _concepts(config: SteeringConfig, model: LanguageModel) -> list[Concept]:
    if config.concepts:
        wanted = concepts.read_concepts(config.concepts)
    elif is_checkpoint(config.model):
        wanted = organism_concepts(model, config.prompts, config.seed)
    else:
        wanted = [concepts.gender(model, config.new_tokens)]
    n, m = config.prompts, config.continued
    return [
        replace(one, present=one.present[:n], absent=one.absent[:n], tune=one.tune[:m], report=one.report[:m])
        for one in wanted
    ]


def _sites(config: SteeringConfig, model: LanguageModel, saes: Mapping[Site, Dictionary]) -> list[KnownDictionary]:
    """The dictionaries that may be steered with, and how their latents behave on the reference texts."""
    wanted = [d for place, d in saes.items() if not config.site or place.same_tensor(Site.parse(config.site))]
    if not wanted:
        raise UserError(f"there is no dictionary for {config.site}: there are {', '.join(map(str, saes))}")
    texts = load_texts(config.reference or "organism")[: config.reference_texts]
    tokens = model.pad([model.encode(text)[:LONGEST] for text in texts])
    return [KnownDictionary(dictionary, latent_statistics(model, dictionary, tokens)) for dictionary in wanted]


def _deciding(
    config: SteeringConfig, model: LanguageModel, dictionaries: Sequence[Dictionary], wanted: Sequence[Concept]
) -> dict[str, Any]:
    """By name, all that decides the measurements."""
    free = ("out", "quick", "device", "track")
    return {
        "settings": {name: value for name, value in asdict(config).items() if name not in free},
        "model's weights": model.fingerprint,
        "dictionaries": [d.fingerprint for d in dictionaries],
        "concepts": [[c.name, c.present, c.absent, c.tune, c.report, c.positions, c.prefixes] for c in wanted],
        "versions": versions(),
    }


def _key(decides: Any) -> str:
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def _steer(
    config: SteeringConfig,
    model: LanguageModel,
    sites: Sequence[KnownDictionary],
    concept: Concept,
    kept: Measurements,
    bar: "tqdm[Any]",
) -> Found:
    bar.set_description(concept.name)

    def tick() -> None:
        bar.update()

    bench = Bench(model, concept, kept, config.new_tokens, config.limit, tick)
    log.info("%s: where …", concept.name)
    some = config.sizes[::2]
    site, by_site = choose_site(bench, sites, some, config.strengths)
    log.info("%s: which latents of %s …", concept.name, site.dictionary.site)
    name, order, by_order = choose_order(bench, site, some, max(config.sizes), config.strengths)
    unit = site.unit(order[0])
    ways = [top(bench, site, order, k) for k in config.sizes]
    ways += [random_way(bench, site, order, config.draws, config.seed), dense(bench, site)]
    norms, reached, chosen, fluent = {}, {}, {}, {}
    for way in ways:
        log.info("%s: %s …", concept.name, way.name)
        tune = [bench.at(way, strength, unit, "tune", divergence=False) for strength in config.strengths]
        norms[way.name] = [bench.at(way, strength, unit, "report") for strength in config.strengths]
        reached[way.name] = [bench.at_divergence(way, t, unit, config.strengths) for t in config.divergences]
        fluent[way.name] = list(map(bench.fluent, tune))
        chosen[way.name] = norms[way.name][tune.index(bench.best(tune))]
    prefix = ""
    if concept.prefixes:
        asked = {prefix: bench.prompting("tune", prefix) for prefix in concept.prefixes}
        prefix = max(asked, key=lambda one: (asked[one].success.value, -asked[one].perplexity.value))
    return Found(
        concept,
        site,
        unit,
        order,
        name,
        by_site,
        by_order,
        bench.unsteered("report"),
        bench.prompting("report", prefix) if prefix else None,
        prefix,
        norms,
        reached,
        chosen,
        fluent,
    )


def main(config: SteeringConfig) -> None:
    run(config)
