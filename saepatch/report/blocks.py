"""The blocks of a report: frozen values that contain no HTML.

Texts may come from a model or a user: they are escaped when the page is written. Numbers may be missing: None and NaN
show as a dash. A chart's caption states the number of examples and the kind of interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Number = float | int | None


@dataclass(frozen=True)
class EstimateCell:
    """A table cell: an estimate and its interval, shown as ``0.83 [0.79, 0.87]`` and sorted by the estimate.

    Where there is no interval, `reason` explains why and is shown in its place.
    """

    value: Number
    low: Number
    high: Number
    reason: str = ""


@dataclass(frozen=True)
class Link:
    """A table cell or a name that links to a `Details` on the same page."""

    text: str
    anchor: str


Cell = str | bool | float | int | EstimateCell | Link | None


@dataclass(frozen=True)
class Facts:
    """Labelled short texts: models, hashes, seeds, versions."""

    items: Mapping[str, str]


@dataclass(frozen=True)
class Headline:
    """A few large figures: label to value, already formatted (``{"refused, restored": "94 % [90 %, 97 %]"}``)."""

    items: Mapping[str, str]


@dataclass(frozen=True)
class Notices:
    """Warnings to read before trusting the figures, one sentence each."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table that can be sorted by clicking a header, filtered, and copied as CSV; numbers are right-aligned."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    formats: Mapping[str, str] = field(default_factory=dict)
    """Python format of a column's numbers, by column: ``{"recovered": ".1%", "latent": "d"}``; default: by size."""
    keys: Sequence[Sequence[str]] = ()
    """For each row, the keys of the heat map cells it belongs to (`HeatMap.keys`)."""

    def __post_init__(self) -> None:
        if self.keys:
            _same_lengths("table", rows=self.rows, keys=self.keys)
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"table row {index} has {len(row)} cells for {len(self.columns)} columns")
        if unknown := set(self.formats) - set(self.columns):
            raise ValueError(f"table format for {sorted(unknown)}, but the columns are {list(self.columns)}")


@dataclass(frozen=True)
class Series:
    """One line of a `LineChart`; a missing y interrupts it."""

    name: str
    x: Sequence[float]
    y: Sequence[Number]
    low: Sequence[Number] | None = None
    high: Sequence[Number] | None = None

    def __post_init__(self) -> None:
        _same_lengths(f"series {self.name!r}", x=self.x, y=self.y, low=self.low, high=self.high)


@dataclass(frozen=True)
class Reference:
    """A labelled line across a chart at one value, such as chance, the clean run or a threshold."""

    value: float
    label: str


