"""Merge the parts of a run: one table of rows, one of pairs, and a summary with intervals. Needs no model."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from saepatch.errors import UserError, reason_of
from saepatch.measure.results.effects import (
    CONTROLS,
    NOTHING,
    UNTESTED,
    WITHIN,
    about_table,
    effects_table,
    q_text,
    within_rounding,
)
from saepatch.records.files import atomic, write_json
from saepatch.records.provenance import versions
from saepatch.records.rows import ADDED, read_about
from saepatch.records.statistics import Interval, RatioBootstrap, false_discovery, why_no_q
from saepatch.runs.commands.answers import Answers, merge_answers
from saepatch.runs.commands.circuit_results import CircuitResults, merge_circuit
from saepatch.runs.commands.fact_results import EditResults, merge_edits
from saepatch.runs.commands.screens import Screens, read_screens
from saepatch.runs.interpret import read_directions, read_positions
from saepatch.runs.parts import KEYS, EditKey, Pairs, Record, RowChanges, complete, part_files, read_changes

log = logging.getLogger(__name__)

SHOWN = ("random", "matched")  # controls
TOP = 20  # edits per direction in the summary
DENSE = 2**27  # limit of pairs × edits that are tested together


def merge_run(out: Path) -> "Summary | Screens | Answers | CircuitResults | EditResults":
    """Write results.parquet, summary.json and config.yaml of a complete run.

    `patch` and `attribute` have pairs.parquet as well, `circuit` the circuit as circuit.json and circuit.graphml.

    Raises:
        UserError: there is no run, or it is not finished; the message names the missing parts.
    """
    records = complete(out)
    if records[0].work == "restore":
        return merge_answers(out, records)
    if records[0].work == "circuit":
        return merge_circuit(out, records)
    if records[0].work == "edit":
        return merge_edits(out, records)
    first, files = records[0], part_files(out, records)
    abouts = [read_about(file) or {} for file in files]
    pairs = _merge_pairs(abouts, out, first.settings["min_gap"])
    rows = _merge_rows(files, out)
    with atomic(out / "config.yaml") as temporary:
        temporary.write_bytes((first.folder(out) / "config.yaml").read_bytes())
    for leftover in out.glob("parts/*/.part-*"):  # from processes killed while writing
        with suppress(OSError):
            leftover.unlink()
    changes = read_changes(rows, pairs, _requested(first))
    result = (read_screens if first.work == "attribute" else summarise)(first, pairs, changes, abouts)
    facts = {
        "work": first.work,
        "settings": first.settings,
        "model": first.model,
        "dictionaries": first.dictionaries,
        "pairs": len(pairs.examples),
        "pairs_hash": first.pairs["hash"],
        "pairs_with_too_small_a_gap": pairs.missing,
        "clean": pairs.clean.mean(),
        "corrupted": pairs.corrupted.mean(),
        "rows": len(changes.key),
        "rows_without_effect": int(np.isnan(rows["effect"].to_numpy()).sum()),
        "shards": first.shards,
    }
    write_json(facts | result.facts() | {"versions": versions()}, out / "summary.json")
    return result


def _merge_pairs(abouts: Sequence[dict[str, Any]], out: Path, min_gap: float) -> Pairs:
    import pyarrow as pa
    import pyarrow.parquet as pq

    by_index: dict[int, tuple[str, float, float]] = {}
    for about in abouts:
        for index, example, clean, corrupted in about["pairs"]:
            by_index.setdefault(index, (example, clean, corrupted))
    examples, clean, corrupted = zip(*(by_index[index] for index in sorted(by_index)), strict=True)
    table = pa.table({"example": examples, "clean": clean, "corrupted": corrupted})
    with atomic(out / "pairs.parquet") as temporary:
        pq.write_table(table, temporary)
    return Pairs(examples, np.array(clean), np.array(corrupted), min_gap)


def _merge_rows(files: Sequence[Path], out: Path) -> Any:
    """Copy the parts into one file, one at a time; returns the columns that the summary needs."""
    import pyarrow.parquet as pq

    path = out / "results.parquet"
    schema = max((pq.read_schema(file).remove_metadata() for file in files), key=len)
    with atomic(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for file in files:
            writer.write_table(_part_table(file, schema))
    columns = [*KEYS, "example", "clean", "corrupted", "patched", "effect"]
    return pq.read_table(path, columns=columns, read_dictionary=[*KEYS, "example"])


def _part_table(file: Path, schema: Any) -> Any:
    """The rows of one part.

    Raises:
        UserError: the file cannot be read, or has other columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    remedy = "remove it and run its shard again"
    try:
        table = pq.read_table(file).replace_schema_metadata(None)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read the rows of {file} ({reason_of(error)}): {remedy}") from error
    for name in [name for name in ADDED if name in schema.names and name not in table.column_names]:
        place = schema.get_field_index(name)
        table = table.add_column(
            place, schema.field(name), pa.array([ADDED[name]] * len(table), schema.field(name).type)
        )
    if not table.schema.equals(schema):
        raise UserError(f"the rows of {file} have other columns than those of the first part: {remedy}")
    return table


