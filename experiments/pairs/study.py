"""The experiments on pairs of prompts: one question, asked of any model and its dictionaries.

Latents are ranked on one half of the `select` split, the site is chosen on the other half, and every figure comes from
`report`, which shares no names, templates or objects with `select`. On a large model the sweeps over all latents and
all dimensions take long: use `--device cuda`, or fewer pairs.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from saepatch.data.forms import largest_group, position_labels
from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import load_saes
from saepatch.engine.components import PatchDirection
from saepatch.errors import UserError
from saepatch.measure.attribution import Attribution
from saepatch.measure.curves import Curve
from saepatch.measure.quality import LatentStatistics, latent_statistics
from saepatch.measure.results.effects import Effects
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading.load import load_model
from saepatch.model.sites import Site
from saepatch.organism import is_checkpoint
from saepatch.pages import track_page
from saepatch.records.clock import stage
from saepatch.records.provenance import json_hash
from saepatch.runs.measurements import measurements
from saepatch.runs.ownership import check_owner
from saepatch.tracking.open import RunDescription, open_tracker

from ..common.kept import KeptResults, deciding
from . import stages
from .findings import StudyResults, printed, unsure
from .page import write
from .question import FramedPair, Question, StudyConfig, embedded, fitting

log = logging.getLogger(__name__)


def load(config: StudyConfig) -> tuple[LanguageModel, dict[Site, Dictionary]]:
    """Load the model and all dictionaries, and check them against each other."""
    saes: dict[Site, Dictionary] = {}
    for spec in config.sae.split(","):
        for site, dictionary in load_saes(spec.strip(), config.device).items():
            if site in saes:
                raise UserError(f"two dictionaries for {site} ({saes[site].name}, {dictionary.name}): give one of them")
            saes[site] = dictionary
    bos = config.prepend_bos
    if bos is None:
        bos = any(_trained_with_bos(dictionary) for dictionary in saes.values())
    model = load_model(config.model, config.device, config.dtype, prepend_bos=bos)
    for dictionary in saes.values():
        dictionary.check(model)
    return model, dict(sorted(saes.items()))


def _trained_with_bos(dictionary: Dictionary) -> bool:
    cfg: Any = dictionary.sae.cfg
    return bool(cfg.metadata.get("prepend_bos"))


def run(question: Question, config: StudyConfig) -> StudyResults:
    """Answer the question for the model; files go to `config.out`, and tables to the terminal.

    Every result is kept in the folder as it is measured, and the same command continues from there.

    Raises:
        UserError: an output folder that cannot be written or holds another run, a model and dictionaries that do not
            fit, too few pairs, or a model that does not tell the clean prompts from the corrupted ones.
    """
    torch.manual_seed(config.seed)
    out, seconds = Path(config.out), dict[str, float]()
    check_owner(out, question.task)
    with stage("load", seconds, log):
        model, saes = load(config)
        own = is_checkpoint(config.model)
        select, report = (
            embedded(question, split, config.pairs, config.seed)
            if own
            else fitting(model, question.candidates(split, config.seed), config.pairs)
            for split in ("select", "report")
        )
    settings = replace(config, prepend_bos=model.prepend_bos)
    decides = _deciding(settings, model, list(saes.values()), [*select, *report])
    with measurements(out, question.task, decides) as kept:
        results = _measure(question, settings, model, list(saes.values()), select, report, KeptResults(kept, seconds))
        about = RunDescription(out, run=question.task, config=asdict(settings), job_type="experiment")
        with open_tracker(config.track, about) as tracker:
            track_page(write(results, out), out / "report.html", tracker)
    sys.stdout.write(f"{printed(results)}\n\nReport: {out / 'report.html'}   Figures: {out / 'summary.json'}\n")
    return results


def _deciding(
    config: StudyConfig, model: LanguageModel, saes: Sequence[Dictionary], framed: Sequence[FramedPair]
) -> dict[str, Any]:
    """By name, what must be the same for results to belong to one run."""
    by_site = {dictionary.site: dictionary for dictionary in saes}
    texts = json_hash([[*astuple(each.pair), each.frame] for each in framed])
    return deciding(config, model, by_site, ("out", "device", "track")) | {"pairs' texts": texts}


def _measure(
    question: Question,
    config: StudyConfig,
    model: LanguageModel,
    saes: Sequence[Dictionary],
    framed_select: Sequence[FramedPair],
    framed_report: Sequence[FramedPair],
    kept: KeptResults,
) -> StudyResults:
    select, report = ([framed.pair for framed in some] for some in (framed_select, framed_report))
    group, seed = largest_group(model, report, [framed.frame for framed in framed_report]), config.seed

    def effects(name: str, measure: Callable[[PatchDirection], Effects]) -> stages.Both:
        return stages.both(lambda d: kept.get(f"{name}/{d}", Effects, partial(measure, d)))

    streams = effects("maps/streams", partial(stages.stream_effects, model, group))
    heads = effects("maps/heads", partial(stages.head_effects, model, report)) if stages.has_heads(model) else None
    sites = _ranked_sites(config, model, saes, (select, report), kept)
    best = stages.best_site(sites)
    latents = effects("latents/by position", partial(stages.by_position, model, best, group))
    tops = effects("latents/alone", partial(stages.patch_tops, model, best, report, seed))
    if warning := unsure(tops["denoise"], model.name):
        log.warning(warning)
    curves = _curves(config, model, best, (select, report), kept)
    agreements = _agreements(config, model, best, report, kept)
    compared = stages.DirectionComparison(model, best, select, report, config.sizes, question.first)
    kinds = [
        kept.get(f"other directions/{name}", stages.DirectionKind, partial(compared.measure, name))
        for name in compared.kinds
    ]
    return StudyResults(
        question=question,
        config=config,
        model=model,
        columns=position_labels(model, group),
        group=len(group),
        examples=report[:3],
        tokens=_tokens(model, report),
        group_tokens=_tokens(model, group),
        streams=streams,
        heads=heads,
        sites=sites,
        best=best,
        latents=latents,
        tops=tops,
        curves=curves,
        agreements=agreements,
        kinds=[kind for kind in kinds if kind.sizes],
        seconds=kept.seconds,
    )


Splits = tuple[Sequence[PromptPair], Sequence[PromptPair]]  # select, report


def _ranked_sites(
    config: StudyConfig, model: LanguageModel, saes: Sequence[Dictionary], splits: Splits, kept: KeptResults
) -> list[stages.RankedSite]:
    ranked = []
    for dictionary in saes:
        rank = partial(stages.rank_site, model, dictionary, *splits, max(config.sizes), config.seed)
        ranking = kept.get(f"sites/{dictionary.site}", stages.SiteRanking, rank)
        ranked.append(stages.RankedSite(dictionary, ranking))
    return ranked


def _curves(
    config: StudyConfig, model: LanguageModel, best: stages.RankedSite, splits: Splits, kept: KeptResults
) -> dict[PatchDirection, Curve]:
    select, report = splits

    @cache
    def statistics() -> LatentStatistics:
        prompts = model.tokenize([text for pair in select for text in (pair.clean, pair.corrupted)])
        return latent_statistics(model, best.dictionary, prompts)

    def curve(direction: PatchDirection) -> Curve:
        return stages.curve(model, best, report, config.sizes, statistics(), config.seed, direction)

    return stages.both(lambda d: kept.get(f"latents/together/{d}", Curve, partial(curve, d)))


def _agreements(
    config: StudyConfig,
    model: LanguageModel,
    best: stages.RankedSite,
    report: Sequence[PromptPair],
    kept: KeptResults,
) -> list[stages.Agreement]:
    attributions = []
    for number, method in enumerate(stages.METHODS):
        estimate = partial(stages.attribute_by, model, best.dictionary, report, config, number)
        attributions.append(kept.get(f"attribution/{method.name}", Attribution, estimate))
    return stages.agreements(attributions)


def _tokens(model: LanguageModel, pairs: Sequence[PromptPair]) -> list[list[str]]:
    """The text of each token of each clean prompt."""
    return [model.token_texts(model.encode(pair.clean)) for pair in pairs]
