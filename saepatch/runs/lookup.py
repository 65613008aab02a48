"""Effects of single edits looked up in the rows of two merged runs, and their differences."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import hypot
from pathlib import Path
from typing import Any

import numpy as np

from saepatch.errors import UserError
from saepatch.measure.results.effects import CONTROLS
from saepatch.records.statistics import Interval
from saepatch.runs.catalogue import RunFolder
from saepatch.runs.parts import KEYS, EditKey, Pairs, RowChanges, read_changes

DIFFERENCES = (
    "B − A: over the same pairs with the same gaps, a paired difference with its interval; otherwise with the "
    "interval for two independent runs (Zou and Donner 2008)"
)
EXACT = ("top", "random")  # roles of a screen's rows that were run exactly


@dataclass(frozen=True)
class EditInBoth:
    """The effect of one edit in two runs, None where a run has no rows of it, and the second minus the first."""

    first: Interval | None
    second: Interval | None
    difference: Interval | None

    def facts(self) -> dict[str, Any]:
        return {
            "rows": [interval and interval.facts() for interval in (self.first, self.second)],
            "difference": self.difference and self.difference.facts(),
        }


@dataclass(frozen=True, eq=False)
class _Rows:
    pairs: Pairs
    changes: RowChanges
    seed: int
    aside: Collection[str]

    @cached_property
    def of(self) -> dict[EditKey, EditKey]:
        """The key of each edit, by the edit without its role; some roles are ignored."""
        return {key._replace(role=""): key for key in self.changes.keys if key.role not in self.aside}


def look_up(
    first: RunFolder, second: RunFolder, lines: Mapping[str, Sequence[Mapping[str, Any] | None]]
) -> dict[str, EditInBoth]:
    """Each edit's effect in both runs, from their rows; empty if these cannot be read.

    For runs of `saepatch attribute`, effects are estimates.

    Args:
        first: A run.
        second: Another.
        lines: By name, which begins with the direction, an edit's entries in their summaries; one of them may be None.
    """
    try:
        aside = EXACT if first.work == "attribute" else CONTROLS
        rows = [
            _Rows(*read_merged(run.path, run.settings["min_gap"]), int(run.settings["seed"]), aside)
            for run in (first, second)
        ]
    except UserError:
        return {}
    both = {}
    for name, entries in lines.items():
        entry = next(entry for entry in entries if entry is not None)
        entry = {"direction": name.partition(":")[0], **entry, "role": ""}
        key = EditKey(*(str(entry[column]) for column in KEYS))
        keys = [each.of.get(key) for each in rows]
        changes = [None if own is None else each.changes.of(own) for each, own in zip(rows, keys, strict=True)]
        if any(change is not None and np.isnan(change).any() for change in changes):
            continue  # estimates without a sign
        effects = [
            None if change is None else each.pairs.ratio(change, each.seed)
            for each, change in zip(rows, changes, strict=True)
        ]
        difference = None
        if changes[0] is not None and changes[1] is not None:
            same = rows[0].pairs.examples == rows[1].pairs.examples
            if same and np.allclose(rows[0].pairs.gap, rows[1].pairs.gap, rtol=1e-4):
                difference = rows[1].pairs.ratio(changes[1] - changes[0], rows[1].seed)
            else:
                difference = _independent(effects[0], effects[1])
        both[name] = EditInBoth(effects[0], effects[1], difference)
    return both


def _independent(one: Interval | None, other: Interval | None) -> Interval:
    """The second minus the first, with an interval computed from both (MOVER)."""
    assert one is not None
    assert other is not None
    value, n = other.value - one.value, min(one.n, other.n)
    if reason := one.reason or other.reason:
        return Interval.withheld(value, n, reason)
    low = value - hypot(other.value - other.low, one.high - one.value)
    return Interval(value, low, value + hypot(other.high - other.value, one.value - one.low), n)


def read_merged(out: Path, min_gap: float) -> tuple[Pairs, RowChanges]:
    """Pairs and changes of a merged run.

    Raises:
        UserError: they cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [*KEYS, "example", "clean", "corrupted", "patched", "effect"]
    try:
        own = pq.read_table(out / "pairs.parquet").to_pydict()
        rows = pq.read_table(out / "results.parquet", columns=columns, read_dictionary=[*KEYS, "example"])
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read the rows in {str(out)!r} ({error}): merge the run again") from error
    pairs = Pairs(tuple(own["example"]), np.array(own["clean"]), np.array(own["corrupted"]), min_gap)
    return pairs, read_changes(rows, pairs, [])