@dataclass(frozen=True)
class Line:
    """One edit of the summary."""

    key: EditKey
    effect: Interval
    pairs: int  # in which the edit changed something
    q: float
    controls: dict[str, Interval]
    sets: int = 0  # number of control sets averaged for each role
    within_rounding: bool = False

    @property
    def name(self) -> str:
        return f"{self.key.site} {self.key.unit}".strip()

    def facts(self) -> dict[str, Any]:
        named = self.key._asdict() | {"effect": self.effect.facts(), "pairs": self.pairs, "q": self.q}
        named |= {"within_rounding": True} if self.within_rounding else {}
        return named | {f"{role}_controls": interval.facts() for role, interval in self.controls.items()}


@dataclass(frozen=True, eq=False)
class Summary:
    """Results of a run of `saepatch patch`: its top edits by direction, with the data for their table."""

    record: Record
    pairs: Pairs
    edits: int
    top: dict[str, list[Line]]
    curves: dict[str, list[Line]]
    """All groups at sites where groups of several sizes were requested, one of each size, whether top edits or not."""
    rounding: float
    """Share of the mean gap that rounding alone may change."""
    no_q: dict[str, str]
    """By direction: the reason why no edit can be flagged; empty where one can."""

    def facts(self) -> dict[str, Any]:
        """The results as stored in summary.json."""
        top, curves = (
            {direction: [line.facts() for line in lines] for direction, lines in by_direction.items()}
            for by_direction in (self.top, self.curves)
        )
        return {"edits": self.edits, "rounding": self.rounding, "top": top, "curves": curves}

    def table(self, k: int = 10) -> str:
        """The top edits as text, with intervals, controls and false discovery rates."""
        lines = []
        for direction, top in self.top.items():
            roles = [role for role in SHOWN if any(role in line.controls for line in top)]
            rows = []
            for line in top[:k]:
                cells = [
                    f"{line.effect}{' °' * line.within_rounding}",
                    *(line.controls.get(role, "") for role in roles),
                ]
                rows.append([line.name, line.key.position, *cells, line.pairs, q_text(line.q)])
            lines.append(effects_table(direction, roles, rows))
            if any(not line.pairs for line in top[:k]):
                lines.append(NOTHING)
            lines += [WITHIN.format(self.rounding)] * any(line.within_rounding for line in top[:k])
            lines += about_table(self.no_q[direction], max((line.sets for line in top[:k]), default=0))
        lines.append(
            f"{self.record.settings['metric']}: {self.pairs.ends()}. Effects are shares of the gap of all pairs"
        )
        if np.isnan(self.pairs.mean_gap):
            gap = self.pairs.gap.mean()
            lines.append(f"The two runs differ by {gap:.2g} on average, too little to divide by: check the pairs")
        return "\n".join(lines)


