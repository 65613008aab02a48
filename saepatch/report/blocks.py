"""What a report is made of: plain frozen values, with no HTML in them.

Every text may come from a model or a user: it is escaped when the page is written. Every number may be missing: None
and NaN show as a dash. A caption is where a chart says over how many examples it was measured and what its interval
is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Number = float | int | None


@dataclass(frozen=True)
class Interval:
    """A table cell: an estimate and its interval, shown as ``0.83 [0.79, 0.87]`` and sorted by the estimate."""

    value: Number
    low: Number
    high: Number


Cell = str | bool | float | int | Interval | None


@dataclass(frozen=True)
class Facts:
    """Labels and short texts: models, hashes, seeds, versions."""

    items: Mapping[str, str]


@dataclass(frozen=True)
class Headline:
    """A few large figures: label to value, already formatted (``{"refused, restored": "94 %"}``)."""

    items: Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """A table that sorts by a click on its header; numbers stand to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    formats: Mapping[str, str] = field(default_factory=dict)
    """Python format of a column's numbers, by column name: ``{"recovered": ".1%", "latent": "d"}``; else by size."""

    def __post_init__(self) -> None:
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"table row {index} has {len(row)} cells for {len(self.columns)} columns")
        if unknown := set(self.formats) - set(self.columns):
            raise ValueError(f"table format for {sorted(unknown)}, but the columns are {list(self.columns)}")


@dataclass(frozen=True)
class Series:
    """One line of a :class:`LineChart`; a missing y interrupts it."""

    name: str
    x: Sequence[float]
    y: Sequence[Number]
    low: Sequence[Number] | None = None
    high: Sequence[Number] | None = None

    def __post_init__(self) -> None:
        _same_lengths(f"series {self.name!r}", x=self.x, y=self.y, low=self.low, high=self.high)


@dataclass(frozen=True)
class Reference:
    """A labelled line across a chart at one value: chance, the clean run, a threshold."""

    value: float
    label: str


@dataclass(frozen=True)
class LineChart:
    """Lines with interval bands. On a logarithmic axis an x of 0 stands one step left of the smallest other x."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    caption: str = ""
    log_x: bool = False
    references: Sequence[Reference] = ()
    y_range: tuple[float, float] | None = None
    y_format: str = ""
    """Python format of the values (``.0%``); chosen by size where it is not given."""

    def __post_init__(self) -> None:
        if self.log_x and any(x < 0 for line in self.series for x in line.x):
            raise ValueError(f"chart {self.title!r}: a logarithmic axis has no place for a negative x")


@dataclass(frozen=True)
class Bars:
    """One set of bars of a :class:`BarChart`, a value for each label."""

    name: str
    values: Sequence[Number]
    low: Sequence[Number] | None = None
    high: Sequence[Number] | None = None

    def __post_init__(self) -> None:
        _same_lengths(f"bars {self.name!r}", values=self.values, low=self.low, high=self.high)


@dataclass(frozen=True)
class BarChart:
    """Horizontal bars, grouped by label where there are several sets, with whiskers for intervals."""

    title: str
    labels: Sequence[str]
    bars: Sequence[Bars]
    value_label: str = ""
    caption: str = ""
    references: Sequence[Reference] = ()
    value_range: tuple[float, float] | None = None
    value_format: str = ""

    def __post_init__(self) -> None:
        for bars in self.bars:
            _same_lengths(f"chart {self.title!r}, bars {bars.name!r}", labels=self.labels, values=bars.values)


@dataclass(frozen=True)
class HeatMap:
    """Values by row and column on a diverging scale with its middle at 0."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[Number]]
    caption: str = ""
    row_label: str = ""
    column_label: str = ""
    value_format: str = ""

    def __post_init__(self) -> None:
        _same_lengths(f"heat map {self.title!r}", rows=self.rows, values=self.values)
        for row in self.values:
            _same_lengths(f"heat map {self.title!r}", columns=self.columns, values=row)


@dataclass(frozen=True)
class Points:
    """One set of points of a :class:`ScatterChart`; one with a missing x or y is not drawn."""

    name: str
    x: Sequence[Number]
    y: Sequence[Number]
    labels: Sequence[str] | None = None
    """What each point is, for its tooltip."""

    def __post_init__(self) -> None:
        _same_lengths(f"points {self.name!r}", x=self.x, y=self.y, labels=self.labels)


@dataclass(frozen=True)
class ScatterChart:
    """Points by two values; with `identity`, beside the line where both are the same."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Points]
    caption: str = ""
    identity: bool = False
    identity_label: str = "equal"
    value_format: str = ""
    """Python format of the values in tooltips and in the table; chosen by size where it is not given."""


@dataclass(frozen=True)
class Comparison:
    """What a model wrote after one prompt under several conditions, side by side."""

    prompt: str
    columns: Sequence[tuple[str, str]]
    highlight: Sequence[str] = ()
    """Words to mark in the texts, whatever their case."""


@dataclass(frozen=True)
class Tokens:
    """A prompt with a value for each token as its background, on a diverging scale with its middle at 0."""

    tokens: Sequence[str]
    values: Sequence[Number]
    caption: str = ""
    value_format: str = ""

    def __post_init__(self) -> None:
        _same_lengths("tokens", tokens=self.tokens, values=self.values)


Chart = LineChart | BarChart | HeatMap | ScatterChart
Block = Facts | Headline | Table | Chart | Comparison | Tokens


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs (a blank line parts them; `code` stands in backticks) and blocks."""

    title: str
    text: str = ""
    blocks: Sequence[Block] = ()


@dataclass(frozen=True)
class Page:
    """A report: its title, one paragraph that says what was found, sections, and where it all comes from."""

    title: str
    lead: str
    sections: Sequence[Section]
    facts: Facts = field(default_factory=lambda: Facts({}))


def _same_lengths(what: str, **parts: Sequence[object] | None) -> None:
    lengths = {name: len(part) for name, part in parts.items() if part is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{what}: lengths differ: " + ", ".join(f"{name} {n}" for name, n in lengths.items()))
