"""Graphs as SVG: nodes in rows from bottom to top and columns from left to right, edges as curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from saepatch.report.blocks import GraphEdge, GraphNode, NodeGraph
from saepatch.report.svg import Drawing, clipped, element, label, rule
from saepatch.report.text import common_format, finite, number, visible

_BOX = (74.0, 18.0)  # width and height of a node
_GAP = 6.0  # between the nodes of a cell
_LANE = 46.0  # between rows, for the edges
_EMPTY = 30.0  # width of a column without nodes
_LETTERS = 12  # of a node's label
_HEAD = 14.0  # for the name of a row
_AGAIN = 480  # distance at which the name of a row stands again

Place = tuple[float, float]


@dataclass(frozen=True)
class _Layout:
    """Places: the centre of each node, the top and height of each row, the left and width of each column."""

    centres: Sequence[Place]
    rows: Sequence[tuple[float, float]]
    columns: Sequence[tuple[float, float]]
    size: Place


def node_graph(graph: NodeGraph) -> Drawing:
    """The nodes of a graph and its edges, heavier ones thicker; negative ones are dashed."""
    layout = _layout(graph)
    weighted = [edge for edge in graph.edges if finite(edge.weight)]
    spec = graph.value_format or common_format([edge.weight for edge in weighted])
    parts = _grid(graph, layout)
    largest = max((abs(edge.weight) for edge in weighted), default=0.0)
    for edge in sorted(weighted, key=lambda edge: abs(edge.weight)):  # the heaviest are drawn last
        parts.append(_edge(graph, edge, layout, largest, spec))
    top = max((abs(node.value) for node in graph.nodes if finite(node.value)), default=0.0)
    value_spec = graph.value_format or common_format([node.value for node in graph.nodes])
    parts += [_node(node, layout.centres[i], top, value_spec) for i, node in enumerate(graph.nodes)]
    return Drawing(*layout.size, graph.title, tuple(parts), interactive=True)


def _layout(graph: NodeGraph) -> _Layout:
    cells: dict[tuple[int, int], list[int]] = {}
    for i, node in enumerate(graph.nodes):
        cells.setdefault((node.row, node.column), []).append(i)
    side = {cell: max(1, math.ceil(math.sqrt(len(some) / 4))) for cell, some in cells.items()}  # nodes side by side
    wide, tall = (size + _GAP for size in _BOX)
    columns, x = [], 8.0
    for column in range(len(graph.columns)):
        most = max((side[cell] for cell in cells if cell[1] == column), default=0)
        width = wide * most + _GAP if most else _EMPTY
        columns.append((x, width))
        x += width
    y, rows = 16.0, [(0.0, 0.0)] * len(graph.rows)
    for row in reversed(range(len(graph.rows))):
        deep = max((math.ceil(len(some) / side[cell]) for cell, some in cells.items() if cell[0] == row), default=1)
        rows[row] = (y, _HEAD + tall * deep + _GAP)
        y += rows[row][1] + _LANE
    centres: list[Place] = [(0.0, 0.0)] * len(graph.nodes)
    for (row, column), some in cells.items():
        left = columns[column][0] + (columns[column][1] - wide * side[row, column] + _GAP) / 2
        for place, i in enumerate(some):
            down, right = divmod(place, side[row, column])
            centres[i] = (
                round(left + wide * right + _BOX[0] / 2, 1),
                round(rows[row][0] + _HEAD + _GAP / 2 + tall * down + _BOX[1] / 2, 1),
            )
    slanted = [len(name) for name, (_, width) in zip(graph.columns, columns) if not _fits(name, width)]
    return _Layout(centres, rows, columns, (x + 24, y - _LANE + 24 + 4.6 * min(max(slanted, default=0), 16)))


def _fits(name: str, width: float) -> bool:
    """Whether a column's name fits below it without a slant."""
    return 6.4 * len(name) < width


def _grid(graph: NodeGraph, layout: _Layout) -> list[Markup]:
    """The bands of the rows, and the names of rows and columns."""
    parts, bottom = [], sum(layout.rows[0]) if layout.rows else 0.0
    for name, (y, height) in zip(graph.rows, layout.rows):
        band = {"x": 0, "y": round(y, 1), "width": round(layout.size[0] - 16, 1), "height": round(height, 1), "rx": 4}
        parts.append(element("rect", {**band, "class": "lane"}))
        for again in range(8, max(9, round(layout.size[0]) - _AGAIN // 2), _AGAIN):  # in sight where the graph scrolls
            parts.append(label(again, y + 11, name, "tick"))
    for name, (x, width) in zip(graph.columns, layout.columns):
        middle = x + width / 2
        parts.append(rule(middle, bottom, middle, bottom + 4, "zero"))
        turn: Mapping[str, str | float | int] = {
            "transform": f"translate({middle - 3:g},{bottom + 13:g}) rotate(40)",
            "class": "tick",
        }
        flat = _fits(name, width)
        parts.append(
            label(middle, bottom + 16, name, "tick", "middle") if flat else element("text", turn, clipped(name, 16))
        )
    return parts


def _edge(graph: NodeGraph, edge: GraphEdge, layout: _Layout, largest: float, spec: str) -> Markup:
    (x1, y1), (x2, y2) = layout.centres[edge.up], layout.centres[edge.down]
    y1, y2 = y1 - _BOX[1] / 2, y2 + _BOX[1] / 2
    bend = max(18.0, (y1 - y2) / 2)
    share = abs(edge.weight) / largest if largest else 0.0
    names = f"{graph.nodes[edge.up].name} → {graph.nodes[edge.down].name}"
    text = number(edge.weight, spec)
    return element(
        "path",
        {
            "d": f"M{x1:g},{y1:g}C{x1:g},{y1 - bend:g} {x2:g},{y2 + bend:g} {x2:g},{y2:g}",
            "class": "edge" if edge.weight >= 0 else "edge negative",
            "stroke-width": round(0.6 + 3.4 * share, 2),
            "stroke-opacity": round(0.25 + 0.6 * share, 2),
            "data-up": edge.up,
            "data-down": edge.down,
            "data-weight": f"{edge.weight:.6g}",
            "data-text": text,
        },
        element("title", {}, f"{names}: {text}"),
    )


def _node(node: GraphNode, centre: Place, top: float, spec: str) -> Markup:
    x, y = centre[0] - _BOX[0] / 2, centre[1] - _BOX[1] / 2
    box = {"x": round(x, 1), "y": round(y, 1), "width": _BOX[0], "height": _BOX[1], "rx": 3}
    share = abs(node.value) / top if finite(node.value) and top else 0.0
    tip = node.name + (f": {number(node.value, spec)}" if finite(node.value) else "")
    parts = [element("title", {}, tip), element("rect", {**box, "class": "plate dashed" if node.outlined else "plate"})]
    if share > 0.004:
        kind = "positive" if node.value is not None and node.value >= 0 else "negative"
        parts.append(element("rect", {**box, "class": kind, "fill-opacity": round(0.45 * share, 3)}))
    parts.append(label(centre[0], centre[1] + 3.6, clipped(node.label, _LETTERS), "node-label", "middle"))
    facts: dict[str, str | float | int] = {"class": "node", "role": "button", "tabindex": -1, "data-x": centre[0]}
    facts |= {"data-y": centre[1], "data-name": visible(node.name)}
    return element("g", {**facts, **({"data-anchor": node.anchor} if node.anchor else {})}, *parts)
