"""The page of one run."""

from pathlib import Path

from saepatch.pages.cards import cards_section
from saepatch.pages.curves import groups, verified
from saepatch.pages.overview import facts, lead, overview
from saepatch.pages.restored import page_of_folder
from saepatch.pages.run_data import RunData, read_run_data
from saepatch.pages.run_maps import edits, maps
from saepatch.reading.cards import Card
from saepatch.report import KEPT, Cell, Page, Section, Simple, Table, read_page, write_page
from saepatch.runs.catalogue import read_json, read_run

EFFECTS = 8  # of a card, in this run


def write_report(out: Path) -> Path:
    """Write `report.html` into a finished run's folder, from the files there alone.

    Runs of `patch` and `attribute` are drawn from their rows and summary; of any other, the page that it kept. One of
    `restore` that kept none is drawn from its rows and summary, too, without what needs the model.

    Raises:
        UserError: the folder holds neither, or cannot be written.
    """
    kept = out / KEPT
    if kept.exists():
        page = read_page(read_json(kept))
    elif (run := read_run(out)).work == "restore":
        page = page_of_folder(run)
    else:
        page = run_page(read_run_data(out))
    return write_page(page, out / "report.html")


def run_page(run: RunData) -> Page:
    """The page of a run."""
    sections = [*overview(run), groups(run), maps(run), verified(run), edits(run), _cards(run)]
    title = f"saepatch {run.folder.work}: {run.folder.task} in {run.folder.model}"
    return Page(title, lead(run), [section for section in sections if section is not None], facts(run))


def _cards(run: RunData) -> Section | None:
    """A card for each latent that was read, largest effects first."""
    if not run.cards:
        return None
    which = "Of the latents with the largest effects"
    return cards_section(run.cards, which, "this run's own prompts", effects_of=lambda card: _effects(run, card))


def _effects(run: RunData, card: Card) -> list[Simple]:
    """The latent's largest effects in the run, alone or in a group."""
    keys = run.changes.keys
    mine = [
        number
        for direction in run.directions
        for number in run.own(direction)
        if (keys[number].site, keys[number].component) == (card.site, "latent")
        and str(card.latent) in keys[number].latent.split(",")
    ]
    mine = run.edits.by_size(mine)[:EFFECTS]
    if not mine:
        return []
    rows: list[list[Cell]] = [
        [keys[n].direction, keys[n].latent, keys[n].position, interval, int(run.changes.counts[n])]
        for n, interval in zip(mine, run.intervals(mine))
    ]
    columns = ["direction", "patched", "position", "effect", "pairs changed"]
    what = "estimated effects" if run.is_screen else "effects"
    return [Table(columns, rows, f"Its largest {what} in this run.", {"effect": ".3f", "pairs changed": "d"})]
