"""Stages "dictionaries" and "latents": dictionaries at three depths, their quality, and their latents on the tasks."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from saepatch.cli.commands.train import train
from saepatch.data.pairs import PromptPair
from saepatch.data.texts import load_texts
from saepatch.dictionaries.bases import directions_of, units_of
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import load_saes
from saepatch.engine.components import PATCH_DIRECTIONS, Edit, PatchDirection
from saepatch.engine.passes.shared_runs import shared_runs
from saepatch.errors import UserError
from saepatch.measure.attribution import Attribution, attribute
from saepatch.measure.baselines import difference_of_means, principal_components
from saepatch.measure.curves import Curve, effect_curve
from saepatch.measure.patching import patch_components
from saepatch.measure.quality import latent_statistics, splice_quality
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site
from saepatch.records.statistics import Interval

from ...common.kept import KeptResults
from ...pairs.stages import DENSE, DirectionKind, both, site_values
from ..settings import RealConfig
from .tasks import TaskPairs

log = logging.getLogger(__name__)

DEPTHS = {1: (0.5,), 2: (0.35, 0.65), 3: (0.25, 0.5, 0.75)}  # of the dictionaries, by their number
SIZES = (1, 4, 16)  # numbers of latents that are patched together
CONTEXT = 128
ROWS = 16  # rows of text on which the sizes of activations are measured
MASSIVE = 10.0  # a token is massive where its norm is this many times the median
COUNT = 64  # principal components that are ranked
LATENTS, DIMENSIONS, COMPONENTS = "latents", "residual dimensions", "principal components"
NEURONS = "neurons of the last MLP"


@dataclass(frozen=True)
class TrainedFolder:
    folder: str


@dataclass(frozen=True)
class DictionaryQuality:
    """Quality of a dictionary, and the shares of large activations at its site.

    `held_out` is whether the first figures were measured in training, on held-out text; else they are from the
    beginnings of the first texts. `bos_share` and `massive_share` are shares of the sum of |x|² of BOS and of massive
    ordinary tokens (norm above `MASSIVE` medians), `massive_tokens` the share of such tokens, and `fvu_others` the
    fraction of variance unexplained at the other ordinary tokens.
    """

    site: str
    held_out: bool
    fvu: float
    l0: float
    ce_recovered: float
    bos_share: float
    massive_tokens: float
    massive_share: float
    fvu_others: float


@dataclass(frozen=True, eq=False)
class TaskLatents:
    """The latents of one site on one task: effects of the first k of select, and attribution against exact effects.

    `on_select` is, for every site, what its latents restore on half of the select pairs, ranked on the other half: by
    it, `site` is chosen. `others` are as many other directions of the site, ranked in the same way: see
    `other_directions`.
    """

    site: str
    on_select: Mapping[str, float]
    curves: Mapping[PatchDirection, Curve]
    attribution: Attribution
    others: Mapping[str, DirectionKind]


def dictionaries(config: RealConfig, model: LanguageModel, kept: KeptResults) -> dict[Site, Dictionary]:
    """The dictionaries of `config.sae`, or those trained in the study's folder."""
    if config.sae:
        return load_saes(config.sae, config.device)
    trained = kept.get("dictionaries/training", TrainedFolder, partial(train_dictionaries, config, model))
    return load_saes(trained.folder, config.device)


