"""Charts as SVG, drawn for a given width: a page contains each chart twice, for wide and for narrow screens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from markupsafe import Markup

from saepatch.report.blocks import (
    BarChart,
    Bars,
    Chart,
    HeatMap,
    Histogram,
    LineChart,
    NodeGraph,
    Number,
    Points,
    ScatterChart,
    Series,
)
from saepatch.report.graphs import node_graph
from saepatch.report.scales import Scale, linear, logarithmic
from saepatch.report.svg import Drawing, clipped, element, label, marker, rule
from saepatch.report.text import common_format, finite, number, visible, with_interval

WIDE, NARROW = 720, 360
PALETTE = 7  # colours in the stylesheet
_CHARACTER = 6.4  # approximate width in pixels of a letter in an axis label

Span = tuple[Number, Number]


def _spans(low: Sequence[Number] | None, high: Sequence[Number] | None, count: int) -> list[Span]:
    """An interval for each value; (None, None) where there is none."""
    if low is None or high is None:
        return [(None, None)] * count
    return list(zip(low, high))


def draw(chart: Chart, width: int) -> Drawing:
    """Draw the chart `width` pixels wide; a graph has a width of its own."""
    if isinstance(chart, NodeGraph):
        return node_graph(chart)
    if isinstance(chart, LineChart):
        return line_chart(chart, width)
    if isinstance(chart, ScatterChart):
        return scatter_chart(chart, width)
    if isinstance(chart, Histogram):
        return histogram(chart, width)
    return bar_chart(chart, width) if isinstance(chart, BarChart) else heat_map(chart, width)


# Lines


def line_chart(chart: LineChart, width: int) -> Drawing:
    """The lines of a chart, their bands and points."""
    ys = [y for line in chart.series for y in (*line.y, *(line.low or ()), *(line.high or ()))]
    ys += [reference.value for reference in chart.references]
    xs = [x for line in chart.series for x in line.x]
    top, bottom, height = 30.0, (270.0 if width == WIDE else 220.0), (318.0 if width == WIDE else 268.0)
    y_axis = linear([y for y in ys if finite(y)], bottom, top, fixed=chart.y_range)
    spec = chart.y_format or common_format(y_axis.ticks)
    left = _tick_room(y_axis, spec)
    x_axis = (
        logarithmic(xs, left, width - 14, 12 if width == WIDE else 7)
        if chart.log_x
        else linear(xs, left, width - 14, 6 if width == WIDE else 4, fixed=_ends(xs))
    )
    parts = _y_axis(y_axis, chart.y_label, left, width, spec)
    for tick in x_axis.ticks:
        parts.append(rule(x_axis(tick), bottom, x_axis(tick), bottom + 5, "zero"))
        parts.append(label(x_axis(tick), bottom + 19, number(tick, chart.x_format), "tick", "middle"))
    parts.append(_below_axis(chart.x_label, left, width, bottom + 41))
    for reference in chart.references:
        y = y_axis(reference.value)
        parts.append(rule(left, y, width - 14, y, "reference"))
        parts.append(label(left + 6, y - 5 if y - 5 > top else y + 13, reference.label, "note"))
    for index, line in enumerate(chart.series):
        parts.append(_line(line, index, x_axis, y_axis, chart))
    return Drawing(width, height, chart.title, tuple(parts))


def _tick_room(axis: Scale, spec: str = "") -> float:
    """x of the plot's left edge, which leaves room for the numbers of the vertical axis."""
    return 14 + _CHARACTER * max(len(number(tick, spec)) for tick in axis.ticks)


def _y_axis(axis: Scale, name: str, left: float, width: int, spec: str = "") -> list[Markup]:
    """A vertical axis: its label, its tick numbers, and a grid line at each."""
    parts = [label(0, 12, name, "axis")]
    for tick in axis.ticks:
        parts.append(rule(left, axis(tick), width - 14, axis(tick), "zero" if tick == 0 else "grid"))
        parts.append(label(left - 8, axis(tick) + 4, number(tick, spec), "tick", "end"))
    return parts


def _below_axis(text: str, left: float, width: int, y: float) -> Markup:
    """An axis label, centred below the axis; right-aligned where it is too long for that."""
    if _CHARACTER * len(text) > width - left - 14:
        return label(width, y, text, "axis", "end")
    return label((left + width - 14) / 2, y, text, "axis", "middle")


def _ends(xs: Sequence[float]) -> tuple[float, float] | None:
    finite_xs = [x for x in xs if finite(x)]
    return (min(finite_xs), max(finite_xs)) if finite_xs and min(finite_xs) < max(finite_xs) else None


