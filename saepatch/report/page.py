"""Rendering of a page as one HTML file that loads nothing."""

from __future__ import annotations

import base64
import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from saepatch.report.blocks import (
    BarChart,
    Block,
    Cell,
    Chart,
    ColouredTokens,
    Comparison,
    EstimateCell,
    HeatMap,
    Histogram,
    LineChart,
    Link,
    NodeGraph,
    Page,
    PictureMap,
    ScatterChart,
    Series,
    Table,
)
from saepatch.report.charts import PALETTE, draw
from saepatch.report.figure import flat_style
from saepatch.report.files import SOURCES, stylesheet, write_whole
from saepatch.report.heat_maps import map_width
from saepatch.report.svg import NARROW, WIDE, outline
from saepatch.report.text import MISSING, common_format, finite, folded, number, visible


def write_page(page: Page, path: Path) -> Path:
    """Writes the page as one HTML file, atomically.

    Args:
        page: What to write.
        path: The file; missing parent folders are created, an existing file is replaced.

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
    # The browser runs this script and no other, whatever the texts on the page contain.
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"script-src 'sha256-{digest}'"
    )
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            page=page,
            compact=False,
            anchors=_anchors([section.title for section in page.sections]),
            policy=policy,
            script=Markup(script),
            style=Markup(stylesheet("palette", "page", "chart")),
            figure_style=Markup(flat_style()),
            fresh=_ids(),
        )
    )


def _ids() -> Callable[[str], str]:
    """Ids of the page's elements whose state is kept in the address: t1, t2, c1, … in page order."""
    counts: Counter[str] = Counter()

    def fresh(kind: str) -> str:
        counts[kind] += 1
        return f"{kind}{counts[kind]}"

    return fresh


