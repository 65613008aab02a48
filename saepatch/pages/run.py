"""The page of one run."""

from pathlib import Path

from saepatch.pages.cards import cards
from saepatch.pages.curves import groups, verified
from saepatch.pages.left import Left, read_left
from saepatch.pages.maps import edits, maps
from saepatch.pages.overview import facts, lead, overview
from saepatch.report import Page, write_page


def write_report(out: Path) -> Path:
    """Write `report.html` into a finished run's folder, from the files there alone.

    Raises:
        UserError: it holds no finished run of `patch` or `attribute`, or cannot be written.
    """
    return write_page(run_page(read_left(out)), out / "report.html")


def run_page(left: Left) -> Page:
    """The page of a run."""
    found = [*overview(left), groups(left), maps(left), verified(left), edits(left), cards(left)]
    sections = [section for section in found if section is not None]
    title = f"saepatch {left.run.work}: {left.run.task} in {left.run.model}"
    return Page(title, lead(left), sections, facts(left))
