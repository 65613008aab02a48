"""Heat maps of effects, and the tables of edits to which their cells link."""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from saepatch.measure.results.effects import Effects, describe
from saepatch.model.sites import Site
from saepatch.pages.charts import cell
from saepatch.report import Cell, EstimateCell, HeatMap, Link, Table, token_text
from saepatch.runs.parts import EditKey

EACH = 4  # edits of each site and position that the table of edits always lists
FLOOR = 0.1  # share of the gap: where all effects are smaller, colours are as pale as on a map that reaches it
COLOURS = (
    "Orange: towards the source run; blue: away from it; pale: no interval, or one that contains 0; –: not run, since "
    "nothing differs there."
)

Row = TypeVar("Row", bound=Hashable)
Column = TypeVar("Column", bound=Hashable)


@dataclass(frozen=True, eq=False)
class EditTable:
    """Edits with their effects: shares of the gap, and the number of pairs in which each edit changes something."""

    keys: Sequence[EditKey]
    effects: Float[ndarray, "edits"]
    changed: Int[ndarray, "edits"]
    intervals: Callable[[Sequence[int]], Sequence[EstimateCell | None]]

    @classmethod
    def of(cls, *sweeps: Effects) -> "EditTable":
        """The edits of several sweeps in one table."""
        every = [(sweep, i, edit) for sweep in sweeps for i, edit in enumerate(sweep.edits)]
        keys = [
            EditKey(
                sweep.direction,
                str(edit.site),
                edit.kind,
                edit.role,
                describe(edit),
                sweep.positions if edit.position is None else str(edit.position),
            )
            for sweep, _, edit in every
        ]
        return cls(
            keys,
            np.concatenate([sweep.ratios() for sweep in sweeps]),
            np.concatenate([sweep.ran.sum(0) for sweep in sweeps]),
            lambda numbers: [cell(sweep.of(i)) for sweep, i, _ in (every[number] for number in numbers)],
        )

    def ran(self, *components: str) -> list[int]:
        """The edits of some components that changed something in at least one pair."""
        return [n for n, key in enumerate(self.keys) if key.component in components and self.changed[n]]

    def by_size(self, numbers: Collection[int]) -> list[int]:
        """These edits by absolute effect, largest first."""
        size = np.abs(np.nan_to_num(self.effects))
        return sorted(numbers, key=lambda number: -size[number])

    def largest_by_cell(self, numbers: Collection[int], most: int | None = None, first: int = 0) -> list[int]:
        """The `first` largest of these edits and the `EACH` largest per site and position, at most `most` in all."""
        ranked = self.by_size(numbers)
        kept = dict.fromkeys(ranked[:first])
        seen: dict[tuple[str, str, str], int] = {}
        for number in ranked:
            place = (self.keys[number].site, self.keys[number].component, self.keys[number].position)
            seen[place] = seen.get(place, 0) + 1
            if seen[place] <= EACH and (most is None or len(kept) < most):
                kept[number] = None
        return sorted(kept, key=lambda number: -float(np.nan_to_num(self.effects[number])))


@dataclass(frozen=True)
class PromptTokens:
    """The tokens of prompts by position; None where prompts differ; empty where the tokens are unknown."""

    clean: Sequence[str | None] = ()
    corrupted: Sequence[str | None] = ()
    aligned: bool = True  # whether both prompts of a pair have the same number of tokens

    def columns(self, positions: Sequence[int]) -> tuple[dict[int, str], list[str] | None]:
        """Names of positions for an axis: the clean prompt's tokens, and the corrupted one's below them."""
        if not self.clean or not self.aligned:
            return {position: str(position) for position in positions}, None
        clean, corrupted = (_names(side, positions) for side in (self.clean, self.corrupted))
        names = {position: f"{position} {name}" for position, name in zip(positions, clean)}
        if set(corrupted[1:]) <= {"…"}:  # ignoring BOS
            return names, None
        return names, ["=" if token == other and token != "…" else other for token, other in zip(clean, corrupted)]


def _names(tokens: Sequence[str | None], positions: Sequence[int]) -> list[str]:
    known = dict(enumerate(tokens))
    return ["…" if known.get(position) is None else token_text(str(known[position])) for position in positions]


def positions_of(edits: EditTable, numbers: Sequence[int]) -> list[int]:
    """The positions at which some of the edits are, in order; of edits at all positions, none."""
    return sorted({int(place) for number in numbers if (place := edits.keys[number].position).isdigit()})


# Keys that link the cells of maps to the rows of tables


def site_key(key: EditKey, component: str = "") -> str:
    """Key of all edits of a component at one site and position."""
    return f"{key.direction}/{key.site}/{component or key.component}/{key.position}"


def unit_key(key: EditKey) -> str:
    """Key of one unit at one position, or at all positions."""
    return f"{key.direction}/{key.site}/{key.component}:{key.latent}/{key.position.replace(' ', '')}"


# Maps


