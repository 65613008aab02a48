"""Heat maps as SVG."""

from __future__ import annotations

from markupsafe import Markup

from saepatch.report.blocks import HeatMap, Number, PictureMap
from saepatch.report.svg import CHARACTER, DIGIT, NARROW, Drawing, clipped, element, label
from saepatch.report.text import common_format, finite, number, visible

_PICTURE = 340  # pixels: the width of a picture
_OVER = 0.75  # opacity of the deepest colour over a picture
_PALE = 0.3  # of its colour that an uncertain cell keeps
_CELL = 34.0  # pixels: the narrowest cell that fits a number with two decimals
_FINE_DIGIT = 5.8  # approximate width in pixels of a digit in small print


def map_width(chart: HeatMap) -> int:
    """Preferred width of a heat map in pixels: on a narrower page it scrolls."""
    cell = max(_CELL, _FINE_DIGIT * _widest(chart) + 5)
    return round(max(NARROW, _names_width(chart) + cell * len(chart.columns) + 4))


def _spec(chart: HeatMap) -> str:
    return chart.value_format or common_format([v for row in chart.values for v in row])


def _widest(chart: HeatMap) -> int:
    """Letters of the longest number."""
    spec = _spec(chart)
    return max((len(number(v, spec)) for row in chart.values for v in row), default=0)


def _names_width(chart: HeatMap, most: int = 26) -> float:
    """Width in pixels for the row names, clipped to `most` letters."""
    return 12 + CHARACTER * min(max(len(name) for name in (*chart.rows, chart.row_label)), most)


def heat_map(chart: HeatMap, width: int) -> Drawing:
    """Cells coloured by sign and magnitude, with their numbers where there is room."""
    top_value = max([chart.scale, *(abs(v) for row in chart.values for v in row if finite(v))])
    spec = _spec(chart)
    left = _names_width(chart, 26 if width >= map_width(chart) else 14)
    room = int((left - 12) / CHARACTER + 0.5)
    cell = min((width - left - 4) / max(1, len(chart.columns)), 84.0)
    tall = min(max(cell, 22.0), 32.0)
    widest = _widest(chart)
    numbered = "cell" if cell >= DIGIT * widest + 5 else "cell fine" if cell >= _FINE_DIGIT * widest + 4 else ""
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
            pale = bool(chart.uncertain and chart.uncertain[row][index])
            kinds = f"{numbered} faint" if numbered and pale else numbered
            share = abs(value) / top_value * (_PALE if pale else 1) if finite(value) and top_value else 0.0
            parts.append(_cell(value, share, (left + cell * index, y, cell, tall), tip, spec, kinds, key))
    height = head + tall * len(chart.rows) + 6
    if top_value:
        parts += _colour_bar(left + 1, height, top_value, spec)
        height += 34
    return Drawing(
        width, height, chart.title, tuple(parts), interactive=chart.keys is not None or any(chart.anchors or ())
    )


def picture_map(chart: PictureMap, width: int) -> Drawing:
    """A picture with its parts coloured by sign and magnitude."""
    scale = min(width, _PICTURE) / chart.size[0]
    tall = scale * chart.size[1]
    top_value = max([0.0, *(abs(value) for value in chart.values if finite(value))])
    spec = chart.value_format or common_format(chart.values)
    place: dict[str, str | float] = {"x": 0, "y": 0, "width": round(scale * chart.size[0], 2), "height": round(tall, 2)}
    parts = [element("image", {**place, "href": chart.picture, "preserveAspectRatio": "none"})]
    for (left, top, right, bottom), name, value in zip(chart.boxes, chart.names, chart.values):
        share = abs(value) / top_value if finite(value) and top_value else 0.0
        place = {"x": round(scale * left, 2), "y": round(scale * top, 2)}
        place |= {"width": round(scale * (right - left), 2), "height": round(scale * (bottom - top), 2)}
        kind = "none" if not finite(value) else "positive" if value >= 0 else "negative"
        tip = element("title", {}, f"{name}: {number(value, spec)}")
        over = element("rect", {**place, "class": kind, "fill-opacity": round(_OVER * share, 3)})
        parts.append(element("g", {"class": "mark"}, tip, over))
    parts += _colour_bar(1, tall + 10, top_value, spec) if top_value else []
    return Drawing(width, tall + (44 if top_value else 4), chart.title, tuple(parts))


def _colour_bar(x: float, y: float, top: float, spec: str) -> list[Markup]:
    """The scale of a map's colours: a strip from the lowest to the highest value, with three numbers below it."""
    wide, steps = 14.0, 5
    parts: list[Markup] = []
    for step in range(-steps, steps + 1):
        place = {"x": round(x + wide * (step + steps), 2), "y": y, "width": wide, "height": 8}
        kind, share = "positive" if step >= 0 else "negative", abs(step) / steps
        parts.append(element("rect", {**place, "class": "plate"}))
        parts.append(element("rect", {**place, "class": kind, "fill-opacity": share}))
    middle = wide * (2 * steps + 1) / 2
    for value, offset, anchor in ((-top, 0.0, "start"), (0.0, middle, "middle"), (top, 2 * middle, "end")):
        parts.append(label(x + offset, y + 22, number(value, spec), "tick", anchor))
    return parts


def _column(chart: HeatMap, index: int) -> str:
    """Name of a column for tooltips."""
    below = chart.columns_below[index] if chart.columns_below else ""
    return f"{chart.columns[index]} / {below}" if below else chart.columns[index]


def _column_names(chart: HeatMap, left: float, cell: float) -> tuple[list[Markup], float]:
    """The column names, and the y where the cells begin. Names that do not fit side by side are slanted."""
    lines = [chart.columns] if chart.columns_below is None else [chart.columns, chart.columns_below]
    longest = [max((len(name) for name in names), default=0) for names in lines]
    slanted = any(CHARACTER * count > cell - 4 for count in longest)
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
    share: float,
    box: tuple[float, float, float, float],
    tip: str,
    spec: str,
    numbered: str,
    key: tuple[int, int, str] | None,
) -> Markup:
    x, y, wide, tall = box
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
