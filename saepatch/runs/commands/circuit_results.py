"""Results of `saepatch circuit`: the shares of all measured circuits, from the rows of all parts. Needs no model."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from saepatch.circuits.circuit import Circuit
from saepatch.circuits.find import members_of
from saepatch.circuits.nodes import Node
from saepatch.records.files import atomic, write_json
from saepatch.records.provenance import versions
from saepatch.records.rows import CircuitRow, grouped, read_row, read_rows, write_rows
from saepatch.records.statistics import Interval, bootstrap_ratio
from saepatch.records.tables import text_table
from saepatch.runs.parts import Record, complete, part_files

ERRORS = {
    "nodes": "errors as nodes",
    "kept": "latents alone, errors kept",
    "dropped": "latents alone, errors dropped",
}
FILES = ("circuit.json", "circuit.graphml")


@dataclass(frozen=True)
class _Key:
    """What identifies a measured circuit."""

    variant: str
    errors: str
    draw: int
    node: str


@dataclass(frozen=True, eq=False)
class CircuitResults:
    """Results of a run: its circuit, and the metric of every pair in every measured run."""

    record: Record
    rows: Sequence[CircuitRow]

    @cached_property
    def facts_of_plan(self) -> dict[str, Any]:
        return (self.record.edits or [{}])[0]

    @cached_property
    def circuit(self) -> Circuit:
        return Circuit.from_facts(self.facts_of_plan["circuit"])

    @cached_property
    def _by_key(self) -> dict[_Key, list[CircuitRow]]:
        by_key: dict[_Key, list[CircuitRow]] = {}
        for row in self.rows:
            by_key.setdefault(_Key(row.variant, row.errors, row.draw, row.node), []).append(row)
        return by_key

    @property
    def examples(self) -> list[str]:
        return list(dict.fromkeys(row.example for row in self.rows))

    def _share(self, key: _Key) -> Interval:
        """The share of the whole model's effect: a ratio of means with its interval over pairs."""
        value, whole, empty = _columns(self._by_key[key])
        return bootstrap_ratio(value - empty, whole - empty, seed=self.record.settings["seed"])

    @cached_property
    def faithfulness(self) -> dict[str, Interval]:
        """By what error terms do; and `edges`, of the circuit's edges alone."""
        shares = {
            errors: self._share(key) for errors in ERRORS if (key := _Key("circuit", errors, 0, "")) in self._by_key
        }
        edges = _Key("edges", "nodes", 0, "")
        return shares | ({"edges": self._share(edges)} if edges in self._by_key else {})

    @cached_property
    def completeness(self) -> Interval:
        return self._share(_Key("complement", "nodes", 0, ""))

    @cached_property
    def random(self) -> list[Interval]:
        return [self._share(key) for key in self._by_key if key.variant == "random"]

    @cached_property
    def losses(self) -> dict[str, Interval]:
        """Each node's contribution to the circuit's share, by name, largest first."""
        own, whole, empty = _columns(self._by_key[_Key("circuit", "nodes", 0, "")])
        losses = {}
        for key, rows in self._by_key.items():
            if key.variant == "without":
                without = _columns(rows)[0]
                losses[key.node] = bootstrap_ratio(own - without, whole - empty, seed=self.record.settings["seed"])
        return dict(sorted(losses.items(), key=lambda item: -item[1].value))

    @cached_property
    def knocked_out(self) -> list[dict[str, Any]]:
        """Shares of circuit and model without some nodes of the circuit."""
        out = []
        for key, rows in self._by_key.items():
            if key.variant == "circuit without some":
                shares = [self._share(k).value for k in (key, _Key("model without some", "nodes", key.draw, ""))]
                gap = abs(shares[0] - shares[1])
                out.append({"size": rows[0].size, "circuit": shares[0], "model": shares[1], "gap": gap})
        return out

    @property
    def nodes(self) -> list[Node]:
        return members_of(self.circuit)

    def facts(self) -> dict[str, Any]:
        """Content of summary.json."""
        record, selected = self.record, self.facts_of_plan["selected"]
        _, whole, empty = _columns(self._by_key[_Key("circuit", "nodes", 0, "")])
        kinds = [node.kind for node in self.nodes]
        return {
            "work": record.work,
            "settings": record.settings,
            "model": record.model,
            "dictionaries": record.dictionaries,
            "pairs": len(self.examples),
            "pairs_hash": record.pairs["hash"],
            "rows": len(self.rows),
            "shards": record.shards,
            "nodes": len(kinds),
            "latents": kinds.count("latent"),
            "errors": kinds.count("error"),
            "edges": len(self.circuit.edges),
            "candidates": selected["candidates"],
            "whole": whole.mean(),
            "empty": empty.mean(),
            "faithfulness": {name: interval.as_list() for name, interval in self.faithfulness.items()},
            "completeness": self.completeness.as_list(),
            "random": [interval.as_list() for interval in self.random],
            "minimality": {node: interval.as_list() for node, interval in self.losses.items()},
            "knocked_out": self.knocked_out,
            "selected": selected,
            "versions": versions(),
        }

    def table(self) -> str:
        """The circuit's measures as text."""
        selected = self.facts_of_plan["selected"]
        rows = [[f"faithfulness, {ERRORS.get(name, 'edges alone')}", str(f)] for name, f in self.faithfulness.items()]
        rows.append(["completeness (of all other nodes)", str(self.completeness)])
        if self.random:
            rows.append([f"{len(self.random)} random circuits, at most", f"{max(r.value for r in self.random):.3f}"])
        if self.losses:
            node, loss = next(reversed(self.losses.items()))
            rows.append([f"smallest loss from removing one node: {node}", str(loss)])
        rows.append(["circuit and model without some of its nodes, at most", f"{self._gap:.3f}"])
        size = f"{len(self.nodes)} of {selected['candidates']} nodes, {len(self.circuit.edges)} edges"
        lines = [text_table([size, "share"], rows, left=1)]
        if "pearson" in selected:
            lines.append(f"edges: Pearson {selected['pearson']:.3f} of estimates with exact path patches")
        lines.append(
            f"{self.record.settings['metric']}, {len(self.examples)} pairs that the circuit was not found on. 95 % "
            "intervals over pairs; 1: the whole model, 0: nothing acts"
        )
        return "\n".join(lines)

    @property
    def _gap(self) -> float:
        return max((draw["gap"] for draw in self.knocked_out), default=float("nan"))