@dataclass(frozen=True)
class LineChart:
    """Lines with interval bands. On a logarithmic axis, x = 0 is drawn one step left of the smallest other x."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    caption: str = ""
    log_x: bool = False
    references: Sequence[Reference] = ()
    y_range: tuple[float, float] | None = None
    y_format: str = ""
    """Python format of the values (``.0%``); empty: chosen by their size."""
    x_format: str = ""
    """Python format of the numbers on the x axis."""

    def __post_init__(self) -> None:
        if self.log_x and any(x < 0 for line in self.series for x in line.x):
            raise ValueError(f"chart {self.title!r}: a logarithmic axis cannot show a negative x")


@dataclass(frozen=True)
class Bars:
    """One set of bars of a `BarChart`, with a value for each label."""

    name: str
    values: Sequence[Number]
    low: Sequence[Number] | None = None
    high: Sequence[Number] | None = None

    def __post_init__(self) -> None:
        _same_lengths(f"bars {self.name!r}", values=self.values, low=self.low, high=self.high)


@dataclass(frozen=True)
class BarChart:
    """Horizontal bars, grouped by label where there are several sets, with whiskers for intervals.

    With `shares`, the sets are shares of one whole: one bar for each label, without whiskers.
    """

    title: str
    labels: Sequence[str]
    bars: Sequence[Bars]
    value_label: str = ""
    caption: str = ""
    references: Sequence[Reference] = ()
    value_range: tuple[float, float] | None = None
    value_format: str = ""
    shares: bool = False

    def __post_init__(self) -> None:
        for bars in self.bars:
            _same_lengths(f"chart {self.title!r}, bars {bars.name!r}", labels=self.labels, values=bars.values)


@dataclass(frozen=True)
class HeatMap:
    """Values by row and column on a diverging colour scale centred at 0."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[Number]]
    caption: str = ""
    row_label: str = ""
    column_label: str = ""
    value_format: str = ""
    columns_below: Sequence[str] | None = None
    """A second name for each column, below the first: the corrupted prompt's tokens below the clean prompt's."""
    keys: Sequence[Sequence[str]] | None = None
    """A key for each cell: clicking it shows the table rows with the same key."""
    anchors: Sequence[str] | None = None
    """For each row, the `Details` that its name links to; empty: none."""
    scale: float = 0.0
    """The value of the deepest colour, where no cell is larger."""
    uncertain: Sequence[Sequence[bool]] | None = None
    """Cells drawn pale, such as those whose interval contains 0."""

    def __post_init__(self) -> None:
        name = f"heat map {self.title!r}"
        _same_lengths(
            name, rows=self.rows, values=self.values, keys=self.keys, anchors=self.anchors, uncertain=self.uncertain
        )
        _same_lengths(name, columns=self.columns, columns_below=self.columns_below)
        for index, row in enumerate(self.values):
            _same_lengths(name, columns=self.columns, values=row, keys=self.keys[index] if self.keys else None)


@dataclass(frozen=True)
class PictureMap:
    """Values of parts of a picture, drawn over it on a diverging colour scale centred at 0."""

    title: str
    picture: str
    """The picture as a data URI, so that the page loads nothing."""
    size: Sequence[float]
    """Its width and height, in the units of `boxes`: left, top, right and bottom of each part."""
    boxes: Sequence[Sequence[float]]
    names: Sequence[str]
    values: Sequence[Number]
    caption: str = ""
    value_format: str = ""

    def __post_init__(self) -> None:
        _same_lengths(f"picture {self.title!r}", boxes=self.boxes, names=self.names, values=self.values)
        if not self.picture.startswith("data:image/"):
            raise ValueError(f"picture {self.title!r} is not a data URI of an image")


@dataclass(frozen=True)
class Points:
    """One set of points of a `ScatterChart`; points with a missing x or y are not drawn."""

    name: str
    x: Sequence[Number]
    y: Sequence[Number]
    labels: Sequence[str] | None = None
    """Names of the points, for their tooltips."""

    def __post_init__(self) -> None:
        _same_lengths(f"points {self.name!r}", x=self.x, y=self.y, labels=self.labels)


