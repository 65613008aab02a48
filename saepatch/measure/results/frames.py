"""Results as pandas frames with stated dtypes: numbers as numbers, missing ones as NA.

Text columns are `string`, ids and counts `Int64` (both take NA), measured values `float64`, flags `bool`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from saepatch.engine.components import Edit
from saepatch.measure.results.effects import CONTROLS, WHOLE, Effects, describe, within_rounding
from saepatch.measure.results.screen import ERROR, Attribution

Columns = dict[str, tuple[type, Any]]  # the kind of each column, and its values
DTYPES = {str: "string", int: "Int64", float: "float64", bool: "bool"}


def typed_frame(columns: Mapping[str, tuple[type, Any]], attrs: Mapping[str, Any]) -> Any:
    """A frame of columns, each with the kind of its values (`DTYPES`); None is a missing one."""
    frame = pd.DataFrame({name: pd.array(list(values), dtype=DTYPES[kind]) for name, (kind, values) in columns.items()})
    frame.attrs.update(attrs)
    return frame


def effects_frame(effects: Effects, intervals: bool = True, seed: int = 0) -> Any:
    """See `Effects.to_frame`."""
    edits, n = effects.edits, len(effects.clean)
    own = np.array([edit.role not in CONTROLS for edit in edits], dtype=bool)
    mean = effects.change.mean(0) if n else np.zeros(len(edits))
    columns = _edit_columns(effects, edits) | {"ratio_of_means": (float, mean / effects.mean_gap)}
    if intervals:
        columns |= _interval_columns(effects, seed)
    columns |= {
        "mean_change": (float, mean),
        "pairs_changed": (int, effects.ran.sum(0).tolist()),
        "q": (float, np.where(own, effects.q_values(), np.nan)),
        "within_rounding": (bool, [within_rounding(float(value), effects.rounding, effects) for value in mean]),
    }
    return typed_frame(columns, _attrs(effects) | {"rounding": effects.rounding})


def _interval_columns(effects: Effects, seed: int) -> Columns:
    bootstrap = effects.bootstrap(seed)  # one set of draws for all edits: each interval is that of `Effects.of`
    withheld = np.isnan(effects.mean_gap)
    drawn = [effects.of(i, seed) if withheld else bootstrap.of(effects.change[:, i]) for i in range(len(effects.edits))]
    return {
        "low": (float, [each.low for each in drawn]),
        "high": (float, [each.high for each in drawn]),
        "why_no_interval": (str, [each.reason or None for each in drawn]),
    }


def _edit_columns(effects: Effects, edits: Sequence[Edit]) -> Columns:
    """Columns that name the edits."""
    tokens = [effects.token_at(i) for i in range(len(edits))]
    return {
        "site": (str, [edit.place for edit in edits]),
        "component": (str, [edit.kind if not edit.others else "several" for edit in edits]),
        "units": (str, [describe(edit) for edit in edits]),
        "latent": (int, [_single(edit) for edit in edits]),
        "role": (str, [edit.role for edit in edits]),
        "position": (int, [edit.position if not edit.others else None for edit in edits]),
        "token": (str, tokens),
        "direction": (str, [effects.direction] * len(edits)),
        "metric": (str, [effects.metric] * len(edits)),
    }


def _single(edit: Edit) -> int | None:
    """The number of the only unit of an edit, where units are numbered."""
    return int(edit.units[0]) if len(edit.units) == 1 and not edit.others and edit.kind not in WHOLE else None


def rows_frame(effects: Effects, task: str = "") -> Any:
    """See `Effects.to_pandas`."""
    wanted = effects.wanted()
    pairs, edits = (index.tolist() for index in np.nonzero(wanted))
    named = _edit_columns(effects, effects.edits)
    columns: Columns = {
        "task": (str, [task] * len(pairs)),
        "pair": (int, pairs),
        "example": (str, [effects.examples[pair] for pair in pairs]),
    }
    for name, (kind, values) in named.items():
        columns[name] = kind, [values[edit] for edit in edits]
    columns["token"] = str, [effects.own_token(pair, effects.edits[edit]) for pair, edit in zip(pairs, edits)]
    columns |= {
        "clean": (float, effects.clean[pairs]),
        "corrupted": (float, effects.corrupted[pairs]),
        "patched": (float, effects.patched[pairs, edits]),
        "gap": (float, effects.gap[pairs]),
        "change": (float, effects.change[pairs, edits]),
        "normalised": (float, effects.normalised[pairs, edits]),
    }
    return typed_frame(columns, _attrs(effects))


def attribution_frame(screen: Attribution, each_position: bool = True) -> Any:
    """See `Attribution.to_frame`."""
    keys, mean = screen.key_means(each_position)
    order = np.argsort(-np.abs(mean), kind="stable")
    site, unit, position = (part[order].tolist() for part in keys)
    nodes: dict[tuple[int, int, int], set[int]] = {}
    columns_of = (screen.site, screen.unit, screen.position if each_position else np.zeros_like(screen.position))
    for pair, *key in zip(screen.pair.tolist(), *(column.tolist() for column in columns_of)):
        nodes.setdefault((key[0], key[1], key[2]), set()).add(pair)
    where = [nodes[key] for key in zip(site, unit, position)]
    columns: Columns = _node_columns(screen, site, unit)
    if each_position:
        columns |= {
            "position": (int, position),
            "token": (str, [_shared(screen.tokens, pairs, at) for pairs, at in zip(where, position)]),
        }
    columns |= {
        "direction": (str, [screen.direction] * len(order)),
        "metric": (str, [screen.metric] * len(order)),
        "method": (str, [screen.method] * len(order)),
        "ratio_of_means": (float, screen.shares(mean)[order]),
        "mean_estimate": (float, mean[order]),
        "pairs_changed": (int, [len(pairs) for pairs in where]),
    }
    return typed_frame(columns, _attrs(screen) | {"sizes": screen.sizes})


def nodes_frame(screen: Attribution) -> Any:
    """See `Attribution.to_pandas`."""
    exact, role = np.full(len(screen), np.nan), np.full(len(screen), None, dtype=object)
    if (run := screen.verified) is not None:
        exact[run.index] = run.exact
        role[run.index[: run.largest]], role[run.index[run.largest :]] = "top", "random"
    at = screen.position.tolist()
    columns: Columns = {
        "pair": (int, screen.pair.tolist()),
        "example": (str, [screen.examples[pair] for pair in screen.pair]),
        **_node_columns(screen, screen.site.tolist(), screen.unit.tolist()),
        "position": (int, at),
        "token": (str, [_shared(screen.tokens, [pair], p) for pair, p in zip(screen.pair.tolist(), at)]),
        "gap": (float, screen.gap[screen.pair]),
        "estimate": (float, screen.score),
        "exact": (float, exact),
        "verified": (str, role),
    }
    return typed_frame(columns, _attrs(screen) | {"method": screen.method, "sizes": screen.sizes})


def _node_columns(screen: Attribution, site: Sequence[int], unit: Sequence[int]) -> Columns:
    return {
        "site": (str, [str(screen.sites[s]) for s in site]),
        "component": (str, ["error" if u == ERROR else screen.kinds[s] for s, u in zip(site, unit)]),
        "latent": (int, [None if u == ERROR else u for u in unit]),
    }


def _shared(tokens: Sequence[Sequence[str]], pairs: Iterable[int], at: int) -> str | None:
    """The token at a position where the pairs agree; "…" where they differ; None where tokens are unknown."""
    if not tokens:
        return None
    known = {tokens[pair][at] for pair in pairs}
    return known.pop() if len(known) == 1 else "…"


def _attrs(result: Effects | Attribution) -> dict[str, Any]:
    """Facts about all rows, for `frame.attrs`."""
    return {
        "direction": result.direction,
        "metric": result.metric,
        "pairs": len(result.clean),
        "mean_gap": result.mean_gap,
        "positions": result.positions,
    }
