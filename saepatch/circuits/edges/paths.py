"""Exact path patches: the effect of a node on the metric through one other node, run by the model's own blocks.

A node's change is written at its site in the base run, and the pass continues to the other node's site with everything
held that is not open (`Paths`). The change of the other node is then written, alone, into the base run. Both spans are
batched over edges.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saepatch.circuits.nodes import Edge, Node, NodeSite, Paths, between, changes_at, refuse_blocks, written
from saepatch.data.batches import PairBatch, same_length_batches
from saepatch.data.pairs import PromptPair
from saepatch.engine.chosen import chosen_pairs, known_where
from saepatch.engine.components import Changes
from saepatch.engine.edited_runs import metric_values
from saepatch.engine.metrics import answers_only, needs_clean_logits
from saepatch.engine.options import SweepOptions
from saepatch.engine.passes.kept_run import KeptRun
from saepatch.engine.passes.known_ways import KnownWays
from saepatch.engine.plan import column_of
from saepatch.engine.spans import reach
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site

TOKENS = 4096  # columns in a batch of edited passes
Listed = Sequence[tuple[int, Edge]]  # edges, each of one pair, given by its index


@dataclass(frozen=True, eq=False)
class TwoRuns:
    """A batch of pairs, and both of its runs, with the values of all sites that have nodes or are held."""

    part: PairBatch
    base: KeptRun
    source: KeptRun
    denoises: bool

    @classmethod
    def of(
        cls, model: LanguageModel, part: PairBatch, nodes: Sequence[NodeSite], closed: Sequence[Site], denoises: bool
    ) -> "TwoRuns":
        tokens, others = (part.corrupted, part.clean) if denoises else (part.clean, part.corrupted)
        sites = [node.site for node in nodes]
        base = KeptRun(model, tokens, [*sites, *closed])
        source = KeptRun(model, others, sites, keep_cache=False)
        return cls(replace(part, clean_logits=(source if denoises else base).logits), base, source, denoises)

    def ends(self, options: SweepOptions) -> tuple[Float[np.ndarray, "pairs"], Float[np.ndarray, "pairs"]]:
        """The metric of the clean and the corrupted runs."""
        clean, corrupted = (self.source, self.base) if self.denoises else (self.base, self.source)
        return tuple(metric_values(options.metric, run.logits, self._asked(options)) for run in (clean, corrupted))  # type: ignore[return-value]

    def where(self, node: NodeSite) -> Bool[Tensor, "batch pos"]:
        """Positions at which a site has nodes."""
        return known_where(self.base.model, node.components[0], self.part)

    def _asked(self, options: SweepOptions) -> PairBatch:
        return self.part if needs_clean_logits(options.metric) else replace(self.part, clean_logits=None)

    def metric(
        self,
        options: SweepOptions,
        site: Site,
        rows: Int[Tensor, "edits"],
        first: int,
        change: Float[Tensor, "edits columns width"],
        held: Sequence[Site] = (),
    ) -> Float[np.ndarray, "edits"]:
        """The metric of base runs with a change at a site, some later sites held."""
        asked, only = self._asked(options).rows(rows.tolist()), None
        if answers_only(options.metric):
            only, places = torch.unique(torch.stack([asked.answer, asked.counter]), return_inverse=True)
            asked = replace(asked, answer=places[0], counter=places[1])
        later = {other: _fixed(self.base.values[other][rows, first:]) for other in held}
        logits = self.base.resume(site, rows, first, change, only, later)
        return metric_values(options.metric, logits, asked)


def runs_of_pairs(
    model: LanguageModel,
    pairs: Sequence[PromptPair],
    nodes: Sequence[NodeSite],
    closed: Sequence[Site],
    options: SweepOptions,
    at_once: int,
) -> Iterator[TwoRuns]:
    """Both runs of all pairs, batch by batch of equal length.

    Raises:
        UserError: the options ask for a corruption or an alignment that edges do not offer, pairs are not aligned, or
            positions select tokens that a dictionary was not trained on.
    """
    if options.corruption is not None or options.each_position:
        raise UserError("edges are between the runs of a pair, at every position: leave out corruption, each_position")
    if options.align != "equal":
        raise UserError("edges name positions from the start: give pairs of equal length (align='equal')")
    whole = chosen_pairs(model, [node.components[0] for node in nodes], pairs, options.positions)
    refuse_blocks(model, whole.clean)
    ways = KnownWays(model)
    for part in same_length_batches(whole, at_once):
        runs = TwoRuns.of(model, part, nodes, closed, options.denoises)
        runs.base.checked = ways.of(runs.base)
        yield runs


@torch.no_grad()
def path_patches(
    model: LanguageModel,
    nodes: Sequence[NodeSite],
    pairs: Sequence[PromptPair],
    edges: Listed,
    paths: Paths,
    options: SweepOptions,
) -> Float[np.ndarray, "edges"]:
    """The exact change of the base run's metric by each edge; 0 where its upstream node does not change.

    Raises:
        UserError: an edge has a node that is not among `nodes`, has no position, or is of a dictionary that was not
            trained on the token there.
    """
    closed, change = paths.closed(model, nodes), np.zeros(len(edges))
    size = options.batch_size or 64
    for runs in runs_of_pairs(model, pairs, nodes, closed, options, 32):
        place = {pair: row for row, pair in enumerate(runs.part.index.tolist())}
        mine = [number for number, (pair, _) in enumerate(edges) if pair in place]
        groups: dict[tuple[Site, str, Site | None, str], list[int]] = {}
        for number in mine:
            edge = edges[number][1]
            (up, up_kind), (down, down_kind) = _known(nodes, edge.up), _known(nodes, edge.down)
            assert up is not None, "an edge starts at a site"
            groups.setdefault((up, up_kind, down, down_kind), []).append(number)
        if not mine:
            continue
        own = runs.ends(options)[1 if options.denoises else 0]
        for (site, kind, target, target_kind), numbers in groups.items():
            held = between(closed, nodes, site, target)
            some = [(place[edges[number][0]], edges[number][1]) for number in numbers]
            batch = _EdgeBatch(runs, _component(nodes, site, kind), some, held, options, size)
            values = batch.to_logits() if target is None else batch.through(*_component(nodes, target, target_kind))
            change[numbers] = values - own[[row for row, _ in some]]
    return change


def _known(nodes: Sequence[NodeSite], node: Node) -> tuple[Site | None, str]:
    if node.site is None:
        return None, node.kind
    if not any(some.site == node.site and any(c.kind == node.kind for c in some.components) for some in nodes):
        raise UserError(f"{node} is not among the nodes: give its dictionary or component")
    if node.position is None:
        raise UserError(f"{node} has no position: path patches are of nodes at one position")
    return node.site, node.kind


def _component(nodes: Sequence[NodeSite], site: Site, kind: str) -> tuple[NodeSite, int]:
    node = next(some for some in nodes if some.site == site)
    return node, next(number for number, c in enumerate(node.components) if c.kind == kind)


class _EdgeBatch:
    """Edges of one batch of pairs from the nodes of one component, given by row."""

    def __init__(
        self,
        runs: TwoRuns,
        up: tuple[NodeSite, int],
        edges: Sequence[tuple[int, Edge]],
        held: Sequence[Site],
        options: SweepOptions,
        size: int,
    ) -> None:
        self.runs, self.held, self.options, self.size = runs, held, options, size
        self.listed = edges
        self.site, width = up[0].site, runs.base.width
        lengths = runs.base.tokens.lengths.tolist()
        changes = changes_at(up[0], runs.base, runs.source, runs.where(up[0]))[up[1]]
        entry_of = _index(changes)
        column = [
            (_column(edge.up, lengths[row], width), _column(edge.down, lengths[row], width)) for row, edge in edges
        ]
        keys = [(row, q, edge.up.unit) for (row, edge), (q, _) in zip(edges, column, strict=True)]
        self.unit = [edge.down.unit for _, edge in edges]
        self.down = [p for _, p in column]
        self._check_known(up[0], edges, [q for q, _ in column])
        movers = sorted({key for key in keys if key in entry_of}, key=lambda key: (key[1], key))
        number_of = {key: number for number, key in enumerate(movers)}
        self.mover = [number_of.get(key, -1) for key in keys]  # -1: nothing changes
        self.row = torch.tensor([row for row, _, _ in movers], dtype=torch.long, device=runs.base.model.device)
        self.first = [q for _, q, _ in movers]
        self.edge_rows = torch.tensor([row for row, _ in edges], dtype=torch.long, device=self.row.device)
        entries = torch.tensor([entry_of[key] for key in movers], dtype=torch.long, device=self.row.device)
        self.vectors = changes.vectors(entries) if len(entries) else runs.base.values[self.site][:0, 0]

    def _check_known(self, node: NodeSite, edges: Sequence[tuple[int, Edge]], columns: Sequence[int]) -> None:
        part = self.runs.part
        everywhere = replace(part, where=torch.ones_like(part.clean.input_ids, dtype=torch.bool))
        known = known_where(self.runs.base.model, node.components[0], everywhere)
        for (row, edge), column in zip(edges, columns, strict=True):
            if not bool(known[row, column]):
                raise UserError(
                    f"{edge} of pair {part.pairs[row].example!r}: the dictionary at {node.site} was not trained on the "
                    "token there: leave the edge out, or load the dictionary with every_position=True"
                )

    def to_logits(self) -> Float[np.ndarray, "edges"]:
        values = np.zeros(len(self.vectors))
        for some in self._chunks(self.first):
            first, change = self._change(self.site, some, self.first, self.vectors)
            values[some] = self.runs.metric(self.options, self.site, self.row[some], first, change, self.held)
        return self._or_base(values[self.mover] if len(values) else np.zeros(len(self.mover)))

    def through(self, down: NodeSite, number: int) -> Float[np.ndarray, "edges"]:
        """The metric when only what each edge's downstream node changes is written into the base run."""
        base, target = self.runs.base, down.site
        self._check_known(down, self.listed, self.down)
        x = base.values[target]
        moved = x[self.edge_rows, self.down].clone()
        of_mover = np.array(self.mover)
        for some in self._chunks(self.first):
            first, change = self._change(self.site, some, self.first, self.vectors)
            reached = reach(base, self.site, self.row[some], first, change, target, self.held)
            at = np.flatnonzero(np.isin(of_mover, some))
            run = torch.tensor([some.index(of_mover[i]) for i in at], dtype=torch.long, device=x.device)
            moved[at] = reached[run, torch.tensor([self.down[i] - first for i in at], device=x.device)]
        change_of = written(down.components[number], self.unit, x[self.edge_rows, self.down], moved)
        values, acting = np.zeros(len(self.mover)), [i for i in range(len(self.mover)) if bool(change_of[i].any())]
        for some in self._chunks([self.down[i] for i in acting]):
            edges = [acting[i] for i in some]
            first, change = self._change(target, edges, self.down, change_of)
            values[edges] = self.runs.metric(self.options, target, self.edge_rows[edges], first, change)
        idle = np.ones(len(values), dtype=bool)
        idle[acting] = False
        return self._or_base(values, idle)

    def _change(
        self, site: Site, some: Sequence[int], columns: Sequence[int], vectors: Float[Tensor, "all width"]
    ) -> tuple[int, Float[Tensor, "some columns width"]]:
        first = min(columns[i] for i in some)
        dtype = torch.promote_types(vectors.dtype, torch.float32)
        width = self.runs.base.width - first
        change = torch.zeros(len(some), width, vectors.shape[-1], dtype=dtype, device=vectors.device)
        change[range(len(some)), [columns[i] - first for i in some]] = vectors[list(some)].to(dtype)
        return first, change

    def _chunks(self, first: Sequence[int]) -> Iterator[list[int]]:
        """Numbers in the order of their first column, a few at a time, all of a chunk starting close together."""
        order, start = np.argsort(np.asarray(first), kind="stable").tolist(), 0
        while start < len(order):
            columns = self.runs.base.width - first[order[start]]
            end = start + max(1, min(self.size, TOKENS // columns))
            yield order[start:end]
            start = end

    def _or_base(
        self, values: Float[np.ndarray, "edges"], idle: np.ndarray | None = None
    ) -> Float[np.ndarray, "edges"]:
        """The values, or the base run's where an edge changes nothing."""
        own = self.runs.ends(self.options)[1 if self.options.denoises else 0]
        unmoved = np.array(self.mover) < 0
        return np.where(unmoved if idle is None else unmoved | idle, own[self.edge_rows.cpu().numpy()], values)


def _index(changes: Changes) -> dict[tuple[int, int, int], int]:
    keys = zip(changes.row.tolist(), changes.pos.tolist(), changes.unit.tolist(), strict=True)
    return {key: number for number, key in enumerate(keys)}


def _column(node: Node, length: int, width: int) -> int:
    return width - 1 if node.position is None else column_of(node.position, length, width)


def _fixed(value: Tensor) -> Callable[[Tensor, int], Tensor]:
    return lambda x, before: value[:, before : before + x.shape[1]].to(x)
