"""A circuit: nodes, and edges between them, as a value that is written to JSON and GraphML and read back."""

import json
import math
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saepatch.circuits.nodes import LOGITS, Edge, Node
from saepatch.errors import UserError
from saepatch.model.sites import Site
from saepatch.records.documents import parse_json
from saepatch.records.files import atomic
from saepatch.report.blocks import Cell, Simple, Table
from saepatch.report.notebook import Shown
from saepatch.report.text import number

FORMAT = "saepatch circuit 1"
TARGET = Node(None, kind=LOGITS)
STREAM = "whole streams"
_GRAPHML = "http://graphml.graphdrawing.org/xmlns"
# attribute names of nodes and edges in GraphML, and their types
_NODE_KEYS = {"site": "string", "kind": "string", "unit": "int", "position": "int", "effect": "double"}
_EDGE_KEYS = {"weight": "double"}


@dataclass(frozen=True, repr=False)
class Circuit(Shown):
    """Nodes and edges, with a number each: a node's effect and an edge's weight, in units of the metric.

    The logits are a node of circuits with edges. Nodes are in the order of the forward pass.
    """

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...] = ()
    effects: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Raises UserError for a repeated node or edge, or a wrong number of effects or weights."""
        for what, some in (("node", self.nodes), ("edge", self.edges)):
            if len(set(some)) != len(some):
                raise UserError(f"a circuit has a {what} twice: give each once")
        if len(self.effects) not in (0, len(self.nodes)) or len(self.weights) not in (0, len(self.edges)):
            raise UserError(
                f"{len(self.effects)} effects of {len(self.nodes)} nodes, {len(self.weights)} weights of "
                f"{len(self.edges)} edges: give one of each, or none"
            )
        ends = {node for edge in self.edges for node in (edge.up, edge.down)}
        if missing := ends - set(self.nodes):
            raise UserError(f"an edge of the circuit ends in {next(iter(missing))}, which is not among its nodes")

    def __repr__(self) -> str:
        strongest = "; ".join(f"{edge} ({number(weight)})" for edge, weight in self._strongest(3) if weight is not None)
        return f"{self.title}" + (f"\nstrongest: {strongest}" if strongest else "")

    @property
    def title(self) -> str:
        """Heading shown above the circuit."""
        return f"Circuit of {len(self.nodes)} nodes and {len(self.edges)} edges"

    def _strongest(self, k: int) -> list[tuple[Edge, float | None]]:
        """The `k` edges with the largest absolute weights; the first ones where there are no weights."""
        weighted = list(zip(self.edges, self.weights or (None,) * len(self.edges), strict=True))
        return sorted(weighted, key=lambda pair: -abs(pair[1] or 0.0))[:k]

    def blocks(self, k: int = 12) -> list[Simple]:
        """The nodes with the largest effects and the edges with the largest weights."""
        effects = self.effects or (None,) * len(self.nodes)
        nodes = sorted(zip(self.nodes, effects, strict=True), key=lambda pair: -abs(pair[1] or 0.0))[:k]
        listed: list[list[Cell]] = [[str(node), effect] for node, effect in nodes]
        blocks: list[Simple] = [Table(["node", "effect"], listed, _of(k, self.nodes))]
        if self.edges:
            rows: list[list[Cell]] = [[str(edge.up), str(edge.down), weight] for edge, weight in self._strongest(k)]
            blocks.append(Table(["from", "to", "weight"], rows, _of(k, self.edges)))
        return blocks

    @classmethod
    def of_edges(cls, weighted: Iterable[tuple[Edge, float]], effects: Mapping[Node, float] | None = None) -> "Circuit":
        """A circuit of edges, with the nodes that they join."""
        listed = list(weighted)
        nodes = sorted({node for edge, _ in listed for node in (edge.up, edge.down)}, key=lambda node: node.order)
        of_nodes = tuple(float((effects or {}).get(node, 0.0)) for node in nodes) if effects else ()
        return cls(tuple(nodes), tuple(edge for edge, _ in listed), of_nodes, tuple(w for _, w in listed))

    def facts(self) -> dict[str, Any]:
        """The circuit as JSON."""
        number = {node: i for i, node in enumerate(self.nodes)}
        nodes = [
            {
                "site": "" if node.site is None else str(node.site),
                "kind": node.kind,
                "unit": node.unit,
                "position": node.position,
                **({"effect": self.effects[i]} if self.effects else {}),
            }
            for i, node in enumerate(self.nodes)
        ]
        edges = [
            {"up": number[edge.up], "down": number[edge.down], **({"weight": self.weights[i]} if self.weights else {})}
            for i, edge in enumerate(self.edges)
        ]
        return {"format": FORMAT, "nodes": nodes, "edges": edges}

    @classmethod
    def from_facts(cls, facts: Any) -> "Circuit":
        """The circuit that `facts` describes.

        Raises:
            UserError: they do not describe a circuit.
        """
        found = facts.get("format") if isinstance(facts, Mapping) else None
        if found != FORMAT:
            raise UserError(f"not a circuit: its format is {found!r}, not {FORMAT!r}")
        try:
            nodes = [
                Node(Site.parse(n["site"]) if n["site"] else None, _whole(n, "unit"), _position(n), str(n["kind"]))
                for n in facts["nodes"]
            ]
            edges = [Edge(nodes[_whole(e, "up")], nodes[_whole(e, "down")]) for e in facts["edges"]]
            effects = tuple(_finite(n, "effect") for n in facts["nodes"] if "effect" in n)
            weights = tuple(_finite(e, "weight") for e in facts["edges"] if "weight" in e)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise UserError(f"a damaged circuit ({type(error).__name__}: {error}): write it again") from error
        return cls(tuple(nodes), tuple(edges), effects, weights)

    def write(self, path: str | Path) -> None:
        """Write to a file, as GraphML where its name ends in .graphml, otherwise as JSON."""
        path = Path(path)
        text = self._graphml() if path.suffix == ".graphml" else json.dumps(self.facts(), indent=1)
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> "Circuit":
        """Read what `write` wrote.

        Raises:
            UserError: the file does not hold a circuit.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            facts = _from_graphml(text) if path.suffix == ".graphml" else parse_json(text, str(path))
        except (OSError, ValueError, ET.ParseError, KeyError, AttributeError) as error:
            raise UserError(
                f"{str(path)!r} is not a circuit ({error}): give a file that Circuit.write wrote"
            ) from error
        return cls.from_facts(facts)

    def _graphml(self) -> str:
        facts = self.facts()
        root = ET.Element("graphml", xmlns=_GRAPHML)
        for kind, keys in (("node", _NODE_KEYS), ("edge", _EDGE_KEYS)):
            for name, typed in keys.items():
                ET.SubElement(root, "key", {"id": name, "for": kind, "attr.name": name, "attr.type": typed})
        graph = ET.SubElement(root, "graph", id=FORMAT, edgedefault="directed")
        for place, node in enumerate(facts["nodes"]):
            _with_data(ET.SubElement(graph, "node", id=f"n{place}"), node, _NODE_KEYS)
        for edge in facts["edges"]:
            ends = {"source": f"n{edge['up']}", "target": f"n{edge['down']}"}
            _with_data(ET.SubElement(graph, "edge", ends), edge, _EDGE_KEYS)
        ET.indent(root)
        return ET.tostring(root, encoding="unicode", xml_declaration=True)


