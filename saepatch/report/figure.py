"""Charts as standalone SVG files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from saepatch.report.blocks import BarChart, Chart, HeatMap, Histogram, LineChart, NodeGraph, PictureMap, ScatterChart
from saepatch.report.charts import PALETTE, draw
from saepatch.report.files import stylesheet, write_whole
from saepatch.report.heat_maps import map_width
from saepatch.report.svg import WIDE, element, label, outline, rule

_MARGIN = 20.0


def write_figure(chart: Chart, path: Path) -> Path:
    """Writes a chart as a self-contained SVG file in the light theme, with title and legend.

    The caption is left out: it belongs in the text around the figure.

    Args:
        chart: What to draw.
        path: The file; missing parent folders are created, an existing file is replaced.

    Returns:
        The path.

    Raises:
        UserError: The file cannot be written there.
    """
    write_whole(path, svg_of(chart) + "\n", "the figure")
    return path


def write_figures(charts: Sequence[Chart], path: Path, columns: int = 2) -> Path:
    """Writes several charts to one SVG file, arranged in `columns` columns.

    Returns:
        The path.

    Raises:
        UserError: The file cannot be written there.
    """
    drawn = [svg_of(chart) for chart in charts]
    sizes = [tuple(float(n) for n in re.findall(r'(?:width|height)="([\d.]+)"', drawing)[:2]) for drawing in drawn]
    wide, parts, y = max(width for width, _ in sizes), [], 0.0
    for first in range(0, len(drawn), columns):
        row = range(first, min(first + columns, len(drawn)))
        parts += [drawn[i].replace("<svg ", f'<svg x="{wide * (i - first):g}" y="{y:g}" ', 1) for i in row]
        y += max(sizes[i][1] for i in row)
    size = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {wide * min(columns, len(drawn)):g} {y:g}"}
    paper = element("rect", {"width": "100%", "height": "100%", "class": "paper"})
    style = element("style", {}, Markup(flat_style()))
    whole = element("svg", size, style, paper, *map(Markup, parts))
    write_whole(path, str(whole) + "\n", "the figures")
    return path


def svg_of(chart: Chart) -> str:
    """The SVG of `write_figure` as text."""
    drawing = draw(chart, max(WIDE, map_width(chart)) if isinstance(chart, HeatMap) else WIDE)
    parts = [label(0, 14, chart.title, "title")] if chart.title else []
    top = 34.0 if chart.title else 0.0
    names = _names(chart)
    if len(names) > 1:
        for index, name in enumerate(names):
            # One name per line: names may be long, and SVG text does not wrap.
            key = element(
                "g", {"class": f"s{index % PALETTE}"}, _swatch(chart, index, top), label(32, top + 4, name, "name")
            )
            parts.append(key)
            top += 20
        top += 6
    parts.append(element("g", {"transform": f"translate(0 {top:g})"}, *drawing.parts))
    width, height = drawing.width + 2 * _MARGIN, top + drawing.height + 2 * _MARGIN
    size = {"xmlns": "http://www.w3.org/2000/svg", "width": f"{width:g}", "height": f"{height:g}"}
    body = element("g", {"class": "chart", "transform": f"translate({_MARGIN:g} {_MARGIN:g})"}, *parts)
    paper = element("rect", {"width": "100%", "height": "100%", "class": "paper"})
    style = element("style", {}, Markup(flat_style()))
    return str(element("svg", {**size, "viewBox": f"0 0 {width:g} {height:g}"}, style, paper, body))


def _swatch(chart: Chart, index: int, y: float) -> Markup:
    """The symbol of a legend entry."""
    if isinstance(chart, LineChart):
        return rule(0, y, 24, y, "line")
    if isinstance(chart, ScatterChart):
        return element("path", {"d": outline(index, 12, y), "class": "point"})
    return element("rect", {"x": 6, "y": y - 6, "width": 12, "height": 12, "rx": 1.5, "class": "bar"})


def _names(chart: Chart) -> list[str]:
    """The entries of the legend."""
    if isinstance(chart, (HeatMap, Histogram, NodeGraph, PictureMap)):
        return []
    return (
        [bars.name for bars in chart.bars] if isinstance(chart, BarChart) else [series.name for series in chart.series]
    )


def flat_style() -> str:
    """The charts' style sheet with all variables resolved: SVG-to-PDF converters support neither variables nor
    color-mix."""
    palette = dict(re.findall(r"(--[\w-]+):\s*([^;]+);", stylesheet("palette").partition("}")[0]))
    sheet = re.sub(r"/\*.*?\*/", "", stylesheet("chart", "figure"), flags=re.DOTALL)
    rules = [(selector.strip(), body) for selector, body in re.findall(r"([^{}]+)\{([^{}]*)\}", sheet)]
    series = {
        selector: dict(re.findall(r"(--[\w-]+):\s*([^;]+);", body))
        for selector, body in rules
        if re.fullmatch(r"\.s\d", selector)
    }
    flat = []
    for selector, body in rules:
        if selector in series:
            continue
        if re.search(r"var\(--(s|dash)\b", body):
            flat += [f"{name} {selector} {{{_filled(body, palette | own)}}}" for name, own in series.items()]
        else:
            flat.append(f"{selector} {{{_filled(body, palette)}}}")
    return "\n".join(flat)


def _filled(body: str, values: dict[str, str]) -> str:
    """Declarations with variables replaced by their values; a color-mix becomes its main colour."""
    body = re.sub(r"color-mix\(in srgb, (var\([^)]*\)) \d+%, var\([^)]*\)\)", r"\1", body)
    while "var(" in body:
        body = re.sub(
            r"var\((--[\w-]+)(?:,\s*([^)]*))?\)", lambda match: values.get(match[1], match[2] or "none"), body
        )
    return body
