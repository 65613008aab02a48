"""The final step of `saepatch restore`: writing rows and page, and logging to the tracker."""

from dataclasses import replace
from pathlib import Path

from saepatch.data.requests import read_requests
from saepatch.dictionaries.latent_set import LatentSet
from saepatch.pages.commands.restored import Illustrations, illustrate, restored_page
from saepatch.pages.gather import if_possible, stored_settings
from saepatch.pages.tracked import track_answers, track_run
from saepatch.report import KEPT, Page, keep_page, write_page
from saepatch.runs.catalogue import RunFolder
from saepatch.runs.commands.answers import Answers, read_answers, write_answers
from saepatch.runs.commands.restorations import RestorePlan, prepare
from saepatch.runs.parts import complete
from saepatch.settings.restore import RestoreConfig
from saepatch.tracking.tracker import Tracker


def show_answers(plan: RestorePlan, answers: Answers, tracker: Tracker) -> None:
    """Write the rows and the report into the run's folder, and log both to the tracker."""
    out = Path(plan.config.out)
    page = _page(plan, answers, if_possible(lambda: _illustrations(plan, answers), Illustrations(_restored(plan))))
    write_answers(answers, out)
    keep_page(page, out / KEPT)
    write_page(page, out / "report.html")
    track_run(out, page, tracker)
    track_answers(answers, tracker)


def read_answers_again(run: RunFolder) -> None:
    """Load the model and dictionaries of a finished run of restore again and store its page with cards and tokens.

    Raises:
        UserError: the run's parts, model, dictionaries or prompts no longer exist, or have changed.
    """
    records = complete(run.path)
    config = stored_settings(RestoreConfig, records[0].folder(run.path), run.path)
    plan = prepare(config)
    plan = replace(plan, requests=read_requests(config.prompts, plan.model, config.chat, config.n))  # of all shards
    answers = replace(read_answers(config, records, plan.judge, plan.judge_version), fvu=plan.fvu)
    keep_page(_page(plan, answers, _illustrations(plan, answers)), run.path / KEPT)


def _page(plan: RestorePlan, answers: Answers, illustrations: Illustrations) -> Page:
    return restored_page(answers, plan.provenance(plan.config.sae, plan.config.seed), illustrations)


def _illustrations(plan: RestorePlan, answers: Answers) -> Illustrations:
    dictionaries, prompts = list(plan.sites.values()), [request.prompt for request in plan.requests]
    return illustrate(plan.model, plan.other, dictionaries, _restored(plan), answers, prompts, plan.donors())


def _restored(plan: RestorePlan) -> LatentSet:
    return next(latent_set.latents for latent_set in plan.sets if latent_set.condition == "restored")
