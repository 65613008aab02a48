"""Charts as SVG, drawn for a given width: a page contains each chart twice, for wide and for narrow screens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from markupsafe import Markup

from saepatch.report.blocks import (
    BarChart,
    Bars,
    Chart,
    Histogram,
    LineChart,
    NodeGraph,
    Number,
    PictureMap,
    Points,
    ScatterChart,
    Series,
)
from saepatch.report.graphs import node_graph
from saepatch.report.heat_maps import heat_map, picture_map
from saepatch.report.scales import Scale, linear, logarithmic
from saepatch.report.svg import CHARACTER, DIGIT, WIDE, Drawing, clipped, element, label, marker, rule
from saepatch.report.text import common_format, finite, number, with_interval

PALETTE = 7  # colours in the stylesheet

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
    if isinstance(chart, PictureMap):
        return picture_map(chart, width)
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
    return 14 + CHARACTER * max(len(number(tick, spec)) for tick in axis.ticks)


def _y_axis(axis: Scale, name: str, left: float, width: int, spec: str = "") -> list[Markup]:
    """A vertical axis: its label, its tick numbers, and a grid line at each."""
    parts = [label(0, 12, name, "axis")]
    for tick in axis.ticks:
        parts.append(rule(left, axis(tick), width - 14, axis(tick), "zero" if tick == 0 else "grid"))
        parts.append(label(left - 8, axis(tick) + 4, number(tick, spec), "tick", "end"))
    return parts


def _below_axis(text: str, left: float, width: int, y: float) -> Markup:
    """An axis label, centred below the axis; right-aligned where it is too long for that."""
    if CHARACTER * len(text) > width - left - 14:
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
    narrow = width < WIDE
    values = [v for bars in chart.bars for v in (*bars.values, *(bars.low or ()), *(bars.high or ()))]
    values += [0.0, *(reference.value for reference in chart.references)]
    longest = max((len(text) for text in chart.labels), default=0)
    room = 46 if narrow else min(longest, 38)
    left = 4.0 if narrow else 14 + CHARACTER * room
    numbers = [v for v in values if finite(v)]
    axis = linear(numbers, left, width - 70, 2 if narrow else 5, fixed=chart.value_range)
    spec = chart.value_format or common_format([v for bars in chart.bars for v in bars.values])
    lines = 1 if chart.shares else len(chart.bars)
    thick, head = (15.0 if lines > 1 else 19.0), (20.0 if narrow else 0.0)
    block = head + thick * lines + 13
    top = 30.0 if chart.references else 10.0
    bottom = top + block * len(chart.labels)
    parts = []
    tick_spec = chart.value_format or common_format(axis.ticks)
    for tick in axis.ticks:
        parts.append(rule(axis(tick), top, axis(tick), bottom, "zero" if tick == 0 else "grid"))
        parts.append(label(axis(tick), bottom + 16, number(tick, tick_spec), "tick", "middle"))
    for row, name in enumerate(chart.labels):
        y = top + block * row + 6.5
        middle = y + head + thick * lines / 2 + 4
        where = (left, y + 12, "start") if narrow else (left - 10, middle, "end")
        parts.append(
            element("g", {}, element("title", {}, name), label(*where[:2], clipped(name, room), "name", where[2]))
        )
        if chart.shares:
            parts += _stack(chart.bars, row, axis, y + head, thick, name, spec)
        for index, bars in enumerate(() if chart.shares else chart.bars):
            tip = name if len(chart.bars) == 1 else f"{name}, {bars.name}"
            parts.append(_bar(bars, row, index, axis, y + head + thick * index, thick, tip, spec))
    for reference in chart.references:
        x = axis(reference.value)
        parts.append(rule(x, top - 8, x, bottom, "reference"))
        anchor = "end" if x > 0.75 * width else "start" if x < 0.25 * width else "middle"
        parts.append(label(x, top - 13, reference.label, "note", anchor))
    parts.append(label((left + width - 70) / 2, bottom + 38, chart.value_label, "axis", "middle"))
    return Drawing(width, bottom + (46 if chart.value_label else 24), chart.title, tuple(parts))


def _stack(
    sets: Sequence[Bars], row: int, axis: Scale, y: float, thick: float, name: str, spec: str
) -> Iterator[Markup]:
    """One bar of shares of a whole, each with its number where there is room."""
    start = 0.0
    for index, bars in enumerate(sets):
        if not finite(value := bars.values[row]) or value <= 0:
            continue
        left, right = axis(start), axis(start + value)
        box = {
            "x": round(left, 2),
            "y": round(y + 1, 2),
            "width": round(right - left, 2),
            "height": thick - 2,
            "rx": 1.5,
        }
        shown = number(value, spec)
        parts = [element("title", {}, f"{name}, {bars.name}: {shown}"), element("rect", {**box, "class": "bar"})]
        if right - left > DIGIT * len(shown) + 8:
            parts.append(label((left + right) / 2, y + thick / 2 + 4, shown, "over", "middle"))
        yield element("g", {"class": f"mark s{index % PALETTE}"}, *parts)
        start += value


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
