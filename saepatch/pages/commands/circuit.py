"""The page of `saepatch circuit`: the circuit drawn, its measures with controls, its nodes and edges as lists."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from saepatch.circuits.neuronpedia import graph_json
from saepatch.circuits.nodes import Node
from saepatch.data.batches import batch_pairs
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.errors import UserError
from saepatch.pages.cards import FEW_PROMPTS, anchors_of, cards_section, dead_latents
from saepatch.pages.charts import INTERVALS, cell, estimate_text
from saepatch.pages.gather import (
    READING,
    TEXTS,
    if_possible,
    prompt_tokens,
    read_dictionaries,
    stored_settings,
)
from saepatch.pages.overview import (
    FEW,
    dictionary_facts,
    headline_section,
    needs_reading,
    splice_notices,
    splice_section,
    too_few,
)
from saepatch.reading.cards import Card
from saepatch.records.files import write_json
from saepatch.report import (
    Block,
    Cell,
    Facts,
    GraphEdge,
    GraphNode,
    LineChart,
    Link,
    NodeGraph,
    Page,
    Points,
    Reference,
    ScatterChart,
    Section,
    Series,
    Table,
    token_text,
)
from saepatch.report.text import number
from saepatch.runs.catalogue import RunFolder, read_json
from saepatch.runs.commands.circuit_results import ERRORS, CircuitResults, read_results
from saepatch.runs.commands.circuits import CircuitRun, prepare
from saepatch.settings.circuit import CircuitConfig

log = logging.getLogger(__name__)

GRAPH = "neuronpedia.json"
DRAWN = 400  # nodes in the drawing, those with the largest effects
EDGES = 1500  # edges in the drawing
CARDS = 60  # latents with a card
NAMED = 2  # tokens in a node's label
EVERYWHERE = "all positions"


def write_circuit_reading(run: CircuitRun, out: Path) -> None:
    """Write the prompts, splice quality and cards of the circuit's latents to the run's folder."""
    texts = list(dict.fromkeys(text for pair in run.pairs for text in (pair.clean, pair.corrupted)))[:TEXTS]
    latents: dict[str, list[int]] = {}
    for node in _by_effect(run.plan.circuit.nodes, run.plan.circuit.effects)[:DRAWN]:
        if node.kind == "latent" and node.unit not in latents.get(str(node.site), []):
            latents.setdefault(str(node.site), []).append(node.unit)
    dictionaries: dict[str, Dictionary] = {str(d.site): d for d in run.dictionaries}
    splice, cards = read_dictionaries(run.model, dictionaries, latents, texts)
    prompts = prompt_tokens(run.model, run.pairs, False)
    write_json({"prompts": prompts, "splice": splice, "latents": list(map(asdict, cards))}, out / READING)
    _write_graph(run, labels_of(cards), out / GRAPH)


def _write_graph(run: CircuitRun, labels: Mapping[tuple[str, int], str], path: Path) -> None:
    """The circuit for Neuronpedia's viewer, with one pair's tokens; none where it cannot show the circuit."""
    circuit, model = run.plan.circuit, run.model
    pair = max(run.pairs, key=lambda pair: len(model.encode(pair.clean)))  # the first of the longest
    answer = int(batch_pairs(model, [pair]).answer[0])
    names = {node: name for node in circuit.nodes if (name := labels.get((str(node.site), node.unit)))}
    slug = re.sub(r"[^a-z0-9]+", "-", f"{model.name}-{run.source}".lower()).strip("-")
    try:
        prompt = model.token_texts(model.encode(pair.clean))
        facts = graph_json(circuit, prompt, model.name, slug, (answer, pair.answer), names)
    except UserError as error:
        log.info("no %s: %s", path.name, error)
        path.unlink(missing_ok=True)
    else:
        write_json(facts, path)


def labels_of(cards: Sequence[Card]) -> dict[tuple[str, int], str]:
    """The tokens at which each latent is most active."""
    labels = {}
    for card in cards:
        peaks = [e.tokens[max(range(len(e.acts)), key=e.acts.__getitem__)] for e in card.examples]
        labels[card.site, card.latent] = " ".join(token_text(t) for t in list(dict.fromkeys(peaks))[:NAMED])
    return labels


def try_reading_circuit(run: CircuitRun, out: Path) -> None:
    """`write_circuit_reading` at the end of a run, which is complete even if this fails."""
    (out / READING).unlink(missing_ok=True)  # from an earlier start
    if_possible(lambda: write_circuit_reading(run, out), None)


def read_circuit_again(run: RunFolder) -> None:
    """Load the model and dictionaries of a finished run again and write `reading.json`.

    Raises:
        UserError: the run's model, dictionaries or pairs no longer exist, or have changed.
    """
    config = stored_settings(CircuitConfig, run.path, run.path)
    write_circuit_reading(prepare(config), run.path)


def _by_effect(nodes: Sequence[Node], effects: Sequence[float]) -> list[Node]:
    sized = dict(zip(nodes, effects, strict=True)) if effects else dict.fromkeys(nodes, 0.0)
    return sorted((node for node in nodes if node.site is not None), key=lambda node: -abs(sized[node]))


def page_of_circuit(folder: RunFolder) -> Page:
    """The page of a finished run, from its files alone."""
    reading = read_json(folder.path / READING) if (folder.path / READING).exists() else None
    return CircuitPage(folder, read_results(folder.path), reading).page()


@dataclass(frozen=True, eq=False)
class CircuitPage:
    """A finished run, and what its page needs of the model where that was stored: tokens and cards."""

    folder: RunFolder
    results: CircuitResults
    reading: Mapping[str, Any] | None

    @cached_property
    def cards(self) -> list[Card]:
        return [Card.read(card) for card in (self.reading or {}).get("latents", ())]

    @cached_property
    def anchors(self) -> dict[tuple[str, str], str]:
        """Anchors of the cards that are on the page."""
        return anchors_of(self.cards[:CARDS])

    @cached_property
    def labels(self) -> dict[tuple[str, int], str]:
        return labels_of(self.cards)

    def page(self) -> Page:
        results, folder = self.results, self.folder
        text = (
            f"In {folder.model}, {len(results.nodes)} of {folder.summary['candidates']:,} nodes at {folder.sites}, "
            f"found on other pairs, have a faithfulness of {estimate_text(results.faithfulness['nodes'])} on "
            f"{len(results.examples)} pairs of {folder.task}: when only they act, and everything else has its value of "
            f"the pair's corrupted run, that share of the effect in {self._metric} is left."
        )
        sections = [headline_section(self._headline(), self._notices())]
        sections += [self._drawing(), self._measures(), self._lists(), self._choice()]
        if self.reading and self.reading["splice"]:
            sections.append(splice_section(self.reading["splice"]))
        if self.cards:
            which = f"{min(len(self.cards), CARDS)} latents of the circuit with the largest effects"
            sections.append(cards_section(self.cards[:CARDS], which, "this run's own prompts", FEW_PROMPTS))
        return Page(f"saepatch circuit: {folder.task} in {folder.model}", text, sections, self._facts())

    @property
    def _metric(self) -> str:
        return str(self.results.record.settings["metric"]).replace("_", " ")

    def _headline(self) -> dict[str, str]:
        results = self.results
        figures = {
            "nodes": f"{len(results.nodes)} of {self.folder.summary['candidates']:,}",
            "faithfulness": estimate_text(results.faithfulness["nodes"]),
            "completeness: of all others": estimate_text(results.completeness),
        }
        if results.random:
            figures[f"{len(results.random)} random circuits, at most"] = number(self._random_at_most, ".3f")
        return figures

    @property
    def _random_at_most(self) -> float:
        return max(share.value for share in self.results.random)

    def _notices(self) -> list[str]:
        results, warnings = self.results, []
        if len(results.examples) < FEW:
            warnings.append(too_few(len(results.examples), "pair"))
        if not results.random:
            warnings.append("There are no random circuits: too few nodes are left beside the circuit.")
        elif self._random_at_most > results.faithfulness["nodes"].value / 2:
            warnings.append("A random circuit of this size is at least half as faithful: the circuit is not specific.")
        kept, nodes = (results.faithfulness.get(name) for name in ("kept", "nodes"))
        if kept is not None and nodes is not None and abs(kept.value - nodes.value) > 0.2:
            warnings.append(
                f"Error terms matter: with all of them kept, the circuit's latents have {number(kept.value, '.2f')}, "
                f"with those of the circuit alone {number(nodes.value, '.2f')}."
            )
        pearson = results.facts_of_plan["selected"].get("pearson")
        if pearson is not None and pearson < 0.7:
            warnings.append(
                f"Estimates of edges and exact path patches agree badly (Pearson {number(pearson, '.2f')})."
            )
        if self.reading is None:
            warnings.append(needs_reading(self.folder.path))
        return [*warnings, *splice_notices((self.reading or {}).get("splice", ())), *dead_latents(self.cards, "")]

    # The drawing

    def _name(self, node: Node) -> str:
        return "the logits" if node.site is None else str(node)

    def _drawing(self) -> Section:
        circuit = self.results.circuit
        effects = dict(zip(circuit.nodes, circuit.effects, strict=True)) if circuit.effects else {}
        largest = _by_effect(circuit.nodes, circuit.effects)[:DRAWN]
        shown = sorted(largest, key=lambda node: node.order[:3])  # of a site and position, the largest first
        shown += [node for node in circuit.nodes if node.site is None]
        rows = list(dict.fromkeys("logits" if node.site is None else str(node.site) for node in shown))
        columns, place = self._columns(shown)
        nodes = [
            GraphNode(
                self._name(node),
                self._label(node),
                rows.index("logits" if node.site is None else str(node.site)),
                place[node],
                None if node.site is None else effects.get(node),
                self.anchors.get((str(node.site), str(node.unit)), "") if node.kind == "latent" else "",
                node.kind == "error",
            )
            for node in shown
        ]
        number_of = {node: i for i, node in enumerate(shown)}
        edges = [
            GraphEdge(number_of[edge.up], number_of[edge.down], weight)
            for edge, weight in zip(circuit.edges, circuit.weights, strict=True)
            if edge.up in number_of and edge.down in number_of
        ]
        edges = sorted(edges, key=lambda edge: -abs(edge.weight))[:EDGES]
        note = (
            f"{len(nodes)} nodes and {len(edges)} edges. Layers from bottom to top, positions from left to right. A "
            "latent is named by the tokens at which it is most active; error terms have a dashed outline. Orange: "
            "towards the clean run's answer; blue, and dashed edges: against it. Estimates on the pairs that the "
            f"circuit was found on, in units of the {self._metric}. Choose a node to list its edges; arrow keys lead "
            "from node to node, Enter chooses one. The same as lists: Nodes and edges, below."
        )
        return Section("Circuit", "", [NodeGraph("Nodes and edges", rows, columns, nodes, edges, note)])

    def _label(self, node: Node) -> str:
        if node.site is None:
            return "logits"
        if node.kind != "latent":
            return {"head": f"head {node.unit}", "stream": node.site.stream}.get(node.kind, node.kind)
        return self.labels.get((str(node.site), node.unit)) or str(node.unit)

    def _columns(self, shown: Sequence[Node]) -> tuple[list[str], dict[Node, int]]:
        """The names of the columns, and each node's column; the logits stand in the last."""
        positions = [node.position for node in shown if node.position is not None]
        if not positions:
            return [EVERYWHERE], dict.fromkeys(shown, 0)
        first, last = min(positions), max(positions)
        tokens = self.reading["prompts"]["shared"]["clean"] if self.reading else []
        names = []
        for position in range(first, last + 1):
            token = tokens[position] if position < len(tokens) else None
            names.append(str(position) if token is None else f"{position} {token_text(token)}")
        of = {node: last - first if node.position is None else node.position - first for node in shown}
        return names, of

    # Measures and lists

    def _measures(self) -> Section:
        results = self.results
        rows: list[list[Cell]] = [
            [f"faithfulness, {ERRORS.get(name, 'the edges alone')}", cell(share)]
            for name, share in results.faithfulness.items()
        ]
        rows.append(["completeness: everything but the circuit", cell(results.completeness)])
        rows += [[f"random circuit {i + 1}", cell(share)] for i, share in enumerate(results.random)]
        note = (
            "Shares of the effect of the whole model: ratios of means over pairs, (m(C) − m(∅)) / (m(M) − m(∅)). "
            "Random circuits have as many nodes at each site, none of them the circuit's own. The edges alone: a "
            "node reads only what its edges carry. Before the first site with nodes, and at BOS, padding and tokens "
            f"that a dictionary was not trained on, everything is the clean run's. {INTERVALS}"
        )
        blocks: list[Block] = [Table(["what acts", "share"], rows, note, {"share": ".3f"})]
        knocked: list[list[Cell]] = [
            [draw["size"], draw["circuit"], draw["model"], draw["gap"]] for draw in results.knocked_out
        ]
        columns = ["nodes taken out", "circuit", "whole model", "difference"]
        text = (
            "Random nodes of the circuit removed from it and from the whole model: for a complete circuit, both agree."
        )
        blocks.append(Table(columns, knocked, text, dict.fromkeys(columns[1:], ".3f")))
        return Section("Measures", "", blocks)

    def _lists(self) -> Section:
        circuit, losses = self.results.circuit, self.results.losses
        effects = dict(zip(circuit.nodes, circuit.effects, strict=True)) if circuit.effects else {}
        nodes: list[list[Cell]] = []
        for node in _by_effect(circuit.nodes, circuit.effects):
            anchor = self.anchors.get((str(node.site), str(node.unit)), "") if node.kind == "latent" else ""
            name: Cell = Link(str(node), anchor) if anchor else str(node)
            label = self.labels.get((str(node.site), node.unit), "") if node.kind == "latent" else ""
            nodes.append([name, label, effects.get(node), cell(losses.get(str(node)))])
        note = (
            "Effect: the mean estimate on the pairs the circuit was found on. Loss: what the circuit's share loses "
            f"on the reported pairs when only this node is removed. {INTERVALS}"
        )
        table = Table(["node", "most active at", "effect", "loss"], nodes, note, {"loss": ".3f"})
        listed = sorted(zip(circuit.edges, circuit.weights, strict=True), key=lambda pair: -abs(pair[1]))
        edges: list[list[Cell]] = [[self._name(e.up), self._name(e.down), weight] for e, weight in listed]
        blocks: list[Block] = [table]
        if edges:
            blocks.append(Table(["from", "to", "weight"], edges, "Mean estimates on the same pairs."))
        return Section("Nodes and edges", "", blocks)

    def _choice(self) -> Section:
        """How the circuit was chosen, on the pairs of `select`."""
        selected = self.results.facts_of_plan["selected"]
        value, low, high = zip(*selected["faithfulness"], strict=True)
        line = Series("nodes in the order of their effects", selected["sizes"], value, low, high)
        least = self.results.record.settings["least"]
        blocks: list[Block] = [
            LineChart(
                "Faithfulness over the number of nodes",
                "nodes",
                "faithfulness",
                [line],
                "On the pairs that the number of nodes was chosen on.",
                log_x=True,
                references=(Reference(1.0, "whole model"), Reference(least, f"{least:g}")),
            )
        ]
        if "exact" in selected:
            top = selected["verified_top"]
            sides = [
                Points(name, selected["exact"][some], selected["estimated"][some])
                for name, some in (("largest estimates", slice(0, top)), ("drawn at random", slice(top, None)))
            ]
            note = (
                f"{selected['edge_method']}, of {selected['edges']:,} edges between the circuit's nodes in single "
                f"pairs. Pearson {number(selected['pearson'], '.3f')}, Spearman {number(selected['spearman'], '.3f')}."
            )
            if "missed_share_at_most" in selected:
                note += (
                    f" Of the edges that were not path-patched, at most "
                    f"{number(selected['missed_share_at_most'], '.1%')} are as large as the top ones (95 %)."
                )
            units = f"({self._metric})"
            blocks.append(
                ScatterChart(
                    "Edges: estimates and exact path patches", f"exact {units}", f"estimate {units}", sides, note, True
                )
            )
        return Section("How it was chosen", "", blocks)

    def _facts(self) -> Facts:
        record, settings = self.results.record, self.results.record.settings
        shared = ", ".join(f"{name} {version}" for name, version in record.versions.items())
        return Facts(
            {
                "model": f"{record.model['name']} ({record.model['hash']})",
                **dictionary_facts(record.dictionaries),
                "pairs": f"{self.folder.task}, {settings['split']}: {len(self.results.examples):,}",
                "metric": self._metric,
                "positions": settings["positions"],
                "nodes ranked by": settings["method"] if record.dictionaries else "exact patching",
                "seed": str(settings["seed"]),
                "finished": self.folder.finished,
                "command": record.command,
                "versions": shared,
                **({"shards": str(record.shards)} if record.shards > 1 else {}),
            }
        )
