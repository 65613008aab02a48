"""SVG elements from plain values; all attributes and texts are escaped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from markupsafe import Markup, escape

from saepatch.report.text import visible

Attributes = Mapping[str, str | float | int]
WIDE, NARROW = 720, 360  # pixels: the widths in which a chart is drawn
CHARACTER = 6.4  # approximate width in pixels of a letter in an axis label
DIGIT = 7.0  # approximate width in pixels of a digit in a cell or bar


def element(name: str, attributes: Attributes, *children: Markup | str) -> Markup:
    """One element; plain-text children are escaped, Markup is inserted unchanged."""
    words = "".join(f' {key}="{escape(str(value))}"' for key, value in attributes.items())
    inside = "".join(child if isinstance(child, Markup) else escape(visible(child)) for child in children)
    return Markup(f"<{name}{words}>{inside}</{name}>")


def label(x: float, y: float, text: str, kind: str, anchor: str = "start") -> Markup:
    """Text at a point; `kind` is its class in the style sheet."""
    return element("text", {"x": round(x, 2), "y": round(y, 2), "class": kind, "text-anchor": anchor}, text)


def rule(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """A straight line."""
    ends = {"x1": round(x1, 2), "y1": round(y1, 2), "x2": round(x2, 2), "y2": round(y2, 2)}
    return element("line", {**ends, "class": kind})


@dataclass(frozen=True)
class Drawing:
    """A finished drawing: its size in pixels, its accessible name, and its elements."""

    width: float
    height: float
    name: str
    parts: tuple[Markup, ...]
    interactive: bool = False
    """Whether its elements can be clicked: its ARIA role is then a group, not an image."""

    def svg(self) -> Markup:
        """The drawing as an SVG element."""
        box = f"0 0 {self.width:g} {round(self.height, 1):g}"
        role = "group" if self.interactive else "img"
        return element("svg", {"viewBox": box, "role": role, "aria-label": visible(self.name)}, *self.parts)


MARK = 3.6  # half the width of a point, in pixels


def marker(shape: int, x: float, y: float, tip: str, reach: float = 10.0) -> Markup:
    """A point with its tooltip. Series differ in shape as well as in colour; an invisible circle enlarges it."""
    point = element("path", {"d": outline(shape, x, y), "class": "point"})
    around = element("circle", {"cx": x, "cy": y, "r": f"{reach:g}", "class": "reach"})
    return element("g", {"class": "mark"}, element("title", {}, tip), around, point)


def outline(shape: int, x: float, y: float) -> str:
    """The path of a circle, square, triangle or diamond around a point, by series number."""
    size, tall = MARK, 1.35 * MARK
    outlines = [
        f"M{x - size:g},{y}a{size},{size} 0 1,0 {2 * size},0a{size},{size} 0 1,0 {-2 * size},0",
        f"M{x - size:g},{y - size:g}h{2 * size}v{2 * size}h{-2 * size}z",
        f"M{x},{y - 1.25 * size:g}l{1.2 * size:g},{2.1 * size:g}h{-2.4 * size:g}z",
        f"M{x},{y - tall:g}l{tall:g},{tall:g}l{-tall:g},{tall:g}l{-tall:g},{-tall:g}z",
    ]
    return outlines[shape % len(outlines)]


def clipped(text: str, room: int) -> str:
    """The text shortened to at most `room` characters."""
    return text if len(text) <= room else text[: max(1, room - 1)] + "…"
