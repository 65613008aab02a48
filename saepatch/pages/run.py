"""The page of one run."""

from collections.abc import Callable, Mapping
from pathlib import Path

from saepatch.errors import UserError
from saepatch.pages.cards import cards_section
from saepatch.pages.commands.answered import read_answers_again
from saepatch.pages.commands.circuit import page_of_circuit, read_circuit_again
from saepatch.pages.commands.edited import page_of_edits
from saepatch.pages.commands.restored import page_of_folder
from saepatch.pages.gather import read_sweep_again
from saepatch.pages.overview import facts, lead, overview
from saepatch.pages.sweeps.curves import groups, verified
from saepatch.pages.sweeps.pictures import pictures
from saepatch.pages.sweeps.run_data import RunData, read_run_data
from saepatch.pages.sweeps.run_maps import edits, maps
from saepatch.reading.cards import Card
from saepatch.report import KEPT, Cell, Page, Section, Simple, Table, read_page, write_page
from saepatch.runs.catalogue import RunFolder, read_json, read_run

EFFECTS = 8  # effects listed on a card


def write_report(out: Path) -> Page:
    """Write `report.html` into a finished run's folder, from the files there alone; returns the page.

    A stored page is used if there is one; otherwise the page is made by `PAGES` from rows and summary (for `restore`,
    without the contents that need the model).

    Raises:
        UserError: there is no stored page and no run of a known kind, or the folder cannot be written.
    """
    page = page_of(out)
    write_page(page, out / "report.html")
    return page


def page_of(out: Path) -> Page:
    """The page of a finished run: the stored one if there is one, otherwise made from the files.

    Raises:
        UserError: there is no stored page and no run of a known kind.
    """
    if (kept := out / KEPT).exists():
        return read_page(read_json(kept))
    folder = read_run(out)
    if folder.work not in PAGES:
        raise UserError(f"{str(out)!r} has no run of {', '.join(PAGES)}, and no page: give the folder of a run")
    return PAGES[folder.work](folder)


def run_page(run: RunData) -> Page:
    """The page of a run."""
    sections = [*overview(run), groups(run), maps(run), pictures(run), verified(run), edits(run), _cards(run)]
    title = f"saepatch {run.folder.work}: {run.folder.task} in {run.folder.model}"
    return Page(title, lead(run), [section for section in sections if section is not None], facts(run))


def _cards(run: RunData) -> Section | None:
    """A card for each described latent, largest effects first."""
    if not run.cards:
        return None
    which = "The latents with the largest effects"
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


def _swept(folder: RunFolder) -> Page:
    return run_page(read_run_data(folder.path))


PAGES: Mapping[str, Callable[[RunFolder], Page]] = {
    "patch": _swept,
    "attribute": _swept,
    "circuit": page_of_circuit,
    "edit": page_of_edits,
    "restore": page_of_folder,
}
READERS: Mapping[str, Callable[[RunFolder], None]] = {
    "patch": read_sweep_again,
    "attribute": read_sweep_again,
    "circuit": read_circuit_again,
    "restore": read_answers_again,
}


def read_again(out: Path) -> None:
    """Load a finished run's model and dictionaries again, and store what its page needs of them: tokens and cards.

    Raises:
        UserError: there is no finished run, its kind needs no second reading, or its inputs no longer exist.
    """
    run = read_run(out)
    if run.work not in READERS:
        raise UserError(
            f"{str(out)!r} holds a run of {run.work or 'no known command'}: --read loads the model of a run of "
            f"{', '.join(READERS)} again; leave it out for any other, whose page is complete"
        )
    READERS[run.work](run)