def _whole(facts: Mapping[str, Any], name: str) -> int:
    value = facts[name]
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{name} is {value!r}")
    return value


def _position(facts: Mapping[str, Any]) -> int | None:
    return None if facts["position"] is None else _whole(facts, "position")


def _finite(facts: Mapping[str, Any], name: str) -> float:
    value = float(facts[name])
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}")
    return value


def _of(k: int, listed: Sequence[object]) -> str:
    """The caption of a table that shows the `k` largest."""
    return "In units of the metric." + (f" The {k} largest of {len(listed)}." if len(listed) > k else "")


def _with_data(element: ET.Element, facts: Mapping[str, Any], keys: Mapping[str, str]) -> None:
    for name in keys:
        if facts.get(name) is not None:
            ET.SubElement(element, "data", key=name).text = str(facts[name])


def _from_graphml(text: str) -> dict[str, Any]:
    graph = ET.fromstring(text).find(f"{{{_GRAPHML}}}graph")  # noqa: S314 (own files; expat expands no external entity)
    if graph is None:
        raise UserError("GraphML without a graph: give a file that Circuit.write wrote")

    def data(element: ET.Element, keys: Mapping[str, str]) -> dict[str, Any]:
        read = {"string": str, "int": int, "double": float}
        texts = {d.attrib["key"]: d.text or "" for d in element.findall(f"{{{_GRAPHML}}}data")}
        return {name: read[keys[name]](value) for name, value in texts.items()}

    nodes = [{"site": "", "position": None} | data(n, _NODE_KEYS) for n in graph.findall(f"{{{_GRAPHML}}}node")]
    edges = [
        {"up": int(e.attrib["source"][1:]), "down": int(e.attrib["target"][1:])} | data(e, _EDGE_KEYS)
        for e in graph.findall(f"{{{_GRAPHML}}}edge")
    ]
    return {"format": graph.attrib["id"], "nodes": nodes, "edges": edges}


