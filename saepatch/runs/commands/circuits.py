"""`saepatch circuit`: find a circuit on some pairs, measure it on others, part by part."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from saepatch.circuits.circuit import Circuit, random_like
from saepatch.circuits.edges.backward import gim, relp
from saepatch.circuits.edges.edge_runs import EdgeRuns
from saepatch.circuits.edges.estimates import EdgeOptions, Linear
from saepatch.circuits.find import FindOptions, FoundCircuit, find_circuit, members_of
from saepatch.circuits.measures import MemberRuns
from saepatch.circuits.node_runs import Errors, NodeRuns
from saepatch.circuits.nodes import Node, every_component
from saepatch.data.pairs import PromptPair, load_pairs
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.components import Patchable
from saepatch.engine.gradients import FirstOrder, IntegratedGradients
from saepatch.engine.metrics import read_metric, source_hash
from saepatch.engine.options import SweepOptions
from saepatch.errors import UserError
from saepatch.measure.results.effects import precision_of
from saepatch.model.language_model import LanguageModel
from saepatch.organism import tasks
from saepatch.records.rows import CircuitRow
from saepatch.runs.catalogue import MEASUREMENTS
from saepatch.runs.driver import Count, Finished, PartContent, Place, drive, write_record
from saepatch.runs.interpret import (
    distinct_names,
    pairs_hash,
    read_dictionaries,
    read_model,
    read_positions,
    read_sites,
)
from saepatch.runs.measurements import Measurements
from saepatch.runs.parts import Record
from saepatch.settings.circuit import CircuitConfig
from saepatch.tracking.open import Tracker

log = logging.getLogger(__name__)

KNOCKED_OUT = 5  # draws of nodes that are knocked out together, of each size


@dataclass(frozen=True, eq=False)
class CircuitPlan:
    """What is measured: a circuit, random circuits beside it, and sets of its nodes that are knocked out."""

    circuit: Circuit
    random: tuple[tuple[Node, ...], ...]
    knocked_out: tuple[tuple[Node, ...], ...]
    selected: dict[str, Any]
    """How the circuit was chosen: number of candidates, faithfulness over sizes, agreement of edges with exact ones."""

    @classmethod
    def of(cls, config: CircuitConfig, selected: FoundCircuit) -> "CircuitPlan":
        members, rng = members_of(selected.circuit), np.random.default_rng(config.seed)
        try:
            random = random_like(members, selected.ranked, config.controls, config.seed)
        except UserError as error:
            log.warning("no random circuits: %s", error)
            random = []
        sizes = sorted({1, max(1, len(members) // 2)})
        sets = [rng.choice(len(members), size, replace=False) for size in sizes for _ in range(KNOCKED_OUT)]
        knocked_out = tuple(tuple(members[i] for i in some) for some in sets)
        return cls(selected.circuit, tuple(map(tuple, random)), knocked_out, _selected(selected))

    def facts(self) -> dict[str, Any]:
        """The plan as JSON."""
        sets = {name: [_node_facts(some) for some in getattr(self, name)] for name in ("random", "knocked_out")}
        return {"circuit": self.circuit.facts(), **sets, "selected": self.selected}

    @classmethod
    def read(cls, facts: dict[str, Any]) -> "CircuitPlan":
        """The plan that `facts` describes."""
        random, knocked_out = (tuple(_nodes(some) for some in facts[name]) for name in ("random", "knocked_out"))
        return cls(Circuit.from_facts(facts["circuit"]), random, knocked_out, facts["selected"])


def _node_facts(nodes: Sequence[Node]) -> dict[str, Any]:
    return Circuit(tuple(nodes)).facts()


def _nodes(facts: dict[str, Any]) -> tuple[Node, ...]:
    return Circuit.from_facts(facts).nodes


def _selected(selected: FoundCircuit) -> dict[str, Any]:
    curve, edges = selected.curve, selected.edges
    facts: dict[str, Any] = {
        "candidates": len(selected.ranked),
        "sizes": list(curve.sizes),
        "faithfulness": [interval.as_list() for interval in curve.faithfulness],
    }
    if edges is None:
        return facts
    facts |= {"edge_method": edges.method, "edges": edges.total, "acted": edges.acted}
    if edges.verified is not None and len(edges.verified.exact):
        verified = edges.verified
        facts |= {"exact": verified.exact.tolist(), "estimated": verified.estimated.tolist()}
        facts |= {"verified_top": verified.largest, "pearson": verified.pearson(), "spearman": verified.spearman()}
        if verified.sampled and verified.largest:
            large, share, most = verified.missed()
            facts |= {"missed_in_sample": large, "missed_share_at_most": share, "missed_at_most": most}
    return facts


@dataclass(frozen=True, eq=False)
class CircuitRun:
    """A shard of a run with everything needed to run its parts."""

    config: CircuitConfig
    source: str
    pairs: Sequence[PromptPair]
    model: LanguageModel
    dictionaries: Sequence[Dictionary]
    options: SweepOptions
    record: Record
    place: Place
    unit: str = "runs"

    @property
    def patchables(self) -> Sequence[Patchable]:
        """What the nodes are of."""
        return self.dictionaries or every_component(self.model)

    @cached_property
    def plan(self) -> CircuitPlan:
        assert self.record.edits is not None
        return CircuitPlan.read(self.record.edits[0])

    def run_part(self, number: int, count: Count) -> PartContent:
        own = list(range(len(self.pairs)))[self.place.shard :: self.place.shards]
        numbers = own[number * self.config.part : (number + 1) * self.config.part]
        pairs = [self.pairs[i] for i in numbers]
        rows: list[CircuitRow] = []
        for measure in (self._of_nodes, self._with_errors, self._of_edges):
            made = measure(pairs)
            count(len(made))
            rows += made
        return PartContent(
            [(rows, self.record.provenance(""))], {"pairs": [[i, self.pairs[i].example] for i in numbers]}, CircuitRow
        )

    def _of_nodes(self, pairs: Sequence[PromptPair]) -> list[CircuitRow]:
        plan, members = self.plan, members_of(self.plan.circuit)
        others = [node for some in plan.random for node in some if node not in set(members)]
        runs = NodeRuns(self.model, self.patchables, pairs, [*members, *dict.fromkeys(others)], options=self.options)
        circuit = runs.mask(members)
        variants = [_Variant("circuit", circuit), _Variant("complement", ~circuit, others_act=True)]
        variants += [_Variant("random", runs.mask(some), draw=i) for i, some in enumerate(plan.random)]
        for i, some in enumerate(plan.knocked_out):
            out = runs.mask(some)
            variants.append(_Variant("circuit without some", circuit & ~out, draw=i, size=len(some)))
            variants.append(_Variant("model without some", ~out, draw=i, size=len(some), others_act=True))
        for node in self._taken_out(members):
            variants.append(_Variant("without", circuit & ~runs.mask([node]), node=str(node)))
        return self._measured(runs, variants, "nodes", pairs)

    def _taken_out(self, members: Sequence[Node]) -> list[Node]:
        """The nodes that are removed one by one, largest effects first."""
        effects = dict(zip(self.plan.circuit.nodes, self.plan.circuit.effects, strict=True))
        return sorted(members, key=lambda node: -abs(effects[node]))[: self.config.minimal]

    def _with_errors(self, pairs: Sequence[PromptPair]) -> list[CircuitRow]:
        """The circuit's latents, with all error terms kept, and with all dropped."""
        if not self.dictionaries:
            return []
        latents = [node for node in members_of(self.plan.circuit) if node.kind != "error"]
        rows: list[CircuitRow] = []
        ways: tuple[Errors, ...] = ("kept", "dropped")
        for errors in ways:
            runs = NodeRuns(self.model, self.dictionaries, pairs, latents, errors, options=self.options)
            whole = torch.ones(len(latents), dtype=torch.bool)
            rows += self._measured(runs, [_Variant("circuit", whole)], errors, pairs)
        return rows

    def _of_edges(self, pairs: Sequence[PromptPair]) -> list[CircuitRow]:
        circuit = self.plan.circuit
        if not circuit.edges:
            return []
        runs = EdgeRuns(self.model, self.patchables, pairs, circuit.edges, self.options)
        whole = torch.ones(len(circuit.edges), dtype=torch.bool)
        return self._measured(runs, [_Variant("edges", whole)], "nodes", pairs)

    def _measured(
        self, runs: MemberRuns, variants: "Sequence[_Variant]", errors: str, pairs: Sequence[PromptPair]
    ) -> list[CircuitRow]:
        values = np.zeros((len(variants), len(pairs)))
        for others_act in (False, True):
            mine = [i for i, variant in enumerate(variants) if variant.others_act == others_act]
            if mine:
                act = torch.stack([variants[i].act for i in mine])
                values[mine] = (
                    runs.run(act, others_act=True) if isinstance(runs, NodeRuns) and others_act else runs.run(act)
                )
        metric, precision = self.record.settings["metric"], precision_of(self.model.hf)[0]
        return [
            CircuitRow(
                self.source,
                pair.example,
                variant.name,
                errors,
                variant.draw,
                variant.size if variant.size >= 0 else int(variant.act.sum()),
                variant.node,
                metric,
                float(values[i, place]),
                float(runs.whole[place]),
                float(runs.empty[place]),
                precision,
            )
            for i, variant in enumerate(variants)
            for place, pair in enumerate(pairs)
        ]


