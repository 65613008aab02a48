"""The report, the summary and the circuits that the experiment writes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from saepatch.circuits.circuit import Circuit
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site
from saepatch.pages.charts import INTERVALS, cell
from saepatch.records.provenance import Provenance
from saepatch.report import Cell, Facts, Page, Section, Table

from ..common.tracked import conclude
from .edges import MeasuredEdges
from .nodes import MOST, MeasuredCircuit
from .settings import CircuitsConfig


def verdict(config: CircuitsConfig, circuits: Sequence[MeasuredCircuit], of_edges: Sequence[MeasuredEdges]) -> str:
    """Of each task, the smallest circuit, relative to what is active, that holds on `report`, with its controls."""
    sentences = []
    for task in config.tasks:
        good = [each for each in circuits if each.task == task and each.faithfulness.value >= config.least]
        if not good:
            sentences.append(f"{task}: no circuit chosen on `tune` has a faithfulness of {config.least:g} on `report`.")
            continue
        best = min(good, key=lambda each: each.size / each.active)
        sentences.append(
            f"{task}: {best.size} of {best.active} active nodes ({best.members}, {best.ranking}) have a faithfulness "
            f"of {best.faithfulness} on held-out pairs; random circuits of the same layers at most "
            f"{best.random_at_most:.3f}. Without them {best.completeness} is left."
        )
        few = [each for each in of_edges if each.task == task and each.faithfulness.value >= config.least]
        if few:
            least = min(few, key=lambda each: each.size)
            sentences.append(
                f"{least.size} of {least.possible} edges between {least.nodes} nodes ({least.members}, {least.method}) "
                f"have {least.faithfulness}."
            )
    return " ".join(sentences)


def write(
    config: CircuitsConfig,
    model: LanguageModel,
    saes: Mapping[Site, Dictionary],
    circuits: Sequence[MeasuredCircuit],
    of_edges: Sequence[MeasuredEdges],
) -> None:
    """Write the report, the summary, the circuits and the settings, and log them to trackers."""
    out, finding = Path(config.out), verdict(config, circuits, of_edges)
    first = next(iter(saes.values()), None)
    sae = ("", "") if first is None else (config.sae, first.fingerprint)
    provenance = Provenance(model.name, model.fingerprint, *sae, config.seed)
    sections = [section for task in config.tasks for section in _sections(config, task, circuits, of_edges)]
    page = Page("How small a circuit does a behaviour need?", finding, sections, Facts(provenance.facts()))
    for number, each in enumerate(circuits):
        Circuit.from_facts(json.loads(each.circuit)).write(out / f"circuit-{number}.json")
    listed: dict[str, Any] = {}
    for number, each in enumerate(circuits):
        rest = {"random": each.random_at_most, "circuit": f"circuit-{number}.json"}
        listed[f"{each.task}, {each.members}, {each.ranking}"] = _plain(each) | rest
    edges = {f"{each.task}, {each.members}, {each.method}": _plain(each) for each in of_edges}
    figures = {f"{each.task}/{each.members}/{each.ranking}": each.faithfulness.value for each in circuits}
    conclude(config, "circuits", page, {"circuits": listed, "edges": edges}, figures)


def _plain(each: MeasuredCircuit | MeasuredEdges) -> dict[str, Any]:
    """The fields of a result, intervals as [value, low, high]."""
    intervals = {name: value.as_list() for name, value in vars(each).items() if hasattr(value, "as_list")}
    return asdict(each) | intervals


def _sections(
    config: CircuitsConfig, task: str, circuits: Sequence[MeasuredCircuit], of_edges: Sequence[MeasuredEdges]
) -> list[Section]:
    head = ["members", "ranking", "nodes", "active", "faithfulness", "completeness", "random, at most"]
    head += ["knock-out gap", "smallest loss", "CPR", "CMD", "interchange accuracy"]
    rows: list[list[Cell]] = []
    for each in circuits:
        if each.task == task:
            figures = (each.random_at_most, each.knocked_out, each.smallest_loss, each.cpr, each.cmd)
            rows.append([
                each.members, each.ranking, each.size, each.active, cell(each.faithfulness), cell(each.completeness),
                *(None if np.isnan(value) else round(value, 4) for value in figures), cell(each.accuracy),
            ])  # fmt: skip
    note = (
        f"Smallest circuits with a faithfulness of at least {config.least:g} on `tune`, measured on `report`. "
        "Everything else, error terms too, has its value of the pair's corrupted run; before the first site with nodes "
        "everything is live. Knock-out gap: the largest difference between circuit and model without random nodes of "
        "the circuit. Smallest loss: of a single node taken out (of circuits "
        f"of up to {MOST} nodes). CPR ranks by signed score, CMD by size. DBM: the latents of a learned mask. "
        f"{INTERVALS}"
    )
    head_edges = [
        "members",
        "ranked by",
        "edges",
        "of",
        "between nodes",
        "faithfulness",
        "all edges",
        "random, at most",
    ]
    head_edges += ["Pearson with path patches"]
    edge_rows: list[list[Cell]] = [
        [
            each.members, each.method, each.size, each.possible, each.nodes, cell(each.faithfulness), cell(each.whole),
            max(each.random, default=None), None if np.isnan(each.pearson) else round(each.pearson, 3),
        ]
        for each in of_edges
        if each.task == task
    ]  # fmt: skip
    edge_note = (
        "Edges between nodes at all positions: a node reads only what its edges carry. Nodes are as few of the ranking "
        f"by integrated gradients (of heads and MLPs: by exact patching) as have a faithfulness of "
        f"{(1 + config.least) / 2:g} on `tune`; {config.few} pairs of each split. Random: as many of the other edges."
    )
    return [
        Section(f"Nodes: {task}", "", [Table(head, rows, note)]),
        Section(f"Edges: {task}", "", [Table(head_edges, edge_rows, edge_note)]),
    ]