def draw_map(
    title: str,
    edits: EditTable,
    numbers: Sequence[int],
    place: Callable[[EditKey], tuple[Row, Column]],
    rows: Mapping[Row, str],
    columns: Mapping[Column, str],
    caption: str = "",
    leads_to: Callable[[EditKey], str] = unit_key,
) -> HeatMap:
    """A map of some edits: `place` gives each edit's row and column; the edits of a cell are summed.

    A cell of one edit whose interval contains 0 is pale.

    Args:
        rows: Names of the rows, in order; edits whose row or column is not named are left out.
        leads_to: The key of the table rows that a click on an edit's cell shows.
    """
    row_at, column_at = ({name: i for i, name in enumerate(names)} for names in (rows, columns))
    values = np.full((len(rows), len(columns)), np.nan)
    keys = [["" for _ in columns] for _ in rows]
    cells: dict[tuple[int, int], list[int]] = {}
    for number in numbers:
        row, column = place(edits.keys[number])
        if row in row_at and column in column_at:
            cells.setdefault((row_at[row], column_at[column]), []).append(number)
    for (i, j), own in cells.items():
        values[i, j] = edits.effects[own].sum()
        keys[i][j] = leads_to(edits.keys[own[-1]])
    alone = {at: own[0] for at, own in cells.items() if len(own) == 1}
    uncertain = np.zeros(values.shape, dtype=bool)
    for at, interval in zip(alone, edits.intervals(list(alone.values())), strict=True):
        uncertain[at] = interval is not None and not _excludes_zero(interval)
    return HeatMap(
        title,
        list(rows.values()),
        list(columns.values()),
        values.tolist(),
        f"{caption} {COLOURS}".strip(),
        value_format=".2f" if np.nanmax(np.abs(values), initial=0.0) >= 0.1 else ".3f",
        keys=keys,
        scale=FLOOR,
        uncertain=uncertain.tolist(),
    )


def _excludes_zero(cell: EstimateCell) -> bool:
    return cell.low is not None and cell.high is not None and not cell.low <= 0 <= cell.high


def on_one_scale(maps: Sequence[HeatMap]) -> list[HeatMap]:
    """The maps with one colour scale and number format, such as those of both directions."""
    top = max((abs(v) for chart in maps for row in chart.values for v in row if v is not None and v == v), default=0.0)
    form = ".2f" if top >= 0.1 else ".3f"
    return [replace(chart, scale=max(top, chart.scale), value_format=form) for chart in maps]


def head_map(
    title: str, edits: EditTable, numbers: Sequence[int], n_heads: int | None = None, caption: str = ""
) -> HeatMap:
    """Layer against attention head, at all positions together."""
    layers = sorted({Site.parse(edits.keys[number].site).layer for number in numbers})
    heads = n_heads or 1 + max(int(edits.keys[number].latent) for number in numbers)
    drawn = draw_map(
        title,
        edits,
        numbers,
        lambda key: (Site.parse(key.site).layer, int(key.latent)),
        {layer: str(layer) for layer in layers},
        {head: str(head) for head in range(heads)},
        caption,
    )
    return replace(drawn, row_label="layer", column_label="head")


def site_and_position(key: EditKey) -> tuple[str, int]:
    """The place of an edit of a whole site."""
    return key.site, int(key.position)


def unit_and_position(key: EditKey) -> tuple[tuple[str, str, str], int]:
    """The place of an edit of one unit."""
    return unit_of(key), int(key.position)


def unit_of(key: EditKey) -> tuple[str, str, str]:
    return key.site, key.component, key.latent


# Tables


def edit_table(
    edits: EditTable,
    numbers: Sequence[int],
    tokens: PromptTokens,
    anchors: Mapping[tuple[str, str], str],
    caption: str,
    q: Mapping[EditKey, float] | None = None,
) -> Table:
    """Edits with their effects; `anchors` are cards by (site, latent), `q` false discovery rates of some edits."""
    positions = positions_of(edits, numbers)
    named, below = tokens.columns(positions)
    names = {str(position): name for position, name in named.items()}
    for (position, name), other in zip(names.copy().items(), below or ()):
        if other != "=" and not (other == "…" and name.endswith("…")):
            names[position] = f"{name} / {other}"
    rows: list[list[Cell]] = []
    keys: list[list[str]] = []
    for number, interval in zip(numbers, edits.intervals(numbers)):
        key = edits.keys[number]
        anchor = anchors.get((key.site, key.latent))
        linked: Cell = Link(key.unit, anchor) if anchor and key.component == "latent" else key.unit
        row: list[Cell] = [key.site, linked, names.get(key.position, key.position), interval]
        rows.append([*row, int(edits.changed[number]), *([] if q is None else [q.get(key)])])
        mapped = key.position.isdigit() or key.component == "head"
        keys.append([site_key(key), unit_key(key)] if mapped else [])
    columns = ["site", "unit", "position", "effect", "pairs changed", *([] if q is None else ["q"])]
    formats = {"effect": ".3f", "pairs changed": "d", "q": ".2g"}
    return Table(columns, rows, caption, {name: formats[name] for name in columns if name in formats}, keys)