def train_dictionaries(config: RealConfig, model: LanguageModel) -> TrainedFolder:
    """Train TopK dictionaries at depths of `DEPTHS` by the project's own command; a stopped training continues.

    Raises:
        UserError: training failed; its own message precedes this.
    """
    if not config.data:
        raise UserError("no texts to train dictionaries on: give --data TEXTS.jsonl, or --sae FOLDER")
    out = Path(config.out) / "saes"
    sites = sorted(
        {Site(min(model.n_layers - 1, round(depth * model.n_layers))) for depth in DEPTHS[config.dictionaries]}
    )
    batch = min(1024, config.tokens)
    settings = {
        "model": config.model,
        "data": config.data,
        "sites": f"[{','.join(map(str, sites))}]",
        "out": str(out),
        "resume": "true",
        "tokens": config.tokens,
        "batch_size": batch,
        "context": CONTEXT,
        "buffer": max(batch, min(65_536, config.tokens // 2)),
        "eval_tokens": max(500, min(2_048, config.tokens // 100)),  # 16 passes with all logits
        "sae.architecture": "topk",
        "sae.k": config.k,
        "sae.expansion": 8,
        "seed": config.seed,
        "device": config.device,
        "dtype": config.dtype,
    }
    code = train([part for name, value in settings.items() for part in (f"--{name}", str(value))])
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise UserError(f"training the dictionaries failed (exit code {code}): see above, or give --sae FOLDER")
    return TrainedFolder(str(out))


def first_rows(model: LanguageModel, data: str) -> list[list[int]]:
    """The beginnings of the first texts, in tokens."""
    limit = min(CONTEXT, model.context or CONTEXT)
    return [model.encode(text)[:limit] for text in load_texts(data)[:ROWS]]


@torch.no_grad()
def dictionary_quality(model: LanguageModel, dictionary: Dictionary, data: str) -> DictionaryQuality:
    """Quality as training measured it, or on the beginnings of the first texts; and the sizes of activations."""
    tokens = model.pad(first_rows(model, data))
    site, known = dictionary.site, dictionary.metrics_on(model)
    names = ("fvu", "l0", "ce_recovered")
    if held_out := all(name in known for name in names):
        fvu, l0, ce_recovered = (known[name] for name in names)
    else:
        quality = splice_quality(model, dictionary, tokens)
        fvu, l0, ce_recovered = quality.fvu, quality.l0, quality.ce_recovered
    x = model.capture(tokens, [site])[site].double()
    size, ordinary = (x**2).sum(-1), tokens.ordinary
    norms = size[ordinary].sqrt()
    massive = ordinary & (size.sqrt() > MASSIVE * norms.median())
    total = float(size[tokens.attention_mask.bool()].sum())
    bos = tokens.attention_mask.bool() & ~ordinary
    others = ordinary & ~massive
    error = dictionary.encode(x.to(model.dtype)).error[others].double()
    variance = float(((x[others] - x[others].mean(0)) ** 2).sum())
    return DictionaryQuality(
        str(site),
        held_out,
        fvu,
        l0,
        ce_recovered,
        bos_share=float(size[bos].sum()) / total,
        massive_tokens=float(massive.sum() / ordinary.sum()),
        massive_share=float(size[massive].sum()) / total,
        fvu_others=float((error**2).sum()) / variance,
    )


def qualities(
    config: RealConfig, model: LanguageModel, saes: Mapping[Site, Dictionary], kept: KeptResults
) -> list[DictionaryQuality]:
    return [
        kept.get(
            f"dictionaries/quality/{site} {dictionary.fingerprint}",
            DictionaryQuality,
            partial(dictionary_quality, model, dictionary, config.data),
        )
        for site, dictionary in saes.items()
    ]


def task_latents(
    config: RealConfig, model: LanguageModel, saes: Mapping[Site, Dictionary], task: TaskPairs, kept: KeptResults
) -> TaskLatents:
    """Latents of the site where they restore most on `select`, ranked by attribution on `select`, measured on `report`.

    The largest of several sites' figures on `report` would be biased.
    """
    select, report = task.pairs("select"), task.pairs("report")
    names = {site: f"latents/{task.name}/{site} {dictionary.fingerprint}" for site, dictionary in saes.items()}
    with shared_runs():
        on_select = {
            site: kept.value(f"{names[site]}/on select", partial(effect_on_select, model, dictionary, select))
            for site, dictionary in saes.items()
        }
        best = max(on_select, key=lambda site: on_select[site])
        dictionary, name = saes[best], names[best]
        rankings: dict[PatchDirection, list[int]] = {
            d: kept.value(f"{name}/ranking/{d}", partial(first_units, model, dictionary, select, d))
            for d in PATCH_DIRECTIONS
        }
        curves: dict[PatchDirection, Curve] = {
            d: kept.get(f"{name}/{d}", Curve, partial(latent_curve, model, dictionary, rankings[d], select, report,
                                                      config.seed, d))
            for d in PATCH_DIRECTIONS
        }  # fmt: skip
        others = {
            kind: kept.get(f"{name}/{kind}", DirectionKind, partial(measure, select, report))
            for kind, measure in other_directions(model, dictionary, rankings["denoise"]).items()
        }
        estimate = partial(attribute, model, dictionary, report, verify=config.verify, sample=config.sample,
                           seed=config.seed)  # fmt: skip
        attribution = kept.get(f"{name}/attribution", Attribution, estimate)
    return TaskLatents(str(best), {str(site): on_select[site] for site in saes}, curves, attribution, others)


Pairs = Sequence[PromptPair]


def other_directions(
    model: LanguageModel, dictionary: Dictionary, ranking: Sequence[int]
) -> dict[str, Callable[[Pairs, Pairs], DirectionKind]]:
    """How latents of a ranking, and other directions beside them, are patched on `report`.

    The others are ranked as the latents were, by attribution on `select`. Neurons are those of the MLP that writes to
    the site last.
    """
    site = dictionary.site

    def of(kind: str, make: Callable[[Pairs], Dictionary]) -> Callable[[Pairs, Pairs], DirectionKind]:
        def measure(select: Pairs, report: Pairs) -> DirectionKind:
            directions = make(select)
            first = ranking if kind == LATENTS else first_units(model, directions, select)
            return direction_kind(model, kind, directions, first, report)

        return measure

    kinds = {
        LATENTS: of(LATENTS, lambda _: dictionary),
        DIMENSIONS: of(DIMENSIONS, lambda _: units_of(model, site)),
        COMPONENTS: of(COMPONENTS, partial(_principal_components, model, site)),
        DENSE: of(DENSE, partial(_mean_difference, model, site)),
    }
    neurons = Site(site.layer, "neurons")
    if neurons in model.layout.all_sites:
        kinds[NEURONS] = of(NEURONS, lambda _: units_of(model, neurons))
    return kinds


def effect_on_select(model: LanguageModel, dictionary: Dictionary, select: Pairs) -> float:
    """The share that the first latents restore on every other pair, ranked on the pairs between them."""
    ranking = first_units(model, dictionary, select[::2])
    if not ranking:
        return 0.0
    edits = [Edit(dictionary.site, tuple(ranking), role="top")]
    return float(patch_components(model, dictionary, select[1::2], edits).ratios()[0])


def direction_kind(
    model: LanguageModel, kind: str, directions: Dictionary, ranking: Sequence[int], report: Pairs
) -> DirectionKind:
    """Effects of the first units of a ranking, together, in both directions of patching."""
    sizes = tuple(k for k in SIZES if k <= len(ranking))
    edits = [Edit(directions.site, tuple(ranking[:k]), role="top") for k in sizes]
    effects = both(lambda d: patch_components(model, directions, report, edits, direction=d)) if edits else {}
    return DirectionKind(kind, sizes, effects)


def first_units(
    model: LanguageModel, directions: Dictionary, pairs: Pairs, direction: PatchDirection = "denoise"
) -> list[int]:
    """The units with the largest estimated effects, at most `max(SIZES)`."""
    estimates = attribute(model, directions, pairs, direction=direction)
    edits = [edit for edit in estimates.top(max(SIZES) + 1, each_position=False) if edit.kind == "latent"]
    return [edit.units[0] for edit in edits][: max(SIZES)]


def _principal_components(model: LanguageModel, site: Site, select: Pairs) -> Dictionary:
    texts = [text for pair in select for text in (pair.clean, pair.corrupted)]
    values, _ = site_values(model, site, texts)
    rows = principal_components(values, min(values.shape[1], len(values) - 1, COUNT), site).rows
    return directions_of(rows.to(model.device, model.dtype), site, COMPONENTS)


def _mean_difference(model: LanguageModel, site: Site, select: Pairs) -> Dictionary:
    """From the corrupted to the clean prompts' last positions."""
    _, clean = site_values(model, site, [pair.clean for pair in select])
    _, corrupted = site_values(model, site, [pair.corrupted for pair in select])
    rows = difference_of_means(clean, corrupted, site).rows
    return directions_of(rows.to(model.device, model.dtype), site, DENSE)


def latent_curve(
    model: LanguageModel,
    dictionary: Dictionary,
    ranking: Sequence[int],
    select: Pairs,
    report: Pairs,
    seed: int,
    direction: PatchDirection,
) -> Curve:
    """Effects of the first latents of a ranking, with random and matched controls."""
    prompts = [text for pair in select for text in (pair.clean, pair.corrupted)]
    statistics = latent_statistics(model, dictionary, prompts)
    sizes = [k for k in SIZES if k <= len(ranking) and int(statistics.alive.sum()) >= 2 * k]
    if not sizes:
        raise UserError(f"no latent of {dictionary.name} differs between the prompts: use more pairs")
    curve = effect_curve(model, dictionary, report, ranking, sizes, statistics, seed, direction=direction)
    return replace(curve, effects=())  # the sweep of all latents is large, and nothing more is read from it


def correlation(attribution: Attribution) -> Interval:
    """Correlation of estimates with exact effects over verified nodes, without an interval.

    A few large nodes, often of one pair, decide it: bootstrap and jackknife intervals over pairs, also of its Fisher
    transform, are too short.
    """
    verified = attribution.verified
    assert verified is not None
    pairs = len(np.unique(attribution.pair[verified.index]))
    return Interval.withheld(verified.pearson(), pairs, "no interval: a few large nodes decide it")
