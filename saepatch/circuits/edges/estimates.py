"""Edges between nodes: linear estimates of all of them, and exact path patches of the largest and of a random sample.

An edge u → d is the part of u's effect that reaches d directly, with every other node between them held at the base
run. Its estimate is `∂m/∂f_d · ∂f_d/∂x · Δx_u`, with m the metric, f_d what the downstream node holds and Δx_u what the
upstream node's change adds to its site (Marks et al. 2024, on one batched vector-Jacobian product a downstream set).
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from typing_extensions import Unpack

from saepatch.circuits.edges.backward import Backward, Counts
from saepatch.circuits.edges.edge_list import Edges
from saepatch.circuits.edges.jacobians import EdgeSpan, Movers, Products, Readers, readers_at
from saepatch.circuits.edges.ledger import Ledger
from saepatch.circuits.edges.paths import TwoRuns, path_patches, runs_of_pairs
from saepatch.circuits.nodes import LOGITS, Edge, Node, NodeSite, Paths, between, changes_at, node_sites, upstream
from saepatch.data.batches import own_positions
from saepatch.data.pairs import PromptPair
from saepatch.engine.components import Patchable, Stream
from saepatch.engine.gradients import Base, FirstOrder, IntegratedGradients, Readout
from saepatch.engine.options import SweepKeywords, SweepOptions, with_keywords
from saepatch.engine.spans import SpanGraph, direct_gradients
from saepatch.errors import UserError
from saepatch.measure.results.screen import Verification
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site

PAIRS = 8  # pairs in a batch; the products of a batch are chunked further


@dataclass(frozen=True)
class Linear:
    """How edges are estimated: by gradients at the base run, or (`steps`) by mean gradients along a line.

    With `steps`, the gradient of the metric at a downstream site is its mean while that site moves from base to source,
    and the derivative of the downstream node its mean while the upstream site moves, with everything else at the base
    run: the edges from all nodes of one site into a node sum to the effect of setting that site on it, times the mean
    gradient. `backward` modifies backward passes: `saepatch.circuits.edges.backward.gim` or `relp`.
    """

    steps: int = 0
    backward: Backward | None = None

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UserError(f"steps = {self.steps}: use 1 or more, or 0 for gradients at the base run")

    @property
    def name(self) -> str:
        ways = [self.backward.__name__] if self.backward is not None else []
        return " ".join([*ways, f"integrated ({self.steps})" if self.steps else "first order"])

    def modified(self, model: LanguageModel) -> AbstractContextManager[Counts]:
        return nullcontext(Counts()) if self.backward is None else self.backward(model)

    @property
    def shares(self) -> list[float]:
        """Points between base and source at which gradients are taken."""
        return [(step + 0.5) / self.steps for step in range(self.steps)] or [0.0]


@dataclass(frozen=True)
class EdgeOptions:
    """Options of `edges`.

    Attributes:
        method: How edges are estimated.
        paths: Which parts of the model are open between nodes.
        among: Nodes that edges join, at one position or (None) at all; empty: every node. The logits are always one.
        keep: Number of edges of each pair to keep, those with the largest estimates.
        verify: Number of edges with the largest estimates to path-patch exactly.
        sample: Number of edges drawn at random from all others to path-patch as well.
        seed: Seed of the draw.
    """

    method: Linear = field(default_factory=Linear)
    paths: Paths = field(default_factory=Paths)
    among: tuple[Node, ...] = ()
    keep: int = 20_000
    verify: int = 50
    sample: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.verify, self.sample) < 0 or self.keep < max(1, self.verify):
            raise UserError(
                f"keep={self.keep}, verify={self.verify}, sample={self.sample}: use 0 or more, and keep at least "
                "what is verified"
            )


def edges(
    model: LanguageModel,
    dictionaries: Patchable | Sequence[Patchable],
    pairs: Sequence[PromptPair],
    how: EdgeOptions | None = None,
    options: SweepOptions | None = None,
    **keywords: Unpack[SweepKeywords],
) -> Edges:
    """Estimate every edge between the nodes of several sites, and to the logits; verify some exactly.

    Nodes are the latents and error terms of dictionaries, and units of `Heads` and `Stream` (an MLP's output at
    `mlp_out`, the token embeddings at `resid_pre.0`). An edge leads from a node that differs between a pair's two runs
    to one at a later site and the same or a later position: a latent that is active in the base run (with `steps`, or
    on the way to the source run), or any other node. Latents that are active nowhere there have no linear estimate and
    are not among the edges. Everything else stays at the base run: other nodes between the two, and what
    `how.paths` closes. An edge past a residual stream that has nodes is 0 and left out. BOS, padding and tokens that a
    dictionary was not trained on (`Dictionary.excluded_tokens`), in either prompt, have no nodes.

    Memory is bounded by the batch and by `how.keep`, whatever the number of edges.

    Args:
        dictionaries: Dictionaries and components; each site's nodes make up its whole value.
        how: Method, open paths, how many edges to keep and to verify; None: `EdgeOptions()`.
        options: Options that sweeps share, or keywords; without corruption, and with pairs of equal length.

    Raises:
        UserError: a component does not fit or is a part of its site, pairs are not aligned, positions select tokens
            that a dictionary was not trained on, the metric has no gradient, or a modification of backward passes acts
            on nothing.
    """
    how, chosen = how or EdgeOptions(), with_keywords(options or SweepOptions(), keywords)
    nodes = node_sites(model, dictionaries)
    estimates = _Estimates(model, nodes, pairs, how, chosen)
    result = estimates.run()
    if not how.verify and not how.sample:
        return result
    order = np.argsort(-np.abs(result.score), kind="stable")[: how.verify]
    top = [(int(result.pair[i]), result.edge(int(i))) for i in order]
    among = set(top)
    drawn = [(edge, score) for edge, score in estimates.drawn if edge not in among][: how.sample]
    listed = [*top, *(edge for edge, _ in drawn)]
    exact = path_patches(model, nodes, pairs, listed, how.paths, chosen) * (1 if chosen.denoises else -1)
    estimated = np.concatenate([result.score[order], [score for _, score in drawn]])
    others = result.total - len(top)
    verified = Verification(np.arange(len(listed)), exact, estimated, len(top), others)
    return replace(result, checked=tuple(listed), verified=verified)


class _Estimates:
    """The estimates of all edges, batch by batch."""

    def __init__(
        self,
        model: LanguageModel,
        nodes: Sequence[NodeSite],
        pairs: Sequence[PromptPair],
        how: EdgeOptions,
        options: SweepOptions,
    ) -> None:
        self.model, self.nodes, self.pairs, self.how, self.options = model, nodes, pairs, how, options
        self.closed = how.paths.closed(model, nodes)
        self.counts: Counts = Counts()
        self.parts: list[tuple[Site | None, str]] = [(n.site, c.kind) for n in nodes for c in n.components]
        for node in how.among:
            if (node.site, node.kind) not in self.parts:
                raise UserError(f"{node} is not among the nodes: give its dictionary or component")
        self.parts.append((None, LOGITS))
        self.drawn: list[tuple[tuple[int, Edge], float]] = []

    @torch.inference_mode(False)
    def run(self) -> Edges:
        clean, corrupted = np.zeros(len(self.pairs)), np.zeros(len(self.pairs))
        dropped, total, sign = np.zeros(len(self.pairs)), 0, 1.0 if self.options.denoises else -1.0
        kept: list[tuple[ndarray, ndarray]] = []
        draws: list[tuple[ndarray, ndarray, ndarray]] = []
        at_once = self.options.batch_size or PAIRS
        batches = runs_of_pairs(self.model, self.pairs, self.nodes, self.closed, self.options, at_once)
        for number, runs in enumerate(batches):
            index = runs.part.index.cpu().numpy()
            clean[index], corrupted[index] = runs.ends(self.options)
            ledger = Ledger(self.how.keep, self.how.sample + self.how.verify, len(index), (self.how.seed, number))
            self._estimate(runs, ledger)
            total += ledger.total
            names, scores = ledger.kept()
            dropped[index] = ledger.dropped.numpy()
            if np.isnan(scores).any():
                raise UserError("estimates are not numbers: check the metric and the dtype of the model")
            kept.append((self._placed(runs, names), sign * scores))
            keys, names, scores = ledger.drawn()
            draws.append((keys, self._placed(runs, names), sign * scores))
            if callable(self.options.progress):
                self.options.progress(len(index))
        names, scores = (np.concatenate(parts, -1) for parts in zip(*kept, strict=True))
        result = Edges(
            method=self.how.method.name,
            paths=self.how.paths.name,
            parts=tuple(self.parts),
            examples=tuple(pair.example or str(number) for number, pair in enumerate(self.pairs)),
            clean=clean,
            corrupted=corrupted,
            names=names,
            score=scores,
            total=total,
            dropped=dropped,
            acted=dict(self.counts),
            **self.options.labels,
        )
        keys, drawn, drawn_scores = (np.concatenate(parts, -1) for parts in zip(*draws, strict=True))
        order = np.argsort(keys, kind="stable")
        lookup = replace(result, names=drawn, score=drawn_scores)
        self.drawn = [((int(lookup.pair[i]), lookup.edge(int(i))), float(lookup.score[i])) for i in order.tolist()]
        return result

    def _placed(self, runs: TwoRuns, names: ndarray) -> ndarray:
        """Rows and columns of a batch as pairs and positions."""
        rows = torch.from_numpy(names[0]).to(runs.part.index.device)
        out = names.copy()
        out[0] = runs.part.index[rows].cpu().numpy()
        for place in (3, 6):
            columns = torch.from_numpy(names[place]).to(rows.device)
            out[place] = own_positions(runs.base.tokens, rows, columns, "equal").cpu().numpy()
        return out

    def _estimate(self, runs: TwoRuns, ledger: Ledger) -> None:
        base, places = runs.base, {node.site: runs.where(node) for node in self.nodes}
        readout = Readout.of(self.options.metric, runs.part, self.model)
        differs = torch.zeros_like(base.tokens.input_ids, dtype=torch.bool)
        movers = {}
        for node in self.nodes:
            changes = changes_at(node, base, runs.source, places[node.site])
            for some in changes:
                differs[some.row, some.pos] = True
            if self.how.among:
                changes = [
                    some.only(self._among(node.site, component.kind, runs, some.row, some.pos, some.unit))
                    for component, some in zip(node.components, changes, strict=True)
                ]
            movers[node.site] = Movers.of(node.site, changes, base.values[node.site])
        # columns before the first difference cannot change
        after = differs.cumsum(-1).bool()
        places = {site: where & after for site, where in places.items()}
        with self.how.method.modified(self.model) as counts:
            takes = IntegratedGradients(self.how.method.steps) if self.how.method.steps else FirstOrder()
            run = Base(self.model, base.tokens, list(places), readout, base)
            gradients = takes.take(run, runs.source.values, places).of
            for node in self.nodes:
                if ups := [movers[up.site] for up in upstream(self.nodes, node.site)]:
                    self._into(node, ups, runs, gradients[node.site][0], places, ledger)
            ups = [movers[up.site] for up in upstream(self.nodes, None)]
            alone = len(ups) == 1 and not between(self.closed, self.nodes, ups[0].site, None)
            self._into_logits(ups, runs, readout, ledger, {up.site: gradients[up.site][0] for up in ups if alone})
        self.counts.update(counts)

    def _among(self, site: Site, kind: str, runs: TwoRuns, row: Tensor, column: Tensor, unit: Tensor) -> Tensor:
        """Which units, given by row and column of a batch, are among the requested nodes."""
        width = runs.base.width
        mine = [node for node in self.how.among if (node.site, node.kind) == (site, kind)]
        mine = [node for node in mine if node.position is None or node.position < width]
        position = own_positions(runs.base.tokens, row, column, "equal") + 1
        most = width + 1  # 0 stands for all positions
        keys = [node.unit * most + (0 if node.position is None else node.position + 1) for node in mine]
        wanted = torch.tensor(keys, dtype=torch.long, device=row.device)
        return torch.isin(unit * most + position, wanted) | torch.isin(unit * most, wanted)

    def _number(self, site: Site | None, component: int = 0) -> int:
        return next(number for number, (other, _) in enumerate(self.parts) if other == site) + component

    def _into(
        self,
        node: NodeSite,
        ups: Sequence[Movers],
        runs: TwoRuns,
        gradient: Tensor,
        places: Mapping[Site, Tensor],
        ledger: Ledger,
    ) -> None:
        """The edges into the nodes of one site. With steps, each upstream site moves alone."""
        for together in [ups] if not self.how.method.steps else [[up] for up in ups]:
            graphs = [self._graph(node.site, [up.site for up in together], runs, share) for share in self._shares]
            spans = [EdgeSpan(graph, together) for graph in graphs]
            values = [graph.whole.detach() for graph in graphs]
            for number, readers in enumerate(readers_at(node, values[0], gradient, places[node.site], values[1:])):
                if self.how.among:
                    kind = readers.component.kind
                    readers = readers.only(self._among(node.site, kind, runs, readers.row, readers.pos, readers.unit))
                if len(readers):
                    self._products(spans, [readers.at(x) for x in values], self._number(node.site, number), ledger)

    @property
    def _shares(self) -> list[float]:
        return self.how.method.shares

    def _products(self, spans: Sequence[EdgeSpan], readers: Sequence[Readers], down: int, ledger: Ledger) -> None:
        streams = [span.products(mine) for span, mine in zip(spans, readers, strict=True)]
        for made in zip(*streams, strict=True):
            mean = torch.stack([some.scores for some in made]).mean(0) if len(made) > 1 else made[0].scores
            ledger.add(replace(made[0], scores=mean), self._components(made[0].movers.site), down)

    def _components(self, site: Site) -> Tensor:
        first, n = self._number(site), sum(other == site for other, _ in self.parts)
        return torch.arange(first, first + n, device=self.model.device)

    def _leaves(self, ups: Sequence[Site], runs: TwoRuns, share: float) -> dict[Site, Tensor]:
        leaves = {}
        for node in self.nodes:
            if (site := node.site) not in ups:
                continue
            x, other = runs.base.values[site], runs.source.values[site]
            way = (other.float() - x.float()) * runs.where(node)[..., None]
            leaves[site] = (x + share * way).to(x.dtype) if share else x
        return leaves

    def _graph(self, down: Site, ups: Sequence[Site], runs: TwoRuns, share: float) -> SpanGraph:
        first = min(ups, key=lambda site: site.order)
        held = [site for site in between(self.closed, self.nodes, first, down) if site not in ups]
        return SpanGraph(runs.base, self._leaves(ups, runs, share), down, held)

    def _into_logits(
        self, ups: Sequence[Movers], runs: TwoRuns, readout: Readout, ledger: Ledger, known: dict[Site, Tensor]
    ) -> None:
        """The edges into the logits; `known` are gradients that need no further pass, since nothing is held."""
        base = runs.base
        rows = torch.arange(len(base.tokens), device=self.model.device)
        last = torch.full_like(rows, base.width - 1)
        reader = Readers(
            Stream(Site(0)), rows, last, torch.zeros_like(rows), base.values[ups[0].site], ups[0].vectors[:, :, 0]
        )
        for together in [ups] if not self.how.method.steps else [[up] for up in ups]:
            sites = [up.site for up in together]
            first = min(sites, key=lambda site: site.order)
            held = [site for site in between(self.closed, self.nodes, first, None) if site not in sites]
            take = partial(direct_gradients, base, held=held, readout=readout)
            takes = [known] if known else [take(self._leaves(sites, runs, share)) for share in self._shares]
            for up in together:
                mean = torch.stack([gradients[up.site] for gradients in takes]).mean(0)
                scores = (up.vectors @ mean.to(up.vectors.dtype)[..., None])[None, ..., 0]
                made = Products(up, reader, rows[None], scores)
                ledger.add(made, self._components(up.site), len(self.parts) - 1)


__all__ = ["Edge", "EdgeOptions", "Edges", "Linear", "Paths", "edges"]