@lru_cache(maxsize=1)
def environment() -> Environment:
    """The environment of all templates: it escapes texts and draws charts."""
    environment = Environment(
        loader=PackageLoader("saepatch.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Control characters in template output are made visible before escaping.
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.tests["of"] = lambda block, name: type(block).__name__ == name
    environment.filters["prose"] = _prose
    environment.filters["marked"] = _marked
    environment.filters["changed"] = _changed
    environment.filters["folded"] = folded
    environment.globals.update(
        drawings=_drawings, table_rows=_table_rows, numeric=_numeric, token_styles=_token_styles, palette=PALETTE
    )
    environment.globals["numbers"] = _numbers
    environment.globals["in_rows"] = _in_rows
    environment.globals["table_name"] = _table_name
    environment.globals["number"] = number
    environment.globals["outline"] = outline
    environment.globals["joined"] = " ".join
    return environment


def _in_rows(blocks: Sequence[Block]) -> list[list[Block]]:
    """Blocks in order; two small ones of a kind that follow each other share a row, where a page is wide enough."""
    rows: list[list[Block]] = []
    for block in blocks:
        kind = _small(block)
        if kind and rows and len(rows[-1]) == 1 and _small(rows[-1][0]) == kind:
            rows[-1].append(block)
        else:
            rows.append([block])
    return rows


HALF = 520  # pixels of half of a wide page
CHARACTERS = 68  # about so many of a table are as wide
LABELS = 8  # bars with names above them


def _small(block: Block) -> str:
    """What kind of block this is, if half of a wide page is enough for it; else empty."""
    if isinstance(block, Comparison):
        return "comparison" if len(folded(block.columns)) < 4 else ""
    if isinstance(block, ColouredTokens):
        return "tokens"
    if isinstance(block, Table):
        return "figure" if _characters(block) <= CHARACTERS and len(block.rows) < 20 else ""
    if isinstance(block, HeatMap):
        return "figure" if map_width(block) <= HALF else ""
    if isinstance(block, BarChart):
        return "figure" if len(block.labels) <= LABELS else ""
    return "figure" if isinstance(block, LineChart | ScatterChart) else ""


def _characters(table: Table) -> int:
    """About how wide a table is: names with their arrows, numbers with their intervals; long texts wrap."""
    wide = 0
    for name, cells in zip(table.columns, zip(*table.rows)):
        ranged = any(isinstance(cell, EstimateCell) for cell in cells)
        texts = [len(value) for cell in cells if isinstance(value := _value(cell), str)]
        wide += max(len(name) + 2, 20 if ranged else 0, min(14, max(texts, default=0) + 2))
    return wide


def _anchors(titles: Sequence[str]) -> list[str]:
    """A unique id for each title."""
    slugs = [re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") for title in titles]
    return [f"s{index + 1}-{slug}" if slug else f"s{index + 1}" for index, slug in enumerate(slugs)]


def _prose(text: str) -> Markup:
    """HTML of a text: blank lines separate paragraphs, backticks mark code; everything else is escaped."""
    paragraphs = [paragraph for paragraph in re.split(r"\n\s*\n", text.strip()) if paragraph.strip()]
    out = []
    for paragraph in paragraphs:
        # Line breaks within a paragraph count as spaces.
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


def _changed(text: str, before: str) -> Markup:
    """The text, with the words marked that differ from `before`."""
    words, old = re.findall(r"\S+\s*|\s+", text), [word.strip() for word in re.findall(r"\S+\s*|\s+", before)]
    matcher = difflib.SequenceMatcher(None, old, [word.strip() for word in words], autojunk=False)
    parts = []
    for kind, _, _, start, end in matcher.get_opcodes():
        piece = "".join(words[start:end])
        if kind == "equal" or not piece.strip():
            parts.append(escape(visible(piece)))
            continue
        word = piece.rstrip()  # do not mark the trailing space
        parts.append(Markup("<mark>{}</mark>").format(visible(word)) + escape(visible(piece[len(word) :])))
    return Markup("").join(parts)


def _drawings(chart: Chart) -> Markup:
    """The chart for wide and for narrow pages, of which the style sheet shows one; or a single one that scrolls."""
    if isinstance(chart, HeatMap) and map_width(chart) > NARROW:
        width = max(map_width(chart), min(WIDE, 60 * len(chart.columns)))
        return Markup(
            '<div class="drawing scroll" tabindex="0" role="region" aria-label="{}">'
            '<div style="width:{}px">{}</div></div>'
            '<p class="sideways" aria-hidden="true">↔ wider than the page: scrolls sideways</p>'
        ).format(visible(chart.title), width, draw(chart, width).svg())
    if isinstance(chart, NodeGraph):
        drawing = draw(chart, WIDE)
        return Markup(
            '<div class="drawing scroll graph" tabindex="0" role="region" aria-label="{}">'
            '<div style="width:{}px">{}</div></div>'
            '<p class="sideways" aria-hidden="true">↔ wider than the page: scrolls sideways</p>'
        ).format(visible(chart.title), round(drawing.width), drawing.svg())
    if isinstance(chart, Histogram | PictureMap):  # small enough for every page
        return Markup('<div class="drawing small">{}</div>').format(draw(chart, NARROW).svg())
    both = Markup("").join(
        Markup('<div class="{}">{}</div>').format(kind, draw(chart, width).svg())
        for width, kind in ((WIDE, "wide"), (NARROW, "narrow"))
    )
    return Markup('<div class="drawing">{}</div>').format(both)


@dataclass(frozen=True)
class _ShownCell:
    text: str
    key: str
    """Sort key; empty for a missing value, which sorts last."""
    numeric: bool
    note: str = ""
    low: str = ""
    high: str = ""
    anchor: str = ""


def _numeric(table: Table, column: int) -> bool:
    """Whether a column contains only numbers and gaps, and at least one number."""
    cells = [row[column] for row in table.rows if row[column] is not None]
    return bool(cells) and all(
        isinstance(cell, (int, float, EstimateCell)) and not isinstance(cell, bool) for cell in cells
    )


def _table_rows(table: Table) -> list[list[_ShownCell]]:
    """The cells as displayed, with one number format per column."""
    specs = []
    for index, name in enumerate(table.columns):
        plain = [_value(row[index]) for row in table.rows]
        specs.append(table.formats.get(name) or common_format([v for v in plain if not isinstance(v, (str, bool))]))
    return [[_shown(cell, spec) for cell, spec in zip(row, specs)] for row in table.rows]


def _value(cell: Cell) -> str | bool | float | int | None:
    return cell.value if isinstance(cell, EstimateCell) else cell.text if isinstance(cell, Link) else cell


def _shown(cell: Cell, spec: str) -> _ShownCell:
    value = _value(cell)
    if isinstance(value, bool):
        return _ShownCell("yes" if value else "no", "1" if value else "0", False)
    if isinstance(value, str):
        anchor = cell.anchor if isinstance(cell, Link) else ""
        return _ShownCell(value, value.casefold(), False, anchor=anchor)
    key = _exact(value)
    if isinstance(cell, EstimateCell) and finite(cell.low) and finite(cell.high):
        note = f"[{number(cell.low, spec)}, {number(cell.high, spec)}]"
        return _ShownCell(number(value, spec), key, True, note, _exact(cell.low), _exact(cell.high))
    if isinstance(cell, EstimateCell) and cell.reason:
        return _ShownCell(number(value, spec), key, True, f"({visible(cell.reason)})")
    return _ShownCell(number(value, spec), key, True)


def _exact(value: float | int | None) -> str:
    """A number with full precision, for sorting and copying; empty where it is missing."""
    return f"{float(value):.9g}" if finite(value) else ""


def _token_styles(tokens: ColouredTokens) -> list[tuple[str, str, str]]:
    """CSS class, colour strength in per cent and tooltip of each token."""
    top = max((abs(v) for v in tokens.values if finite(v)), default=0.0)
    spec = tokens.value_format or common_format(tokens.values)

    def style(value: float | None) -> tuple[str, str, str]:
        if not finite(value):
            return "none", "0", MISSING
        share = abs(value) / top if top else 0.0
        return ("positive" if value >= 0 else "negative"), f"{50 * share:.0f}", number(value, spec)

    return [style(value) for value in tokens.values]


def _table_name(table: Table) -> str:
    """Accessible name of a table, made of its columns."""
    return "Table of " + ", ".join(name for name in table.columns[:6] if name)


def _numbers(chart: Chart) -> Table:
    """The numbers of a chart as a table, for screen readers and for copying."""
    if isinstance(chart, LineChart):
        names = [chart.x_label or "x", *(line.name for line in chart.series)]
        xs = sorted({x for line in chart.series for x in line.x if finite(x)})
        rows: list[list[Cell]] = [[x, *(_at(line, x) for line in chart.series)] for x in xs]
        return Table(names, rows, formats=_formats(names[1:], chart.y_format) | _formats(names[:1], chart.x_format))
    if isinstance(chart, BarChart):
        names = [chart.value_label or "", *(bars.name for bars in chart.bars)]
        rows = [
            [name, *(_cell(b.values[i], b.low, b.high, i) for b in chart.bars)] for i, name in enumerate(chart.labels)
        ]
        return Table(names, rows, formats=_formats(names[1:], chart.value_format))
    if isinstance(chart, Histogram):
        rows = [[low, high, n] for low, high, n in zip(chart.edges, chart.edges[1:], chart.counts)]
        return Table(["from", "to", chart.y_label], rows)
    if isinstance(chart, ScatterChart):
        names = ["", "point", chart.x_label or "x", chart.y_label or "y"]
        rows = [
            [points.name, points.labels[i] if points.labels else str(i), x, y]
            for points in chart.series
            for i, (x, y) in enumerate(zip(points.x, points.y))
        ]
        return Table(names, rows, formats=_formats(names[2:], chart.value_format))
    if isinstance(chart, PictureMap):
        rows = [[name, *box, value] for name, box, value in zip(chart.names, chart.boxes, chart.values)]
        return Table(
            ["part", "left", "top", "right", "bottom", "value"], rows, formats=_formats(["value"], chart.value_format)
        )
    if isinstance(chart, NodeGraph):
        ordered = sorted(chart.edges, key=lambda edge: -abs(edge.weight))
        rows = [[chart.nodes[edge.up].name, chart.nodes[edge.down].name, edge.weight] for edge in ordered]
        return Table(["from", "to", "weight"], rows, formats=_formats(["weight"], chart.value_format))
    names = [chart.row_label, *chart.columns]
    if chart.columns_below:
        names = [chart.row_label, *(f"{up} / {down}" for up, down in zip(chart.columns, chart.columns_below))]
    rows = [[name, *values] for name, values in zip(chart.rows, chart.values)]
    return Table(names, rows, formats=_formats(names[1:], chart.value_format))


def _formats(names: Sequence[str], spec: str) -> dict[str, str]:
    return dict.fromkeys(names, spec) if spec else {}


def _cell(
    value: float | None, low: Sequence[float | None] | None, high: Sequence[float | None] | None, index: int
) -> Cell:
    return value if low is None or high is None else EstimateCell(value, low[index], high[index])


def _at(line: Series, x: float) -> Cell:
    """A line's value at x; None where it has no point there."""
    cells = [_cell(y, line.low, line.high, i) for i, (point, y) in enumerate(zip(line.x, line.y)) if point == x]
    return cells[0] if cells else None
