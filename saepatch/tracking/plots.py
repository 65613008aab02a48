"""Charts in the formats of other tools."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

from saepatch.report import Chart, HeatMap, svg_of
from saepatch.report.text import finite, number, visible

if TYPE_CHECKING:
    import plotly.graph_objects as go


def plotly_figure(chart: Chart) -> go.Figure | None:
    """A heat map as a plotly figure, its colour scale centred at 0; None for other charts, or without plotly.

    plotly parses labels as markup, where a token ``<s>`` would be invisible: all texts are escaped.
    """
    if not isinstance(chart, HeatMap):
        return None
    try:
        import plotly.graph_objects as go
    except ImportError:
        return None
    below = chart.columns_below or [""] * len(chart.columns)
    columns = [_label(f"{name} / {other}" if other else name) for name, other in zip(chart.columns, below)]
    rows = [_label(name) for name in chart.rows]
    values = [[float(value) if finite(value) else None for value in row] for row in chart.values]
    top = max((abs(value) for row in values for value in row if value is not None), default=0.0) or 1.0
    hover = [[f"{row}, {column}: {number(v, chart.value_format)}" for column, v in zip(columns, line)]
            for row, line in zip(rows, values)]  # fmt: skip
    places: dict[str, Any] = {"type": "linear", "tickmode": "array", "showgrid": False, "zeroline": False}
    heat = go.Heatmap(
        z=values, zmin=-top, zmax=top, zmid=0.0, colorscale="RdBu", reversescale=True, text=hover,
        hoverinfo="text", xgap=1, ygap=1,
    )  # fmt: skip
    layout = go.Layout(
        title=_label(chart.title),
        xaxis={**places, "tickvals": list(range(len(columns))), "ticktext": columns,
               "title": _label(chart.column_label)},
        yaxis={**places, "tickvals": list(range(len(rows))), "ticktext": rows, "autorange": "reversed",
               "title": _label(chart.row_label)},
    )  # fmt: skip
    return go.Figure(heat, layout)


def svg_page(chart: Chart) -> str:
    """A chart's SVG as an HTML page that loads nothing."""
    return f'<!DOCTYPE html><meta charset="utf-8"><title>{html.escape(visible(chart.title))}</title>{svg_of(chart)}'


def _label(text: str) -> str:
    return html.escape(visible(text), quote=False)