def _line(line: Series, index: int, x_axis: Scale, y_axis: Scale, chart: LineChart) -> Markup:
    parts, spec = [], chart.y_format
    spans = _spans(line.low, line.high, len(line.x))
    banded = [
        (x_axis(x), y_axis(span[0]), y_axis(span[1])) if finite(x) and finite(span[0]) and finite(span[1]) else None
        for x, span in zip(line.x, spans)
    ]
    for run in _runs(banded):
        if len(run) == 1:
            parts.append(rule(run[0][0], run[0][1], run[0][0], run[0][2], "whisker"))
            continue
        outline = [(x, high) for x, _, high in run] + [(x, low) for x, low, _ in reversed(run)]
        parts.append(element("polygon", {"points": _points(outline), "class": "band"}))
    drawn = [(x_axis(x), y_axis(y)) if finite(x) and finite(y) else None for x, y in zip(line.x, line.y)]
    parts += [element("polyline", {"points": _points(run), "class": "line"}) for run in _runs(drawn) if len(run) > 1]
    for place, x, y, span in zip(drawn, line.x, line.y, spans):
        if place is not None:
            parts.append(
                marker(index, *place, f"{line.name}\nat {number(x, chart.x_format)}: {with_interval(y, *span, spec)}")
            )
    # Points that would overlap are shown only under the pointer.
    reach = x_axis.end - x_axis.start
    dense = " dense" if len(line.x) * 12 > reach else ""
    return element("g", {"class": f"s{index % PALETTE}{dense}"}, *parts)


def _runs(places: Sequence[tuple[float, ...] | None]) -> Iterator[list[tuple[float, ...]]]:
    """The stretches without a gap."""
    run: list[tuple[float, ...]] = []
    for place in [*places, None]:
        if place is not None:
            run.append(place)
        elif run:
            yield run
            run = []


