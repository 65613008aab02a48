"""The report: one self-contained HTML file, made of plain values.

::

    page = Page("Patching", "What was found.", [Section("Results", "Over 200 pairs.", [Table(["k", "effect"], rows)])])
    write_page(page, Path("runs/demo/report.html"))
"""

from saepatch.report.blocks import (
    BarChart,
    Bars,
    Block,
    Cell,
    Chart,
    Comparison,
    Facts,
    Headline,
    HeatMap,
    Interval,
    LineChart,
    Page,
    Points,
    Reference,
    ScatterChart,
    Section,
    Series,
    Table,
    Tokens,
)
from saepatch.report.figure import write_figure
from saepatch.report.page import render, write_page

__all__ = [
    "BarChart",
    "Bars",
    "Block",
    "Cell",
    "Chart",
    "Comparison",
    "Facts",
    "Headline",
    "HeatMap",
    "Interval",
    "LineChart",
    "Page",
    "Points",
    "Reference",
    "ScatterChart",
    "Section",
    "Series",
    "Table",
    "Tokens",
    "render",
    "write_figure",
    "write_page",
]
