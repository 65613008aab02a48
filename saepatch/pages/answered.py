"""The final step of `saepatch restore`: writing rows and page, and logging to the tracker."""

from pathlib import Path

from saepatch.pages.restored import illustrate, restored_page
from saepatch.pages.tracked import track_answers, track_run
from saepatch.report import KEPT, keep_page, write_page
from saepatch.runs.answers import Answers, write_answers
from saepatch.runs.restorations import RestorePlan
from saepatch.tracking.tracker import Tracker


def show_answers(plan: RestorePlan, answers: Answers, tracker: Tracker) -> None:
    """Write the rows and the report into the run's folder, and log both to the tracker."""
    out = Path(plan.config.out)
    dictionaries, requests = list(plan.sites.values()), [request.prompt for request in plan.requests]
    restored = next(latent_set for latent_set in plan.sets if latent_set.condition == "restored")
    shown = illustrate(plan.model, plan.other, dictionaries, restored.latents, answers, requests, plan.donors())
    page = restored_page(answers, plan.provenance(plan.config.sae, plan.config.seed), shown)
    write_answers(answers, out)
    keep_page(page, out / KEPT)
    write_page(page, out / "report.html")
    track_run(out, page, tracker)
    track_answers(answers, tracker)