def _points(places: Sequence[tuple[float, ...]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in places)


# Points


def scatter_chart(chart: ScatterChart, width: int) -> Drawing:
    """The points of a chart, the two zero lines and, with `chart.identity`, the line x = y."""
    drawn = [(x, y) for points in chart.series for x, y in zip(points.x, points.y) if finite(x) and finite(y)]
    top, bottom, height = 30.0, (390.0 if width == WIDE else 290.0), (438.0 if width == WIDE else 338.0)
    y_axis = linear([y for _, y in drawn], bottom, top)
    y_spec = common_format(y_axis.ticks)
    left = _tick_room(y_axis, y_spec)
    x_axis = linear([x for x, _ in drawn], left, width - 14, 6 if width == WIDE else 4)
    x_spec = common_format(x_axis.ticks)
    parts = _y_axis(y_axis, chart.y_label, left, width, y_spec)
    for tick in x_axis.ticks:
        parts.append(rule(x_axis(tick), top, x_axis(tick), bottom, "zero" if tick == 0 else "grid"))
        parts.append(label(x_axis(tick), bottom + 19, number(tick, x_spec), "tick", "middle"))
    parts.append(_below_axis(chart.x_label, left, width, bottom + 41))
    for index, points in enumerate(chart.series):
        parts.append(_cloud(points, index, x_axis, y_axis, chart.value_format))
    low, high = max(x_axis.low, y_axis.low), min(x_axis.high, y_axis.high)
    if chart.identity and low < high:  # drawn last: the points would hide it
        parts.append(rule(x_axis(low), y_axis(low), x_axis(high), y_axis(high), "reference"))
        parts.append(label(x_axis(low) + 2, y_axis(low) - 28, chart.identity_label, "note"))
    return Drawing(width, height, chart.title, tuple(parts))


def _cloud(points: Points, index: int, x_axis: Scale, y_axis: Scale, spec: str) -> Markup:
    parts = []
    for x, y, name in zip(points.x, points.y, points.labels or [""] * len(points.x)):
        if finite(x) and finite(y):
            tip = ", ".join(filter(None, (points.name, name))) + f": {number(x, spec)}, {number(y, spec)}"
            parts.append(marker(index, x_axis(x), y_axis(y), tip, reach=5))
    return element("g", {"class": f"s{index % PALETTE} cloud"}, *parts)


# Bars


def bar_chart(chart: BarChart, width: int) -> Drawing:
    """Horizontal bars; on a narrow page, labels are above their bars."""
    stacked = width < WIDE
    values = [v for bars in chart.bars for v in (*bars.values, *(bars.low or ()), *(bars.high or ()))]
    values += [0.0, *(reference.value for reference in chart.references)]
    longest = max((len(text) for text in chart.labels), default=0)
    room = 46 if stacked else min(longest, 38)
    left = 4.0 if stacked else 14 + _CHARACTER * room
    numbers = [v for v in values if finite(v)]
    axis = linear(numbers, left, width - 70, 2 if stacked else 5, fixed=chart.value_range)
    spec = chart.value_format or common_format([v for bars in chart.bars for v in bars.values])
    thick, head = (15.0 if len(chart.bars) > 1 else 19.0), (20.0 if stacked else 0.0)
    block = head + thick * len(chart.bars) + 13
    top = 30.0 if chart.references else 10.0
    bottom = top + block * len(chart.labels)
    parts = []
    tick_spec = chart.value_format or common_format(axis.ticks)
    for tick in axis.ticks:
        parts.append(rule(axis(tick), top, axis(tick), bottom, "zero" if tick == 0 else "grid"))
        parts.append(label(axis(tick), bottom + 16, number(tick, tick_spec), "tick", "middle"))
    for row, name in enumerate(chart.labels):
        y = top + block * row + 6.5
        middle = y + head + thick * len(chart.bars) / 2 + 4
        where = (left, y + 12, "start") if stacked else (left - 10, middle, "end")
        parts.append(
            element("g", {}, element("title", {}, name), label(*where[:2], clipped(name, room), "name", where[2]))
        )
        for index, bars in enumerate(chart.bars):
            tip = name if len(chart.bars) == 1 else f"{name}, {bars.name}"
            parts.append(_bar(bars, row, index, axis, y + head + thick * index, thick, tip, spec))
    for reference in chart.references:
        x = axis(reference.value)
        parts.append(rule(x, top - 8, x, bottom, "reference"))
        anchor = "end" if x > 0.75 * width else "start" if x < 0.25 * width else "middle"
        parts.append(label(x, top - 13, reference.label, "note", anchor))
    parts.append(label((left + width - 70) / 2, bottom + 38, chart.value_label, "axis", "middle"))
    return Drawing(width, bottom + (46 if chart.value_label else 24), chart.title, tuple(parts))


def _bar(bars: Bars, row: int, index: int, axis: Scale, y: float, thick: float, tip: str, spec: str) -> Markup:
    value, span = bars.values[row], _spans(bars.low, bars.high, len(bars.values))[row]
    zero = axis(min(max(0.0, axis.low), axis.high))
    parts = [element("title", {}, f"{tip}: {with_interval(value, *span, spec)}")]
    end = zero
    if finite(value):
        x = axis(value)
        box = {
            "x": min(x, zero),
            "y": round(y + 1, 2),
            "width": round(abs(x - zero), 2),
            "height": thick - 2,
            "rx": 1.5,
        }
        parts.append(element("rect", {**box, "class": "bar"}))
        end = max(x, zero)
    if finite(span[0]) and finite(span[1]):
        low, high, middle = axis(span[0]), axis(span[1]), y + thick / 2
        parts.append(rule(low, middle, high, middle, "whisker"))
        parts += [rule(x, middle - 3, x, middle + 3, "whisker") for x in (low, high)]
        end = max(end, high)
    parts.append(label(end + 6, y + thick / 2 + 4, number(value, spec), "value"))
    return element("g", {"class": f"mark s{index % PALETTE}"}, *parts)


# Counts


def histogram(chart: Histogram, width: int) -> Drawing:
    """Bars from edge to edge; their heights are counts."""
    top, bottom, height = 26.0, 126.0, 166.0
    y_axis = linear([0.0, *map(float, chart.counts)], bottom, top, 3)
    left = _tick_room(y_axis)
    x_axis = linear(chart.edges, left, width - 14, 6 if width == WIDE else 4, fixed=_ends(chart.edges))
    parts = _y_axis(y_axis, chart.y_label, left, width)
    for tick in x_axis.ticks:
        parts.append(label(x_axis(tick), bottom + 16, number(tick), "tick", "middle"))
    for low, high, count in zip(chart.edges, chart.edges[1:], chart.counts):
        x, y = x_axis(low), y_axis(float(count))
        box = {"x": round(x + 0.5, 2), "y": y, "width": round(max(0.5, x_axis(high) - x - 1), 2)}
        bar = element("rect", {**box, "height": round(bottom - y, 2), "class": "bar"})
        tip = element("title", {}, f"{number(low)} to {number(high)}: {number(count)}")
        parts.append(element("g", {"class": "mark s0"}, tip, bar))
    parts.append(label((left + width - 14) / 2, bottom + 34, chart.x_label, "axis", "middle"))
    return Drawing(width, height, chart.title, tuple(parts))


# Heat maps

_CELL = 34.0  # pixels: the narrowest cell that fits a number with two decimals
_DIGIT, _FINE_DIGIT = 7.0, 5.8  # approximate width in pixels of a digit in a cell, in normal and in small print


def map_width(chart: HeatMap) -> int:
    """Preferred width of a heat map in pixels: on a narrower page it scrolls."""
    return round(max(NARROW, _names_width(chart) + _CELL * len(chart.columns) + 4))


def _names_width(chart: HeatMap, most: int = 26) -> float:
    """Width in pixels for the row names, clipped to `most` letters."""
    return 12 + _CHARACTER * min(max(len(name) for name in (*chart.rows, chart.row_label)), most)


def heat_map(chart: HeatMap, width: int) -> Drawing:
    """Cells coloured by sign and magnitude, with their numbers where there is room."""
    top_value = max((abs(v) for row in chart.values for v in row if finite(v)), default=0.0)
    spec = chart.value_format or common_format([v for row in chart.values for v in row])
    left = _names_width(chart, 26 if width >= map_width(chart) else 14)
    room = int((left - 12) / _CHARACTER + 0.5)
    cell = min((width - left - 4) / max(1, len(chart.columns)), 84.0)
    tall = min(max(cell, 22.0), 32.0)
    widest = max((len(number(v, spec)) for row in chart.values for v in row), default=0)
    numbered = "cell" if cell >= _DIGIT * widest + 5 else "cell fine" if cell >= _FINE_DIGIT * widest + 4 else ""
    parts, head = _column_names(chart, left, cell)
    if chart.row_label:
        parts.append(label(left - 8, head - 8, clipped(chart.row_label, room), "axis", "end"))
    for row, (name, values) in enumerate(zip(chart.rows, chart.values)):
        y = head + tall * row
        shown = label(left - 8, y + tall / 2 + 4, clipped(name, room), "name", "end")
        anchor = chart.anchors[row] if chart.anchors else ""
        parts.append(element("a", {"href": f"#{anchor}"}, shown) if anchor else shown)
        for index, value in enumerate(values):
            tip = f"{name}, {_column(chart, index)}: {number(value, spec)}"
            key = (row, index, chart.keys[row][index]) if chart.keys and finite(value) else None
            parts.append(_cell(value, top_value, (left + cell * index, y, cell, tall), tip, spec, numbered, key))
    height = head + tall * len(chart.rows) + 6
    return Drawing(
        width, height, chart.title, tuple(parts), interactive=chart.keys is not None or any(chart.anchors or ())
    )


def _column(chart: HeatMap, index: int) -> str:
    """Name of a column for tooltips."""
    below = chart.columns_below[index] if chart.columns_below else ""
    return f"{chart.columns[index]} / {below}" if below else chart.columns[index]


def _column_names(chart: HeatMap, left: float, cell: float) -> tuple[list[Markup], float]:
    """The column names, and the y where the cells begin. Names that do not fit side by side are slanted."""
    lines = [chart.columns] if chart.columns_below is None else [chart.columns, chart.columns_below]
    longest = [max((len(name) for name in names), default=0) for names in lines]
    slanted = any(_CHARACTER * count > cell - 4 for count in longest)
    head = 18.0 if chart.column_label else 0.0
    parts = [label(left, 12, chart.column_label, "axis")] if chart.column_label else []
    for names, count in zip(lines, longest):
        head += 14 + (min(count, 16) * 4.6 if slanted else 4.0)
        for index, name in enumerate(names):
            x = left + cell * (index + 0.5)
            if slanted:
                turn = {"transform": f"translate({x:g},{head:g}) rotate(-40)", "class": "tick"}
                parts.append(element("text", turn, clipped(name, 16)))
            else:
                parts.append(label(x, head, name, "tick", "middle"))
    return parts, head + 8


def _over(share: float, kind: str) -> str:
    """Class of a number that keeps it legible on its cell's colour; the dark theme needs it on paler colours."""
    deep = 0.9 if kind == "positive" else 0.78  # above this, light letters are more legible in the light theme
    return " strong" if share > deep else " mid" if share > 0.6 else ""


def _cell(
    value: Number,
    top: float,
    box: tuple[float, float, float, float],
    tip: str,
    spec: str,
    numbered: str,
    key: tuple[int, int, str] | None,
) -> Markup:
    x, y, wide, tall = box
    share = abs(value) / top if finite(value) and top else 0.0
    kind = "none" if not finite(value) else "positive" if value >= 0 else "negative"
    place = {"x": round(x + 1, 2), "y": round(y + 1, 2), "width": round(wide - 2, 2), "height": round(tall - 2, 2)}
    parts = [element("title", {}, tip), element("rect", {**place, "rx": 2, "class": "plate"})]
    if share > 0.004:
        parts.append(element("rect", {**place, "rx": 2, "class": kind, "fill-opacity": round(share, 3)}))
    if numbered:
        kinds = f"{numbered}{_over(share, kind)}"
        parts.append(label(x + wide / 2, y + tall / 2 + 4, number(value, spec), kinds, "middle"))
    if key is None:
        return element("g", {"class": "mark"}, *parts)
    row, column, name = key
    button: dict[str, str | int] = {"class": "mark pick", "role": "button", "tabindex": -1}  # its title is its name
    return element("g", {**button, "data-r": row, "data-c": column, "data-key": visible(name)}, *parts)