def summarise(record: Record, pairs: Pairs, changes: RowChanges, abouts: Sequence[dict[str, Any]]) -> Summary:
    """The largest edits of each direction: ratios of means over all pairs, with intervals over pairs."""
    rounding = max(about["rounding"] for about in abouts)
    top: dict[str, list[Line]] = {}
    curves: dict[str, list[Line]] = {}
    no_q: dict[str, str] = {}
    bootstrap = None if np.isnan(pairs.mean_gap) else pairs.bootstrap(record.settings["seed"])
    for direction in read_directions(record.settings["direction"]):
        own = [n for n, key in enumerate(changes.keys) if key.direction == direction and key.role not in CONTROLS]
        q = _q_values(changes, own, rounding * float(np.abs(pairs.gap).mean()))
        no_q[direction] = ""
        if np.isnan(q).all():
            no_q[direction] = why_no_q(len(pairs.clean), int((changes.counts[own] >= 2).sum())) or UNTESTED
        largest = pairs.largest_first(changes.totals[own])[:TOP]
        wanted = [*largest, *(i for i in _on_curves([changes.keys[n] for n in own]) if i not in set(largest))]
        lines = {i: _line(record, changes, bootstrap, own[i], float(q[i])) for i in wanted}
        means = {i: float(changes.totals[own[i]]) / len(pairs.clean) for i in wanted}
        lines = {i: replace(lines[i], within_rounding=within_rounding(means[i], rounding, pairs)) for i in wanted}
        top[direction] = [lines[i] for i in largest]
        curves[direction] = [lines[i] for i in _on_curves([changes.keys[n] for n in own])]
    return Summary(record, pairs, len(changes.keys), top, curves, rounding, no_q)


def _on_curves(keys: Sequence[EditKey]) -> list[int]:
    """Indices of the requested groups at sites where all groups differ in size, by site and size."""
    sizes: dict[str, dict[int, list[int]]] = {}
    for place, key in enumerate(keys):
        if key.role == "given":
            sizes.setdefault(key.site, {}).setdefault(key.latent.count(",") + 1, []).append(place)
    curves = [groups for groups in sizes.values() if len(groups) > 1 and all(len(g) == 1 for g in groups.values())]
    return [place for groups in curves for size in sorted(groups) for place in groups[size]]


def _requested(record: Record) -> list[EditKey]:
    """Keys of the requested edits, which are reported even if they change nothing; none with `each_position`."""
    settings = record.settings
    if record.edits is None or settings["each_position"]:
        return []
    positions = read_positions(settings["positions"])
    at = positions if isinstance(positions, str) else repr(positions)
    return [
        EditKey(direction, edit["site"], "latent", edit["role"], ",".join(map(str, edit["units"])), at)
        for direction in read_directions(settings["direction"])
        for edit in record.edits
    ]


def _q_values(changes: RowChanges, own: Sequence[int], rounding: float) -> Float[ndarray, "edits"]:
    """False discovery rates of some edits, as in `Effects.q_values`."""
    column = np.full(len(changes.keys), -1)
    column[list(own)] = np.arange(len(own))
    at = column[changes.key]
    own_rows = at >= 0
    twice = np.flatnonzero(changes.counts[list(own)] >= 2)  # an edit that changes one pair cannot be tested
    q = np.full(len(own), np.nan)
    if changes.pairs * len(twice) > DENSE:
        log.warning("%d edits × %d pairs are too many to test together: q is omitted", len(twice), changes.pairs)
        return q
    place = np.full(len(own), -1)
    place[twice] = np.arange(len(twice))
    own_rows &= np.isin(at, twice)
    cells = (changes.pair[own_rows], place[at[own_rows]])
    values = np.zeros((changes.pairs, len(twice)))
    tested = np.zeros(values.shape, dtype=bool)
    values[cells], tested[cells] = changes.change[own_rows], True
    values[np.abs(values) < rounding] = 0.0
    q[twice] = false_discovery(values, tested)
    return q


def _line(record: Record, changes: RowChanges, bootstrap: RatioBootstrap | None, number: int, q: float) -> Line:
    """One edit with its controls; without `bootstrap` the mean gap is too small to divide by."""

    def ratio(change: Float[ndarray, "pairs"]) -> Interval:
        if bootstrap is None:
            return Interval.withheld(float("nan"), len(change), "the mean gap is too small")
        return bootstrap.of(change)

    key = changes.keys[number]
    controls, n_sets = {}, 0
    for role in SHOWN:
        sets = [
            ",".join(map(str, edit["units"]))
            for edit in record.edits or ()
            if (edit["site"], edit["role"], ",".join(map(str, edit["beside"]))) == (key.site, role, key.latent)
        ]
        if sets:
            each = [changes.of(key._replace(role=role, latent=units)) for units in sets]
            controls[role] = ratio(np.mean(each, axis=0))
            n_sets = max(n_sets, len(sets))
    return Line(key, ratio(changes.of(key)), int(changes.counts[number]), q, controls, n_sets)
