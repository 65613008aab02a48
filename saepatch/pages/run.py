"""The page of one run."""

from pathlib import Path

from saepatch.pages.cards import cards
from saepatch.pages.curves import groups, verified
from saepatch.pages.left import Left, read_left
from saepatch.pages.maps import edits, maps
from saepatch.pages.overview import facts, lead, overview
from saepatch.pages.restored import left_page
from saepatch.report import KEPT, Page, read_page, write_page
from saepatch.runs.catalogue import read_json, read_run


def write_report(out: Path) -> Path:
    """Write `report.html` into a finished run's folder, from the files there alone.

    Runs of `patch` and `attribute` are drawn from their rows and summary; of any other, the page that it kept. One of
    `restore` that kept none is drawn from its rows and summary, too, without what only the model could say.

    Raises:
        UserError: the folder holds neither, or cannot be written.
    """
    kept = out / KEPT
    if kept.exists():
        page = read_page(read_json(kept))
    elif (run := read_run(out)).work == "restore":
        page = left_page(run)
    else:
        page = run_page(read_left(out))
    return write_page(page, out / "report.html")


def run_page(left: Left) -> Page:
    """The page of a run."""
    found = [*overview(left), groups(left), maps(left), verified(left), edits(left), cards(left)]
    sections = [section for section in found if section is not None]
    title = f"saepatch {left.run.work}: {left.run.task} in {left.run.model}"
    return Page(title, lead(left), sections, facts(left))
