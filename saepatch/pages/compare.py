"""Two runs side by side."""

from typing import Any

from saepatch.report import BarChart, Bars, Cell, Facts, Interval, Page, Points, ScatterChart, Section, Table
from saepatch.runs.catalogue import Comparison

SHOWN = 20  # edits in bars


def compare_page(found: Comparison) -> Page:
    """A page of a comparison: what was set otherwise, and the largest effects of either run in both."""
    a, b = str(found.one.path), str(found.other.path)
    rows: list[list[Cell]] = [[name, _cell(one), _cell(other)] for name, one, other in found.edits]
    both = [(name, one, other) for name, one, other in found.edits if one is not None and other is not None]
    blocks = [Table(["edit", a, b], rows, "–: not among the largest of that run.")]
    charts: list[Any] = []
    if both:
        values = [[_value(line) for line in lines] for lines in zip(*((one, other) for _, one, other in both))]
        names = [name for name, _, _ in both]
        charts = [
            ScatterChart(
                "Edits on top of both runs", a, b, [Points("edits", values[0], values[1], names)], identity=True
            ),
            BarChart(
                "The same, one by one",
                names[:SHOWN],
                [Bars(a, values[0][:SHOWN]), Bars(b, values[1][:SHOWN])],
                "share of the gap",
            ),
        ]
    lead = f"{len(found.settings)} settings or hashes differ."
    if found.edits:
        lead = (
            f"{len(found.edits)} edits are among the largest of one run or the other, {len(both)} among those of both. "
            + lead
        )
    sections = [
        Section("Set otherwise", "", [Table(["setting", a, b], [list(row) for row in found.settings])]),
        Section(
            "Figures", "", [Table(["figure", a, b], [[row[0].replace("_", " "), *row[1:]] for row in found.figures])]
        ),
    ]
    if found.one.work != "restore":
        sections.append(Section("Largest effects", "Shares of the gap of each run's own pairs.", [*charts, *blocks]))
    facts = {"A": a, "B": b, "A finished": found.one.finished, "B finished": found.other.finished}
    return Page("Two runs side by side", lead, sections, Facts(facts))


def _cell(line: dict[str, Any] | None) -> Cell:
    if line is None:
        return None
    effect = line["effect"]
    return Interval(effect["value"], effect["low"], effect["high"]) if isinstance(effect, dict) else effect


def _value(line: dict[str, Any]) -> float | None:
    effect = line["effect"]
    return effect["value"] if isinstance(effect, dict) else effect
