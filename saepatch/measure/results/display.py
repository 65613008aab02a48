"""Display of effects: a line, tables as text and as blocks of a report, figures."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from saepatch.engine.components import Edit
from saepatch.errors import UserError
from saepatch.measure.results.effects import (
    CONTROLS,
    NOTHING,
    UNTESTED,
    WITHIN,
    Effects,
    about_table,
    describe,
    effects_table,
    q_text,
    within_rounding,
)
from saepatch.measure.results.maps import Map
from saepatch.records.statistics import Interval
from saepatch.report.blocks import (
    BarChart,
    Bars,
    Cell,
    EstimateCell,
    Facts,
    HeatMap,
    Notices,
    Reference,
    Simple,
    Table,
)
from saepatch.report.notebook import Figure
from saepatch.report.text import number, token_text

INTERVALS = "Intervals: 95 % over pairs."


@dataclass(frozen=True)
class TopEdit:
    """One of the largest edits, with the contents of its table row."""

    edit: Edit
    effect: Interval
    controls: tuple[Interval | None, ...]
    sets: int
    changed: int
    q: float
    small: bool
    token: str | None

    @property
    def name(self) -> str:
        return f"{self.edit.place} {describe(self.edit)}"

    @property
    def position(self) -> int | str:
        return "all" if self.edit.position is None else self.edit.position

    @property
    def where(self) -> str:
        """The position with its token."""
        return f"{self.position} {token_text(self.token)}" if self.token else str(self.position)


def control_roles(effects: Effects) -> list[str]:
    """Kinds of controls that the effects have a column for."""
    return [role for role in CONTROLS[:2] if effects.where(role)]


def top_edits(effects: Effects, k: int) -> list[TopEdit]:
    """The `k` largest edits."""
    q, mean, roles = effects.q_values(), effects.change.mean(0), control_roles(effects)
    listed = []
    for edit in effects.top(k):
        i = effects.edits.index(edit)
        controls = tuple(effects.controls(i, role) for role in roles)
        sets = max((effects.control_sets(i, role) for role in roles), default=0)
        small = within_rounding(float(mean[i]), effects.rounding, effects)
        changed = int(effects.ran[:, i].sum())
        listed.append(TopEdit(edit, effects.of(i), controls, sets, changed, float(q[i]), small, effects.token_at(i)))
    return listed


def summary_text(effects: Effects, k: int) -> str:
    """See `Effects.summary`."""
    top = top_edits(effects, k)
    rows = [[e.name, e.position, f"{e.effect}{' °' * e.small}", *e.controls, e.changed, q_text(e.q)] for e in top]
    lines = [effects_table("what", control_roles(effects), rows), *_notes(effects, top)]
    lines.append(f"{effects.direction}, {effects.metric}: {effects.ends()}, positions {effects.positions}")
    return "\n".join(lines)


def _notes(effects: Effects, top: Sequence[TopEdit]) -> list[str]:
    """What to know about a table of these edits: what q assumes, the number of control sets, rounding."""
    lines = [NOTHING] if any(not each.changed for each in top) else []
    lines += [WITHIN.format(effects.rounding)] if any(each.small for each in top) else []
    no_q = (effects.why_no_q() or UNTESTED) if np.isnan(effects.q_values()).all() else ""
    return lines + about_table(no_q, max((each.sets for each in top), default=0))


def effects_line(effects: Effects) -> str:
    """The effects in two or three lines, without intervals."""
    own = [i for i, edit in enumerate(effects.edits) if edit.role not in CONTROLS]
    about = f"{effects.direction}, {effects.metric}, positions {effects.positions}"
    lines = [f"Effects of {len(own):,} edits on {len(effects.clean)} pairs ({about})"]
    if own and not np.isnan(effects.mean_gap):
        ratios = effects.ratios()
        largest = sorted(own, key=lambda i: -ratios[i])[:3]
        lines.append("largest: " + "; ".join(f"{_name(effects.edits[i])} {ratios[i]:.3f}" for i in largest))
    return "\n".join([*lines, "summary() has intervals, controls and q; to_frame() a row for every edit"])


def _name(edit: Edit) -> str:
    name = f"{edit.place} {describe(edit)}".strip()
    return name if edit.position is None else f"{name} at {edit.position}"


def effects_blocks(effects: Effects, k: int = 10) -> list[Simple]:
    """The metric of both runs, and the largest edits."""
    ends = {"metric": effects.metric.replace("_", " "), "clean runs": number(float(effects.clean.mean()))}
    ends |= {"corrupted runs": number(float(effects.corrupted.mean())), "positions": effects.positions}
    facts = Facts(ends)
    if np.isnan(effects.mean_gap):
        return [Notices([f"The mean gap is below {effects.min_gap:g}, so there are no effects to rank."]), facts]
    top = top_edits(effects, k)
    roles = control_roles(effects)
    rows: list[list[Cell]] = []
    for each in top:
        controls = [None if control is None else interval_cell(control) for control in each.controls]
        q = None if np.isnan(each.q) else each.q
        unit = _clipped(describe(each.edit)) + " °" * each.small
        rows.append([each.edit.place, unit, each.where, interval_cell(each.effect), *controls, each.changed, q])
    columns = ["site", "unit", "at", "effect", *(f"{role} controls" for role in roles), "pairs changed", "q"]
    formats = dict.fromkeys(columns[3 : 4 + len(roles)], ".3f") | {"q": ".2g", "pairs changed": "d"}
    meaning = "Effect: ratio of means over pairs, 0 the base run, 1 the source run."
    caption = "\n\n".join([f"{meaning} {INTERVALS}", *_notes(effects, top)])
    return [facts, Table(columns, rows, caption, formats)]


def _clipped(units: str, most: int = 30) -> str:
    """A list of units, shortened where it is long, with their number."""
    if len(units) <= most or "|" in units:
        return units
    first = units[:most].rpartition(",")[0]
    return f"{first},… ({units.count(',') + 1})"


def interval_cell(interval: Interval) -> EstimateCell:
    """A table cell with an interval."""
    low, high = (None if np.isnan(end) else end for end in (interval.low, interval.high))
    return EstimateCell(interval.value, low, high, interval.reason)


def effects_figure(effects: Effects, k: int) -> Figure:
    """See `Effects.plot`."""
    effects.check_gap(effects.metric)
    own = [edit for edit in effects.edits if edit.role not in CONTROLS]
    if own and all(edit.position is not None for edit in own):
        return effects_map(effects, None if all(edit.kind == "stream" for edit in own) else k).plot()
    if own and all(edit.kind == "head" and len(edit.units) == 1 and not edit.others for edit in own):
        return _head_figure(effects, own)
    return _bars(effects, k)


def effects_map(effects: Effects, k: int | None = None) -> Map:
    """See `Effects.map`."""
    if any(edit.position is None for edit in effects.edits):
        raise UserError("a map needs edits at one position each: sweep with each_position=True")
    ratios, ran = effects.ratios(), np.asarray(effects.ran.any(0))
    own = [(i, edit) for i, edit in enumerate(effects.edits) if edit.role not in CONTROLS]
    positions = sorted({edit.position for _, edit in own if edit.position is not None})
    keys = list(dict.fromkeys(edit.key for _, edit in own))
    row, column = {key: i for i, key in enumerate(keys)}, {position: i for i, position in enumerate(positions)}
    values = np.full((len(keys), len(positions)), np.nan)
    for i, edit in own:
        if ran[i] and edit.position is not None:
            values[row[edit.key], column[edit.position]] = ratios[i]
    labels = {edit.key: " ".join(filter(None, (edit.place, describe(edit)))) for _, edit in own}
    names = [labels[key] for key in keys]
    if k is not None and k < len(keys):
        best = np.argsort(-np.nan_to_num(np.abs(values)).max(1), kind="stable")[:k]
        names, values = [names[i] for i in best], values[best]
    tokens = tuple(_token(effects, position) for position in positions) if effects.tokens else ()
    about = (effects.direction, effects.metric, len(effects.clean))
    return Map(tuple(names), tuple(positions), values, tokens, *about)


def _token(effects: Effects, position: int) -> str:
    """The token of the pairs that have the position; "…" where they differ."""
    known = {row[position] for row in effects.tokens if -len(row) <= position < len(row)}
    return known.pop() if len(known) == 1 else "…"


def _head_figure(effects: Effects, own: Sequence[Edit]) -> Figure:
    layers, ratios = sorted({edit.site.layer for edit in own}), effects.ratios()
    values = np.full((len(layers), 1 + max(edit.units[0] for edit in own)), np.nan)
    for i, edit in enumerate(effects.edits):
        if edit.role not in CONTROLS:
            values[layers.index(edit.site.layer), edit.units[0]] = ratios[i]
    caption = f"n = {len(effects.clean)} pairs. Effects as shares of the mean gap."
    heads = [str(head) for head in range(values.shape[1])]
    rows = [str(layer) for layer in layers]
    return Figure(HeatMap(effects.title, rows, heads, values.tolist(), caption, "layer", "head", ".2f"))


def _bars(effects: Effects, k: int) -> Figure:
    """The largest edits as bars, with the mean of their controls beside them."""
    top, roles = top_edits(effects, k), control_roles(effects)
    labels = [
        " ".join(filter(None, (each.name.strip(), each.where if each.edit.position is not None else "")))
        for each in top
    ]
    bars = [_bar("given" if roles else "effect", [each.effect for each in top])]
    for place, role in enumerate(roles):
        bars.append(_bar(f"{role} controls", [each.controls[place] for each in top]))
    caption = f"n = {len(effects.clean)} pairs. 0: base run, 1: source run. {INTERVALS}"
    references = [Reference(1.0, "")] if any(each.effect.value > 0.5 for each in top) else []
    return Figure(BarChart(effects.title, labels, bars, "ratio of means", caption, references))


def _bar(name: str, intervals: Sequence[Interval | None]) -> Bars:
    def ends(which: str) -> list[float | None]:
        return [None if each is None or np.isnan(getattr(each, which)) else getattr(each, which) for each in intervals]

    return Bars(name, ends("value"), ends("low"), ends("high"))
