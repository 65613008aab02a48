"""What the experiments share: a question about pairs of prompts, asked of any model and its dictionaries.

Latents are ranked on one half of the `select` split, the site is chosen on the other half, and every figure comes from
`report`, whose names, templates and objects are others. On a large model the sweeps over all latents and all dimensions
are long: use `--device cuda`, or fewer pairs.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from saepatch.data.forms import largest_group
from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import load_saes
from saepatch.errors import UserError
from saepatch.measure.quality import latent_statistics
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading import load_model
from saepatch.model.sites import Site
from saepatch.organism import is_checkpoint
from saepatch.pages import track_page
from saepatch.records.clock import stage
from saepatch.records.files import check_writable, output_folder
from saepatch.report import token_text
from saepatch.tracking.open import RunDescription, open_tracker

from . import stages
from .findings import StudyResults, printed, unsure
from .page import write
from .question import FramedPair, Question, StudyConfig, embedded, fitting

log = logging.getLogger(__name__)


def position_labels(model: LanguageModel, pairs: Sequence[PromptPair]) -> list[str]:
    """Each position of a group: its number and its token where all agree; else the first pair's, in brackets."""
    rows = [model.encode(text) for pair in pairs for text in (pair.clean, pair.corrupted)]
    labels = []
    for position, column in enumerate(zip(*rows, strict=True)):
        clean, corrupted = map(token_text, model.token_texts(column[:2]))
        shown = clean if clean == corrupted else f"{clean}/{corrupted}"
        labels.append(f"{position} {shown if len(set(column)) == 1 else f'[{shown}]'}")
    return labels


def load(config: StudyConfig) -> tuple[LanguageModel, dict[Site, Dictionary]]:
    """The model and every dictionary, checked against each other."""
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

    Raises:
        UserError: an output folder that cannot be written, a model and dictionaries that do not fit, too few pairs, or
            a model that does not tell the clean prompts from the corrupted ones.
    """
    torch.manual_seed(config.seed)
    check_writable(config.out)  # now, and not after minutes of work
    clock: dict[str, float] = {}
    with stage("load", clock, log):
        model, saes = load(config)
        own = is_checkpoint(config.model)
        select, report = (
            embedded(question, split, config.pairs, config.seed)
            if own
            else fitting(model, question.candidates(split, config.seed), config.pairs)
            for split in ("select", "report")
        )
    settings = replace(config, prepend_bos=model.prepend_bos)
    results = _measure(question, settings, model, list(saes.values()), select, report, clock)
    out = output_folder(config.out)
    about = RunDescription(out, run=question.task, config=asdict(settings), job_type="experiment")
    with open_tracker(config.track, about) as tracker:
        track_page(write(results, out), out / "report.html", tracker)
    sys.stdout.write(f"{printed(results)}\n\nReport: {out / 'report.html'}   Figures: {out / 'summary.json'}\n")
    return results


def _measure(
    question: Question,
    config: StudyConfig,
    model: LanguageModel,
    saes: Sequence[Dictionary],
    framed_select: Sequence[FramedPair],
    framed_report: Sequence[FramedPair],
    clock: dict[str, float],
) -> StudyResults:
    select, report = ([framed.pair for framed in some] for some in (framed_select, framed_report))
    group, seed = largest_group(model, report, [framed.frame for framed in framed_report]), config.seed
    with stage("maps", clock, log):
        streams = stages.stream_effects(model, group)
        heads = stages.head_effects(model, report)
    with stage("sites", clock, log):
        sites = stages.rank_sites(model, saes, select, report, max(config.sizes), seed)
        best = stages.best_site(sites)
    with stage("latents", clock, log):
        latents = stages.by_position(model, best, group)
        tops = stages.patch_tops(model, best, report, seed)
        if warning := unsure(tops["denoise"], model.name):
            log.warning(warning)
        prompts = model.tokenize([text for pair in select for text in (pair.clean, pair.corrupted)])
        statistics = latent_statistics(model, best.dictionary, prompts)
        curves = stages.curves(model, best, report, config.sizes, statistics, seed)
    with stage("attribution", clock, log):
        agreements = stages.screen(model, best.dictionary, report, config.verify, config.sample, seed)
    with stage("other directions", clock, log):
        kinds = stages.compare_directions(model, best, select, report, config.sizes, question.first)
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
        kinds=kinds,
        seconds=clock,
    )


def _tokens(model: LanguageModel, pairs: Sequence[PromptPair]) -> list[list[str]]:
    """The texts of each clean prompt's tokens."""
    return [model.token_texts(model.encode(pair.clean)) for pair in pairs]