@dataclass(frozen=True, eq=False)
class _Variant:
    """A run: which members act, and what happens to the rest."""

    name: str
    act: Bool[Tensor, "members"]
    draw: int = 0
    size: int = -1  # -1: as many as act
    node: str = ""
    others_act: bool = False


def run_circuit(config: CircuitConfig, conclude: Callable[[CircuitRun, Tracker], None] | None = None) -> Finished:
    """Run the missing parts of a shard; see `saepatch.runs.driver.drive`."""
    return drive(config, prepare, conclude)


def prepare(config: CircuitConfig) -> CircuitRun:
    """Load everything a run needs, check that it fits together, and find the circuit, unless a shard has.

    Raises:
        UserError: something does not fit, or the folder holds another run.
    """
    place = Place.of(config)
    metric, positions = read_metric(config.metric), read_positions(config.positions)
    source, select, tune, pairs = _read_pairs(config)
    model = read_model(config, config.shard)
    heads = config.component == "head"
    dictionaries = [] if heads else read_dictionaries(config, read_sites(config.site), model)
    options = SweepOptions(positions=positions, metric=metric, batch_size=config.batch_size or None)
    parts = -(-len(pairs[place.shard :: place.shards]) // config.part)
    record = Record(
        config.command,
        place.settings | {"select's texts": pairs_hash(select), "tune's texts": pairs_hash(tune)},
        {"name": model.name, "hash": model.fingerprint},
        {str(d.site): {"name": d.name, "hash": d.fingerprint} for d in dictionaries},
        {"count": len(pairs), "hash": pairs_hash(pairs)},
        place.shard,
        place.shards,
        parts,
        metric_source=source_hash(config.metric),
    )
    record = place.agreed(record)
    if record.edits is None:
        decides = {"experiment": "search", **record.decides, "versions": record.versions}
        search = Measurements(place.folder / MEASUREMENTS, decides)
        patchables = dictionaries or every_component(model)
        try:
            selected = find_circuit(model, patchables, select, tune, _how(config), options, search.get)
        except UserError:
            search.forget()  # not to be in the way of corrected settings
            raise
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the search so far is stored; the same command resumes it") from None
        log.info(
            "%d of %d nodes, %d edges",
            len(members_of(selected.circuit)),
            len(selected.ranked),
            len(selected.circuit.edges),
        )
        record = replace(record, edits=[CircuitPlan.of(config, selected).facts()])
        write_record(record, place.folder)  # not to be found again
        search.forget()
    return CircuitRun(config, source, pairs, model, dictionaries, options, record, place)


def _how(config: CircuitConfig) -> FindOptions:
    nodes = IntegratedGradients(config.steps) if config.method == "integrated-gradients" else FirstOrder()
    linear = {
        "first-order": Linear(),
        "integrated-gradients": Linear(steps=config.steps),
        "gim": Linear(backward=gim),
        "relp": Linear(backward=relp),
    }[config.edge_method]
    edges = EdgeOptions(linear, verify=config.verify, sample=config.sample, seed=config.seed) if config.edges else None
    return FindOptions(nodes, config.each_position, config.least, config.nodes, config.prune, edges, config.edges)


def _read_pairs(config: CircuitConfig) -> tuple[str, list[PromptPair], list[PromptPair], list[PromptPair]]:
    """The name of the pairs' source; pairs to rank on, to choose a number of nodes on, and to measure on."""
    source = config.select or config.pairs
    select = _loaded(source, "select", config.n_select, config.seed)
    report = _loaded(config.pairs, config.split, config.n, config.seed)
    tune = select
    if config.tune or source in tasks.TASKS:
        tune = _loaded(config.tune or source, "tune", config.n, config.seed)
    texts = {(pair.clean, pair.corrupted) for pair in report}
    for name, pairs in (("select", select), ("tune", tune)):
        if shared := sum((pair.clean, pair.corrupted) in texts for pair in pairs):
            raise UserError(
                f"{shared} of the {len(pairs)} pairs of {name} are among those that the circuit is measured on: give "
                f"others with --{name}"
            )
    return Path(config.pairs).stem.partition(":")[0], select, tune, distinct_names(report)


def _loaded(source: str, split: str, n: int, seed: int) -> list[PromptPair]:
    pairs = load_pairs(source, split, n, seed)
    if not pairs:
        raise UserError(f"{source!r} holds no pairs: give another source")
    return pairs
