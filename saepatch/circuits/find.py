"""Find a circuit: rank nodes by attribution, choose how many, prune, and estimate the edges between them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from saepatch.circuits.circuit import TARGET, Circuit
from saepatch.circuits.edges.edge_list import Edges
from saepatch.circuits.edges.estimates import EdgeOptions, edges
from saepatch.circuits.measures import SizeCurve, size_curve
from saepatch.circuits.node_runs import NodeRuns
from saepatch.circuits.nodes import Edge, Node
from saepatch.circuits.prune import acdc
from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.components import Edit, Patchable
from saepatch.engine.gradients import FirstOrder, Method
from saepatch.engine.options import SweepOptions
from saepatch.errors import UserError
from saepatch.measure.attribution import attribute
from saepatch.measure.patching import patch_components
from saepatch.model.language_model import LanguageModel

SIZES = 24  # sizes at which faithfulness is measured
Keep = Callable[
    [str, Callable[[], Any]], Any
]  # the JSON value stored under a name, made and stored where there is none


@dataclass(frozen=True)
class FindOptions:
    """Options of `find_circuit`.

    Attributes:
        method: How nodes are ranked: by their signed mean estimates.
        each_position: Nodes at one position each; otherwise at all positions together.
        least: Faithfulness that the smallest number of nodes is chosen for.
        size: Number of nodes; 0: by `least`.
        prune: Threshold of a two-sided ACDC removal of nodes afterwards; 0: none.
        edges: How edges are estimated and verified; None: there are none.
        keep: Number of edges, those with the largest mean estimates.
    """

    method: Method = field(default_factory=FirstOrder)
    each_position: bool = False
    least: float = 0.9
    size: int = 0
    prune: float = 0.0
    edges: EdgeOptions | None = field(default_factory=EdgeOptions)
    keep: int = 300


def _unkept(_: str, make: Callable[[], Any]) -> Any:
    return make()


@dataclass(frozen=True, eq=False)
class _KeptRuns:
    """Runs whose metrics are kept in the order in which they are asked for: a search asks for the same ones again."""

    runs: NodeRuns
    keep: Keep
    stage: str
    number: Iterator[int] = field(default_factory=count)

    @property
    def members(self) -> Sequence[Node]:
        return self.runs.members

    @property
    def whole(self) -> Float[ndarray, "pairs"]:
        return self.runs.whole

    @property
    def empty(self) -> Float[ndarray, "pairs"]:
        return self.runs.empty

    def run(self, act: Bool[Tensor, "variants members"]) -> Float[ndarray, "variants pairs"]:
        return np.array(self.keep(f"{self.stage}/{next(self.number)}", lambda: self.runs.run(act).tolist()))


@dataclass(frozen=True, eq=False)
class FoundCircuit:
    """A circuit with its selection: all ranked nodes, and faithfulness over sizes on `tune`."""

    circuit: Circuit
    ranked: tuple[Node, ...]
    score: Float[ndarray, "ranked"]
    curve: SizeCurve
    edges: Edges | None


def find_circuit(
    model: LanguageModel,
    patchables: Patchable | Sequence[Patchable],
    pairs: Sequence[PromptPair],
    tune: Sequence[PromptPair] | None = None,
    how: FindOptions | None = None,
    options: SweepOptions | None = None,
    keep: Keep = _unkept,
) -> FoundCircuit:
    """Find a circuit of nodes: nodes and edges on `pairs`, how many nodes on `tune` (None: `pairs`).

    `patchables` are as for `edges`: dictionaries, whose latents and error terms are ranked by attribution, and `Heads`
    and `Stream`, whose nodes are few and are ranked by patching each exactly. Measure the circuit on other pairs: a
    number of nodes chosen on the pairs that they are ranked on is too small for others. Nodes are taken in the order of
    their signed mean effects; those that work against the clean run's answer come last. Edges lead from one of the
    circuit's nodes to another or to the logits. `keep` stores JSON values by name; a search that was stopped continues
    from those that the same search stored.

    Raises:
        UserError: pairs are not aligned or do not differ, the metric has no gradient, or no number of nodes reaches
            `least`.
    """
    how, options, tune = how or FindOptions(), options or SweepOptions(), tune or pairs
    several = list(patchables) if isinstance(patchables, Sequence) else [patchables]
    effects, sign = _kept_effects(keep, lambda: node_effects(model, several, pairs, how, options))
    ranked = sorted(effects, key=lambda node: -sign * effects[node])
    if not ranked:
        raise UserError("nothing differs between the runs of any pair, so there are no nodes: check the pairs")
    score = sign * np.array([effects[node] for node in ranked])
    runs = _KeptRuns(NodeRuns(model, several, tune, ranked, options=options), keep, "size")
    curve = size_curve(runs, score.tolist(), by_size=False, shares=_shares(len(ranked), how.size))
    chosen = ranked[: _size(curve, how)]
    if how.prune:
        chosen = _pruned(_KeptRuns(NodeRuns(model, several, tune, chosen, options=options), keep, "prune"), how)
    joined = None
    if how.edges is not None:
        joined = edges(model, several, pairs, replace(how.edges, among=tuple(chosen)), options)
    return FoundCircuit(_circuit(chosen, effects, joined, how), tuple(ranked), score, curve, joined)


def _kept_effects(
    keep: Keep, measure: Callable[[], tuple[dict[Node, float], float]]
) -> tuple[dict[Node, float], float]:
    def facts() -> dict[str, Any]:
        effects, sign = measure()
        return {"nodes": Circuit(tuple(effects), effects=tuple(effects.values())).facts(), "sign": sign}

    kept = keep("effects", facts)
    circuit = Circuit.from_facts(kept["nodes"])
    return dict(zip(circuit.nodes, circuit.effects, strict=True)), kept["sign"]


def node_effects(
    model: LanguageModel,
    patchables: Sequence[Patchable],
    pairs: Sequence[PromptPair],
    how: FindOptions,
    options: SweepOptions,
) -> tuple[dict[Node, float], float]:
    """The mean effect of every node that differs between the runs, and the sign of the gap between these.

    Nodes of dictionaries are estimated by `how.method`; those of `Heads` and `Stream` are patched exactly.
    """
    saes = [some for some in patchables if isinstance(some, Dictionary)]
    others = [some for some in patchables if not isinstance(some, Dictionary)]
    effects: dict[Node, float] = {}
    sign = 0.0
    if saes:
        screen = attribute(model, saes, pairs, how.method, options=options)
        edits, means = screen.means(how.each_position)
        effects |= {_node(edit): mean for edit, mean in zip(edits, means.tolist(), strict=True)}
        sign = float(np.sign(screen.gap.mean()))
    if others:
        exact = patch_components(model, others, pairs, options=replace(options, each_position=how.each_position))
        changes = zip(exact.edits, exact.change.mean(0).tolist(), exact.ran.T, strict=True)
        effects |= {_node(edit): mean for edit, mean, ran in changes if ran.any()}
        sign = float(np.sign(exact.gap.mean()))
    return effects, sign


def _node(edit: Edit) -> Node:
    return Node(edit.site, edit.units[0], edit.position, edit.kind)


def _shares(total: int, size: int) -> list[float]:
    """Shares of all nodes, about equally far apart in ratio; `size`, if given, among them."""
    sizes = {round(math.exp(x)) for x in np.linspace(0, math.log(total), SIZES)} | {min(size or total, total)}
    return [n / total for n in sorted(sizes)]


def _size(curve: SizeCurve, how: FindOptions) -> int:
    if how.size > curve.sizes[-1]:
        raise UserError(f"{how.size} nodes are asked for, but {curve.sizes[-1]} differ between the runs: ask for fewer")
    size = how.size or curve.smallest(how.least)
    if size is None:
        best = max(f.value for f in curve.faithfulness)
        raise UserError(f"no number of nodes has a faithfulness of {how.least:g} (at most {best:.3f}): ask for less")
    return size


def _pruned(runs: _KeptRuns, how: FindOptions) -> list[Node]:
    (left,) = acdc(runs, [how.prune])
    if not left.size:
        raise UserError(f"prune = {how.prune:g} removes all {len(runs.members)} nodes: use less")
    return [node for node, acts in zip(runs.members, left.act.tolist(), strict=True) if acts]


def _circuit(chosen: Sequence[Node], effects: Mapping[Node, float], joined: Edges | None, how: FindOptions) -> Circuit:
    nodes = sorted(chosen, key=lambda node: node.order)
    if joined is None:
        return Circuit(tuple(nodes), effects=tuple(effects[node] for node in nodes))
    weights = edge_weights(joined, how.each_position)
    largest = sorted(weights, key=lambda edge: -abs(weights[edge]))[: how.keep]
    listed = sorted(largest, key=lambda edge: (edge.up.order, edge.down.order))
    every = (*nodes, TARGET)
    of_nodes = tuple(effects.get(node, 0.0) for node in every)
    return Circuit(every, tuple(listed), of_nodes, tuple(weights[edge] for edge in listed))


def edge_weights(joined: Edges, each_position: bool) -> dict[Edge, float]:
    """The mean estimate of every edge, or of all positions of an edge together."""
    weights: dict[Edge, float] = {}
    for edge, weight in zip(*joined.means(), strict=True):
        if not each_position:
            edge = Edge(replace(edge.up, position=None), replace(edge.down, position=None))
        weights[edge] = weights.get(edge, 0.0) + float(weight)
    return weights


def members_of(circuit: Circuit) -> list[Node]:
    """The nodes of a circuit without its target."""
    return [node for node in circuit.nodes if node.site is not None]