@dataclass(frozen=True)
class ScatterChart:
    """Points by two values; with `identity`, the line x = y is drawn too."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Points]
    caption: str = ""
    identity: bool = False
    identity_label: str = "equal"
    value_format: str = ""
    """Python format of the values in tooltips and in the table; empty: chosen by their size."""


@dataclass(frozen=True)
class Histogram:
    """Counts of values between edges."""

    title: str
    x_label: str
    y_label: str
    edges: Sequence[float]
    counts: Sequence[int]
    caption: str = ""

    def __post_init__(self) -> None:
        if len(self.edges) != len(self.counts) + 1:
            raise ValueError(f"histogram {self.title!r}: {len(self.edges)} edges for {len(self.counts)} counts")


@dataclass(frozen=True)
class GraphNode:
    """A node of a `NodeGraph`, at a row and a column."""

    name: str
    """Its full name, for its tooltip and for screen readers."""
    label: str
    """A few characters, drawn on it."""
    row: int
    column: int
    value: Number = None
    """Its colour: by sign and size."""
    anchor: str = ""
    """The `Details` that it links to; empty: none."""
    outlined: bool = False
    """Drawn with a dashed outline: nodes of another sort, such as error terms."""


@dataclass(frozen=True)
class GraphEdge:
    """An edge of a `NodeGraph` between two nodes, given by index; drawn by sign and size of its weight."""

    up: int
    down: int
    weight: float


@dataclass(frozen=True)
class NodeGraph:
    """A graph in rows, from bottom to top, and columns, from left to right. A slider hides edges of small weight."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    nodes: Sequence[GraphNode]
    edges: Sequence[GraphEdge]
    caption: str = ""
    value_format: str = ""

    def __post_init__(self) -> None:
        for node in self.nodes:
            if not (0 <= node.row < len(self.rows) and 0 <= node.column < len(self.columns)):
                raise ValueError(f"graph {self.title!r}: node {node.name!r} is at row {node.row}, column {node.column}")
        for edge in self.edges:
            if not (0 <= edge.up < len(self.nodes) and 0 <= edge.down < len(self.nodes)):
                raise ValueError(f"graph {self.title!r}: an edge joins {edge.up} and {edge.down}, of {len(self.nodes)}")


@dataclass(frozen=True)
class Comparison:
    """A model's outputs for one prompt under several conditions, side by side."""

    prompt: str
    columns: Sequence[tuple[str, str]]
    highlight: Sequence[str] = ()
    """Words to mark in the texts, ignoring case."""
    changes: bool = False
    """In every text but the first, mark the words that differ from the first."""
    label: str = "Prompt"
    """Heading of the prompt."""
    outcomes: Sequence[str] = ()
    """Outcomes that end a column's name, as in `restored: refused`, in the order of the palette's colours."""


@dataclass(frozen=True)
class ColouredTokens:
    """A prompt whose tokens are coloured by their values, on a diverging scale centred at 0."""

    tokens: Sequence[str]
    values: Sequence[Number]
    caption: str = ""
    value_format: str = ""

    def __post_init__(self) -> None:
        _same_lengths("tokens", tokens=self.tokens, values=self.values)


@dataclass(frozen=True)
class Chips:
    """Short texts in a row, each with a value: the tokens a latent promotes, its nearest latents."""

    label: str
    items: Sequence[tuple[str | Link, Number]]
    value_format: str = ""


Chart = LineChart | BarChart | HeatMap | ScatterChart | Histogram | NodeGraph | PictureMap
Simple = Facts | Headline | Notices | Table | Chart | Comparison | ColouredTokens | Chips


@dataclass(frozen=True)
class Choice:
    """Several views, shown one at a time and chosen from a list; without scripts, and in print, the first."""

    label: str
    options: Sequence[tuple[str, Sequence[Simple]]]


@dataclass(frozen=True)
class Details:
    """A collapsed card that opens on a click or when a `Link` to it is followed."""

    anchor: str
    title: str
    summary: str
    blocks: Sequence[Simple]
    links: Sequence[tuple[str, str]] = ()
    """(text, https address) of external pages; nothing is loaded from them."""

    def __post_init__(self) -> None:
        for _, address in self.links:
            if not address.startswith("https://"):
                raise ValueError(f"card {self.title!r}: {address!r} is no https address")


Block = Simple | Choice | Details


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs (separated by blank lines, with `code` in backticks) and blocks."""

    title: str
    text: str = ""
    blocks: Sequence[Block] = ()


@dataclass(frozen=True)
class Page:
    """A report: title, a lead paragraph with the findings, sections, and provenance."""

    title: str
    lead: str
    sections: Sequence[Section]
    facts: Facts = field(default_factory=lambda: Facts({}))


def _same_lengths(what: str, **parts: Sequence[object] | None) -> None:
    lengths = {name: len(part) for name, part in parts.items() if part is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{what}: lengths differ: " + ", ".join(f"{name} {n}" for name, n in lengths.items()))
