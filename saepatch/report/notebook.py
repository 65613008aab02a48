"""Results that show themselves: HTML for a notebook's output, figures, and a page of their own."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from markupsafe import Markup

from saepatch.errors import UserError
from saepatch.report.blocks import Block, Chart, Facts, HeatMap, Histogram, Page, PictureMap, Section, Simple
from saepatch.report.charts import draw
from saepatch.report.figure import svg_of, write_figure
from saepatch.report.files import stylesheet
from saepatch.report.heat_maps import map_width
from saepatch.report.page import environment, write_page
from saepatch.report.svg import NARROW, WIDE

# Where a notebook says which of its themes is on: JupyterLab and nbconvert, VS Code, Colab, mkdocs-material.
LIGHT = '[data-jp-theme-light="true"], .vscode-light, html[theme="light"], [data-md-color-scheme="default"]'
DARK = '[data-jp-theme-light="false"], .vscode-dark, html[theme="dark"], [data-md-color-scheme="slate"]'


def fragment(blocks: Sequence[Simple], title: str) -> str:
    """Blocks as HTML that loads nothing, for `_repr_html_`: own style, no script, texts escaped, light and dark."""
    return (
        environment()
        .get_template("fragment.html.j2")
        .render(blocks=blocks, title=title, compact=True, style=Markup(_style()), drawings=_drawn_once)
    )


@cache
def _style() -> str:
    palette = re.sub(r"\s+", " ", stylesheet("palette"))
    light, dark = re.findall(r":root \{([^}]*)\}", palette)[:2]
    fixed = (
        "display: block; background: var(--paper); color: var(--ink); font: 13px/1.5 var(--sans); padding: 10px 12px;"
    )
    rules = [
        f".saepatch {{{fixed}{light} color-scheme: light}}",
        f"@media (prefers-color-scheme: dark) {{.saepatch {{{dark} color-scheme: dark}}}}",
        f":is({LIGHT}) .saepatch {{{light} color-scheme: light}}",
        f":is({DARK}) .saepatch {{{dark} color-scheme: dark}}",
    ]
    sheet = re.sub(r"/\*.*?\*/|\s+", " ", stylesheet("chart", "notebook"))
    for selectors, body in re.findall(r"([^{}]+)\{([^{}]*)\}", sheet):
        below = ", ".join(f".saepatch {selector.strip()}" for selector in selectors.split(","))
        rules.append(f"{below} {{{body.strip()}}}")
    return "\n".join(rules)


def _drawn_once(chart: Chart) -> Markup:
    """The chart in one width: a fragment has no room for the second drawing of pages."""
    if isinstance(chart, HeatMap):
        width = max(map_width(chart), min(WIDE, 60 * len(chart.columns)))
        inside = Markup('<div style="width:{}px">{}</div>').format(width, draw(chart, width).svg())
        return Markup('<div class="scroll">{}</div>').format(inside)
    width = NARROW if isinstance(chart, Histogram | PictureMap) else WIDE
    return Markup('<div class="once">{}</div>').format(draw(chart, width).svg())


class Shown(ABC):
    """Base of results that show themselves in notebooks and write a page of their own.

    A subclass defines what is shown in `blocks`, and the heading in `title`.
    """

    @property
    @abstractmethod
    def title(self) -> str:
        """Heading shown above the blocks."""

    @abstractmethod
    def blocks(self) -> list[Simple]:
        """The result as blocks of a report."""

    def figures(self) -> list[Block]:
        """Figures of the page that `report` writes, below the blocks."""
        return []

    def _repr_html_(self) -> str:
        return fragment(self.blocks(), self.title)

    def report(self, path: str | Path) -> Path:
        """Write the result as one self-contained HTML file; returns its path.

        Raises:
            UserError: the file cannot be written there.
        """
        sections = [Section("Results", "", self.blocks())]
        if figures := self.figures():
            sections.append(Section("Figures", "", figures))
        return write_page(Page(self.title, "", sections, Facts({})), Path(path))


@dataclass(frozen=True)
class Figure:
    """A chart that shows itself in a notebook and is saved as SVG."""

    chart: Chart

    def __repr__(self) -> str:
        return f"Figure: {self.chart.title} (.save('figure.svg') writes it)"

    def _repr_html_(self) -> str:
        return fragment([replace(self.chart, title="")], self.chart.title)

    def svg(self) -> str:
        """The figure as SVG text, in the light theme."""
        return svg_of(self.chart)

    def save(self, path: str | Path) -> Path:
        """Write the figure as a self-contained SVG file; returns its path.

        Raises:
            UserError: the name does not end in .svg, or the file cannot be written.
        """
        path = Path(path)
        if path.suffix != ".svg":
            raise UserError(f"figures are written as SVG: end the name {path.name!r} in .svg")
        return write_figure(self.chart, path)