def _columns(rows: Sequence[CircuitRow]) -> tuple[Float[ndarray, "pairs"], ...]:
    """Metric of the run, when everything acts, and when nothing does; by pair."""
    ordered = sorted(rows, key=lambda row: row.example)
    return tuple(np.array([getattr(row, name) for row in ordered]) for name in ("value", "whole", "empty"))


def merge_circuit(out: Path, records: Sequence[Record]) -> CircuitResults:
    """Read the rows of a complete run and write results.parquet, summary.json, config.yaml and the circuit."""
    rows = [read_row(row, CircuitRow) for file in part_files(out, records) for row in read_rows(file)]
    results = CircuitResults(records[0], [row for row, _ in rows])
    write_rows(grouped(rows), out / "results.parquet", kind=CircuitRow)
    with atomic(out / "config.yaml") as temporary:
        temporary.write_bytes((records[0].folder(out) / "config.yaml").read_bytes())
    for name in FILES:
        results.circuit.write(out / name)
    write_json(results.facts(), out / "summary.json")
    return results


def read_results(out: Path) -> CircuitResults:
    """The results of a merged run.

    Raises:
        UserError: the folder holds no complete run.
    """
    rows = [read_row(row, CircuitRow)[0] for row in read_rows(out / "results.parquet")]
    return CircuitResults(complete(out)[0], rows)
