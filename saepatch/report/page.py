"""From a page's values to one HTML file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from saepatch.report.blocks import (
    BarChart,
    Cell,
    Chart,
    Interval,
    LineChart,
    Page,
    ScatterChart,
    Series,
    Table,
    Tokens,
)
from saepatch.report.charts import NARROW, PALETTE, WIDE, draw, said
from saepatch.report.files import SOURCES, stylesheet, write_whole
from saepatch.report.svg import outline
from saepatch.report.text import MISSING, common_format, finite, number, visible


def write_page(page: Page, path: Path) -> Path:
    """Writes the page as one HTML file: whole, or not at all.

    Args:
        page: What to write.
        path: The file; folders on the way are made, an older file is replaced.

    Returns:
        The path.

    Raises:
        UserError: The file cannot be written there.
    """
    write_whole(path, render(page), "the report")
    return path


def render(page: Page) -> str:
    """The page as HTML."""
    script = (SOURCES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The browser runs this one script and no other, whatever a text on the page holds.
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"script-src 'sha256-{digest}'"
    )
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            page=page,
            anchors=_anchors([section.title for section in page.sections]),
            policy=policy,
            script=Markup(script),
            style=Markup(stylesheet("palette", "page", "chart")),
        )
    )


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("saepatch.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Whatever a template puts out as plain text is made visible before it is escaped.
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.tests["of"] = lambda block, name: type(block).__name__ == name
    environment.filters["prose"] = _prose
    environment.filters["marked"] = _marked
    environment.globals.update(
        both_widths=_both_widths, table_rows=_table_rows, numeric=_numeric, token_style=_token_style, palette=PALETTE
    )
    environment.globals["numbers"] = _numbers
    environment.globals["number"] = number
    environment.globals["outline"] = outline
    return environment


def _anchors(titles: Sequence[str]) -> list[str]:
    """An id for each title, all different."""
    slugs = [re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") for title in titles]
    return [f"s{index + 1}-{slug}" if slug else f"s{index + 1}" for index, slug in enumerate(slugs)]


def _prose(text: str) -> Markup:
    """Paragraphs out of blank lines, code out of backticks; everything else is text."""
    paragraphs = [paragraph for paragraph in re.split(r"\n\s*\n", text.strip()) if paragraph.strip()]
    out = []
    for paragraph in paragraphs:
        # In prose a line end is a blank.
        safe = re.sub(r"(?<=\d) ?%(?!\w)", "\u00a0%", str(escape(visible(" ".join(paragraph.split())))))
        out.append("<p>" + re.sub(r"`([^`]+)`", r"<code>\1</code>", safe) + "</p>")
    return Markup("\n".join(out))


def _marked(text: str, words: Sequence[str]) -> Markup:
    """The text with the words marked."""
    shown = visible(text)
    wanted = [re.escape(visible(word)) for word in sorted(words, key=len, reverse=True) if word]
    if not wanted:
        return escape(shown)
    parts = re.split(f"({'|'.join(wanted)})", shown, flags=re.IGNORECASE)
    return Markup("").join(
        Markup("<mark>{}</mark>").format(part) if index % 2 else escape(part) for index, part in enumerate(parts)
    )


def _both_widths(chart: Chart) -> Markup:
    """The chart for a wide and for a narrow page; the stylesheet shows one."""
    return Markup("").join(
        Markup('<div class="{}">{}</div>').format(kind, draw(chart, width).svg())
        for width, kind in ((WIDE, "wide"), (NARROW, "narrow"))
    )


@dataclass(frozen=True)
class _ShownCell:
    text: str
    key: str
    """What the cell sorts by; empty for a missing value, which goes last."""
    numeric: bool
    note: str = ""


def _numeric(table: Table, column: int) -> bool:
    """Whether a column holds numbers, and nothing but numbers and gaps."""
    cells = [row[column] for row in table.rows if row[column] is not None]
    return bool(cells) and all(
        isinstance(cell, (int, float, Interval)) and not isinstance(cell, bool) for cell in cells
    )


def _table_rows(table: Table) -> list[list[_ShownCell]]:
    """The cells as they are shown, column by column in one format."""
    specs = []
    for index, name in enumerate(table.columns):
        plain = [_value(row[index]) for row in table.rows]
        specs.append(table.formats.get(name) or common_format([v for v in plain if not isinstance(v, (str, bool))]))
    return [[_shown(cell, spec) for cell, spec in zip(row, specs)] for row in table.rows]


def _value(cell: Cell) -> str | bool | float | int | None:
    return cell.value if isinstance(cell, Interval) else cell


def _shown(cell: Cell, spec: str) -> _ShownCell:
    value = _value(cell)
    if isinstance(value, bool):
        return _ShownCell("yes" if value else "no", "1" if value else "0", False)
    if isinstance(value, str):
        return _ShownCell(value, value.casefold(), False)
    note = ""
    if isinstance(cell, Interval) and finite(cell.low) and finite(cell.high):
        note = f"[{number(cell.low, spec)}, {number(cell.high, spec)}]"
    return _ShownCell(number(value, spec), repr(float(value)) if finite(value) else "", True, note)


def _token_style(tokens: Tokens, index: int) -> tuple[str, str, str]:
    """Class, strength in per cent and tooltip of a token."""
    value = tokens.values[index]
    top = max((abs(v) for v in tokens.values if finite(v)), default=0.0)
    spec = tokens.value_format or common_format(tokens.values)
    if not finite(value):
        return "none", "0", MISSING
    share = abs(value) / top if top else 0.0
    return ("positive" if value >= 0 else "negative"), f"{60 * share:.0f}", number(value, spec)


def _numbers(chart: Chart) -> Table:
    """The numbers behind a chart, for those who cannot see it or want to copy them."""
    if isinstance(chart, LineChart):
        columns = [chart.x_label or "x", *(line.name for line in chart.series)]
        xs = sorted({x for line in chart.series for x in line.x if finite(x)})
        rows = [[number(x), *(_at(line, x, chart.y_format) for line in chart.series)] for x in xs]
        return Table(columns, rows)
    if isinstance(chart, BarChart):
        rows = [
            [name, *(said(b.values[i], _span(b.low, b.high, i), chart.value_format) for b in chart.bars)]
            for i, name in enumerate(chart.labels)
        ]
        return Table([chart.value_label or "", *(bars.name for bars in chart.bars)], rows)
    if isinstance(chart, ScatterChart):
        spec = chart.value_format
        return Table(
            ["", "point", chart.x_label or "x", chart.y_label or "y"],
            [
                [points.name, points.labels[i] if points.labels else str(i), number(x, spec), number(y, spec)]
                for points in chart.series
                for i, (x, y) in enumerate(zip(points.x, points.y))
            ],
        )
    cells = [[name, *(number(v, chart.value_format) for v in row)] for name, row in zip(chart.rows, chart.values)]
    return Table([chart.row_label, *chart.columns], cells)


def _span(
    low: Sequence[float | None] | None, high: Sequence[float | None] | None, index: int
) -> tuple[float | None, float | None]:
    return (None, None) if low is None or high is None else (low[index], high[index])


def _at(line: Series, x: float, spec: str) -> str:
    """What a line says at an x; a gap where it has no such x."""
    found = [said(y, _span(line.low, line.high, i), spec) for i, (at, y) in enumerate(zip(line.x, line.y)) if at == x]
    return "; ".join(found) or MISSING
