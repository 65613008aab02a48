"""Logging of a finished run to trackers: figures, tables, curves and the report."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from saepatch.report import Cell, Chart, Choice, EstimateCell, LineChart, Link, Page, Simple, Table
from saepatch.runs.catalogue import read_run
from saepatch.runs.commands.answers import Answers
from saepatch.runs.kinds import flat
from saepatch.tracking.tracker import Tracker

ANSWERS = 2000  # rows of answers logged, from the first prompts and the first random set
MAPS_OF_PAIRS = "alone"  # ending of options that show a single pair, which are not logged


def track_run(out: Path, page: Page, tracker: Tracker) -> None:
    """Log a finished run: headline figures, tables, heat maps and curves of its page, report, dictionaries.

    Raises:
        UserError: the folder holds no finished run.
    """
    run = read_run(out)
    tracker.summarise(flat(run.kind.figures(run.summary)))
    hashes = {name: run.summary[name] for name in ("model", "dictionaries")}
    tracker.configure({"model_hashes": hashes, "rows": run.summary["rows"]})
    track_page(page, out / "report.html", tracker)
    track_dictionaries(str(run.settings.get("sae", "")), tracker)


def track_answers(answers: Answers, tracker: Tracker) -> None:
    """Log the answers of a run of `restore`."""
    first = [row for row in answers.rows if row.draw == 0][:ANSWERS]
    columns = ("example", "prompt", "harmful", "condition", "latents", "outcome", "score", "answer")
    tracker.table("Judged answers", columns, [[getattr(row, name) for name in columns] for row in first])


def track_dictionaries(sae: str, tracker: Tracker) -> None:
    """Log a folder of dictionaries by path and hash; dictionaries on a hub are in the settings by name and hash."""
    if sae and Path(sae).is_dir():
        tracker.artifact(f"sae-{Path(sae).name}", Path(sae))


def track_page(page: Page, path: Path, tracker: Tracker) -> None:
    """Log a page's tables, curves and figures, and its file."""
    seen: Counter[str] = Counter()

    def fresh(name: str) -> str:
        seen[name] += 1
        return name if seen[name] == 1 else f"{name} {seen[name]}"

    for section in page.sections:
        for block in _blocks(section.blocks):
            if isinstance(block, Table):
                tracker.table(fresh(section.title), *plain_table(block, path.name))
            elif isinstance(block, LineChart) and _shares_an_axis(block):
                tracker.curve(
                    fresh(block.title), block.x_label, block.series[0].x, {line.name: line.y for line in block.series}
                )
            elif isinstance(block, Chart):
                tracker.figure(fresh(block.title), block)
    tracker.page("report", path)


def _blocks(some: Sequence[Any]) -> Iterator[Simple]:
    """Tables and charts, including those in choices, without maps of single pairs and without cards."""
    for block in some:
        if isinstance(block, Choice):
            for name, inner in block.options:
                if not name.endswith(MAPS_OF_PAIRS):
                    yield from _blocks(inner)
        elif isinstance(block, (Table, Chart)):
            yield block


def _shares_an_axis(chart: LineChart) -> bool:
    return bool(chart.series) and all(list(line.x) == list(chart.series[0].x) for line in chart.series)


def plain_table(table: Table, page: str) -> tuple[list[str], list[list[Any]]]:
    """A table as columns and rows of plain values: an interval becomes three columns; a link its text and, in a column
    `card`, its address on the page, as in report.html#resid_post.3-966."""
    ranged = [any(isinstance(row[i], EstimateCell) for row in table.rows) for i in range(len(table.columns))]
    columns = [
        name
        for title, wide in zip(table.columns, ranged)
        for name in ((title, f"{title} low", f"{title} high") if wide else (title,))
    ]
    rows = [[v for cell, wide in zip(row, ranged) for v in _values(cell, wide)] for row in table.rows]
    links = [next((cell.anchor for cell in row if isinstance(cell, Link)), None) for row in table.rows]
    if any(links):
        columns.append("card")
        rows = [[*row, anchor and f"{page}#{anchor}"] for row, anchor in zip(rows, links)]
    return columns, rows


def _values(cell: Cell, wide: bool) -> tuple[Any, ...]:
    if isinstance(cell, EstimateCell):
        return cell.value, cell.low, cell.high
    value = cell.text if isinstance(cell, Link) else cell
    return (value, None, None) if wide else (value,)