def random_like(chosen: Sequence[Node], candidates: Sequence[Node], draws: int = 5, seed: int = 0) -> list[list[Node]]:
    """Controls: random sets of candidates outside `chosen`, with as many nodes at each site.

    They also have as many of each kind if there are enough; otherwise (an error term at all positions is the only one
    of its site) other nodes of the site are used. Whole streams, each the only node of its site, are drawn from other
    layers; where too few are left, heads are used. Token embeddings that the circuit has stay: without them, no other
    node differs from the counterfactual run.

    Raises:
        UserError: fewer than five draws, or a site has too few candidates beside the chosen nodes.
    """
    import numpy as np

    if draws < 5:
        raise UserError(f"draws = {draws}: use at least 5 random circuits")
    own, rng = set(chosen), np.random.default_rng(seed)
    others = [node for node in candidates if node not in own]
    embeddings = [node for node in chosen if node.kind == "stream" and node.site == Site(0, "resid_pre")]
    profile = Counter((_place(node), node.kind) for node in own.difference(embeddings) if node.site is not None)
    places = sorted({place for place, _ in profile}, key=lambda place: (place == STREAM, place))  # streams last
    sets = []
    for _ in range(draws):
        drawn: list[Node] = []
        for place in places:
            left = [node for node in others if _place(node) == place]
            wanted = sum(n for (at, _), n in profile.items() if at == place)
            if place == STREAM and len(left) < wanted:
                left += [node for node in others if node.kind == "head" and node not in set(drawn)]
            if len(left) < wanted:
                raise UserError(
                    f"{wanted} nodes at {place}, but {len(left)} candidates beside them: give all candidates, or a "
                    "smaller circuit"
                )
            before = len(drawn)
            for kind in sorted({kind for at, kind in profile if at == place}):
                mine = [node for node in left if node.kind == kind]
                drawn += [mine[i] for i in rng.permutation(len(mine))[: profile[place, kind]]]
                left = [node for node in left if node not in set(drawn)]
            missing = wanted - (len(drawn) - before)
            drawn += [left[i] for i in rng.permutation(len(left))[:missing]]
        sets.append([*embeddings, *drawn])
    return sets


def _place(node: Node) -> str:
    """What a random node stands in for: another at the same site, or another whole stream."""
    return STREAM if node.kind == "stream" else str(node.site)
