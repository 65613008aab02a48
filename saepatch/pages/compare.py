"""The page that compares two runs."""

from typing import Any

from saepatch.records.statistics import Interval
from saepatch.report import BarChart, Bars, Cell, EstimateCell, Facts, Page, Points, ScatterChart, Section, Table
from saepatch.runs.comparison import RunComparison
from saepatch.runs.lookup import DIFFERENCES

SHOWN = 20  # edits in the bar chart


def compare_page(compared: RunComparison) -> Page:
    """The page of a comparison: settings that differ, figures, and the largest effects of either run in both."""
    a, b = str(compared.first.path), str(compared.second.path)
    rows: list[list[Cell]] = [[name, *map(_cell, lines)] for name, *lines in compared.edits]
    both = [(name, lines) for name, *lines in compared.edits if None not in lines]
    blocks = [Table(["edit", a, b], rows, "–: not among the largest effects of that run.")]
    if looked_up := compared.looked_up:
        rows = [[name, *map(_estimate, (x.first, x.second, x.difference))] for name, x in looked_up.items()]
        blocks = [Table(["edit", a, b, "B − A"], rows, f"–: no rows of that edit. {DIFFERENCES}.")]
    charts: list[Any] = []
    if both:
        values = [[_value(line) for line in side] for side in zip(*(lines for _, lines in both))]
        names = [name for name, _ in both]
        charts = [
            ScatterChart(
                "Edits among the largest of both runs",
                a,
                b,
                [Points("edits", values[0], values[1], names)],
                identity=True,
            ),
            BarChart(
                "The same, one by one",
                names[:SHOWN],
                [Bars(a, values[0][:SHOWN]), Bars(b, values[1][:SHOWN])],
                "share of the gap",
            ),
        ]
    lead = f"{len(compared.settings)} settings or hashes differ."
    if compared.edits:
        tops = f"{len(compared.edits)} edits are among the largest of either run, {len(both)} among those of both."
        lead = f"{tops} {lead}"
    sections = [
        Section("Settings that differ", "", [Table(["setting", a, b], [list(row) for row in compared.settings])]),
        Section(
            "Figures", "", [Table(["figure", a, b], [[row[0].replace("_", " "), *row[1:]] for row in compared.figures])]
        ),
    ]
    if compared.edits:
        sections.append(Section("Largest effects", "Shares of the gap of each run's own pairs.", [*charts, *blocks]))
    facts = {"A": a, "B": b, "A finished": compared.first.finished, "B finished": compared.second.finished}
    return Page("Two runs side by side", lead, sections, Facts(facts))


def _cell(line: dict[str, Any] | None) -> Cell:
    if line is None:
        return None
    effect = line["effect"]
    if not isinstance(effect, dict):
        return effect
    return EstimateCell(effect["value"], effect["low"], effect["high"], effect.get("reason", ""))


def _estimate(interval: Interval | None) -> Cell:
    if interval is None:
        return None
    low, high = (None if end != end else end for end in (interval.low, interval.high))
    return EstimateCell(interval.value, low, high, interval.reason)


def _value(line: dict[str, Any]) -> float | None:
    effect = line["effect"]
    return effect["value"] if isinstance(effect, dict) else effect
