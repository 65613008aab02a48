"""Reports: self-contained HTML files made from plain values, independent of models.

May import records and below.

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
    Chips,
    Choice,
    ColouredTokens,
    Comparison,
    Details,
    EstimateCell,
    Facts,
    GraphEdge,
    GraphNode,
    Headline,
    HeatMap,
    Histogram,
    LineChart,
    Link,
    NodeGraph,
    Notices,
    Page,
    PictureMap,
    Points,
    Reference,
    ScatterChart,
    Section,
    Series,
    Simple,
    Table,
)
from saepatch.report.figure import svg_of, write_figure, write_figures
from saepatch.report.kept import KEPT, keep_page, read_page
from saepatch.report.notebook import Figure, Shown, fragment
from saepatch.report.page import render, write_page
from saepatch.report.text import token_text

__all__ = [
    "KEPT",
    "BarChart",
    "Bars",
    "Block",
    "Cell",
    "Chart",
    "Chips",
    "Choice",
    "ColouredTokens",
    "Comparison",
    "Details",
    "EstimateCell",
    "Facts",
    "Figure",
    "GraphEdge",
    "GraphNode",
    "Headline",
    "HeatMap",
    "Histogram",
    "LineChart",
    "Link",
    "NodeGraph",
    "Notices",
    "Page",
    "PictureMap",
    "Points",
    "Reference",
    "ScatterChart",
    "Section",
    "Series",
    "Shown",
    "Simple",
    "Table",
    "fragment",
    "keep_page",
    "read_page",
    "render",
    "svg_of",
    "token_text",
    "write_figure",
    "write_figures",
    "write_page",
]
