"""The metric when only some edges carry the clean run: circuits of edges, by path patching.

A node has the value it takes when every upstream site holds its counterfactual value plus what the node's own incoming
edges carry: each adds what its upstream node, itself in the circuit, writes beyond its counterfactual value. So every
node of the circuit has a pass of its own, from the sites before it to its site; the logits come last.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saepatch.circuits.nodes import Edge, Node, NodeSite, node_sites, refuse_blocks, upstream
from saepatch.data.batches import PairBatch, same_length_batches
from saepatch.data.pairs import PromptPair
from saepatch.engine.chosen import chosen_pairs, known_where
from saepatch.engine.components import Component, Heads, LatentUnits, Patchable
from saepatch.engine.gradients import Readout
from saepatch.engine.options import SweepOptions
from saepatch.engine.passes.kept_run import KeptRun, entry
from saepatch.engine.spans import run_to
from saepatch.engine.sweep import measured_rounding
from saepatch.errors import UserError
from saepatch.model.hooks import Edit as Hooked
from saepatch.model.hooks import edit_sites
from saepatch.model.language_model import LanguageModel
from saepatch.model.replaced import skip_blocks
from saepatch.model.sites import Site

TOKENS = 4096  # columns in a batch of passes


class EdgeRuns:
    """Runs of a model in which only some of `members`, edges between nodes, carry the clean run.

    The nodes of an edge are both at one position, or both at all positions: such an edge stands for the edges from the
    one node, wherever it is, to the other, wherever it is.

    With all edges between all nodes that differ, the run is the clean one (up to rounding); with none, what the nodes
    hold is the corrupted run's. What lies before the first site, and parts of the model that are no nodes, are live.
    BOS, padding and tokens that a site's dictionary was not trained on (`Dictionary.excluded_tokens`), in either
    prompt, have no nodes: the site keeps its clean value there, and an edge that ends there carries nothing.

    Raises:
        UserError: an edge joins nodes that are not among those of `patchables`, or a node at one position and one at
            all, or passes a residual stream that has nodes; pairs are not aligned; or positions select tokens that a
            dictionary was not trained on.
    """

    def __init__(
        self,
        model: LanguageModel,
        patchables: Patchable | Sequence[Patchable],
        pairs: Sequence[PromptPair],
        members: Sequence[Edge],
        options: SweepOptions | None = None,
    ) -> None:
        self.model, self.members, self.pairs = model, list(members), list(pairs)
        self.nodes, self.options = node_sites(model, patchables), options or SweepOptions()
        self._component: dict[tuple[Site | None, str], Component] = {
            (node.site, component.kind): component for node in self.nodes for component in node.components
        }
        for edge in self.members:
            self._check(edge)
        self._check_positions()
        whole = chosen_pairs(model, [node.components[0] for node in self.nodes], pairs, self.options.positions)
        refuse_blocks(model, whole.clean)
        self._batches = [self._kept(part) for part in same_length_batches(whole, 64)]
        self.whole = self._clean()
        self.empty = self.run(torch.zeros(1, len(self.members), dtype=torch.bool))[0]
        first = self._batches[0]
        self.rounding = measured_rounding(model, first.clean, first.part, self.options.metric, self.whole, self.empty)

    def _check(self, edge: Edge) -> None:
        for node in (edge.up, edge.down):
            if node.site is not None and (node.site, node.kind) not in self._component:
                raise UserError(f"{node} is not among the nodes: give its dictionary or component")
        if edge.up.site not in [node.site for node in upstream(self.nodes, edge.down.site)]:
            raise UserError(f"{edge} passes a residual stream that has nodes, so it carries nothing: leave it out")

    def _check_positions(self) -> None:
        """Raises UserError for nodes at all positions beside some at one, of which the former hold the latter."""
        nodes = [node for edge in self.members for node in (edge.up, edge.down) if node.site is not None]
        if len({node.position is None for node in nodes}) > 1:
            one, every = (next(n for n in nodes if (n.position is None) == none) for none in (False, True))
            raise UserError(
                f"{one} is at one position and {every} at all: edges of a circuit join nodes at one position each, or "
                "all of them at all positions"
            )

    def _kept(self, part: PairBatch) -> "_Kept":
        sites = [node.site for node in self.nodes]
        clean = KeptRun(self.model, part.clean, sites, keep_cache=False)
        other = KeptRun(self.model, part.corrupted, sites, keep_cache=False)
        where = {node.site: known_where(self.model, node.components[0], part)[..., None] for node in self.nodes}
        values = {site: torch.where(where[site], other.values[site], clean.values[site]) for site in sites}
        return _Kept(part, clean, values, where)

    def _clean(self) -> Float[np.ndarray, "pairs"]:
        out = np.zeros(len(self.pairs))
        for batch in self._batches:
            readout = Readout.of(self.options.metric, batch.part, self.model)
            out[batch.part.index.cpu().numpy()] = readout(batch.clean.logits).double().cpu().numpy()
        return out

    @torch.no_grad()
    def run(self, act: Bool[Tensor, "variants members"]) -> Float[np.ndarray, "variants pairs"]:
        """The metric of every pair when some edges carry the clean run."""
        out = np.zeros((len(act), len(self.pairs)))
        for number, mask in enumerate(act.tolist()):
            edges = [edge for edge, acts in zip(self.members, mask, strict=True) if acts]
            for batch in self._batches:
                out[number, batch.part.index.cpu().numpy()] = self._metric(batch, edges)
        return out

    def _metric(self, batch: "_Kept", edges: Sequence[Edge]) -> Float[np.ndarray, "rows"]:
        part, width = batch.part, batch.part.clean.width
        into: dict[Node, list[Node]] = {}
        for edge in edges:
            if all(node.position is None or node.position < width for node in (edge.up, edge.down)):
                into.setdefault(edge.down, []).append(edge.up)
        acting = {node for ups in into.values() for node in ups}  # a node that reaches nothing need not run
        beyond: dict[Node, Float[Tensor, "rows _ width"]] = {}
        for node in self.nodes:
            mine = sorted((n for n in acting if n.site == node.site), key=lambda n: n.order)
            for some in _chunks(mine, max(1, TOKENS // (width * len(part)))):
                beyond |= self._read(batch, node, some, into, beyond)
        target = next((down for down in into if down.site is None), None)
        sites = upstream(self.nodes, None)
        values = self._values(batch, sites, [into.get(target, []) if target is not None else []], beyond)
        edits = {site: _set_to(x) for site, x in values.items()}
        readout = Readout.of(self.options.metric, part, self.model)
        skipped = skip_blocks(self.model.layout, batch.skipped(sites[0].site))
        with readout.running(self.model), skipped, edit_sites(self.model.layout, edits):
            return readout(self.model.call(part.clean, last=True)[:, -1]).double().cpu().numpy()

    def _read(
        self,
        batch: "_Kept",
        node: NodeSite,
        some: Sequence[Node],
        into: Mapping[Node, Sequence[Node]],
        beyond: Mapping[Node, Float[Tensor, "rows _ width"]],
    ) -> dict[Node, Float[Tensor, "rows _ width"]]:
        """What some nodes of one site write beyond their counterfactual values, at their position or at all."""
        n, sites, x = len(batch.part), upstream(self.nodes, node.site), batch.clean.values[node.site]
        if sites:
            values = self._values(batch, sites, [into.get(down, []) for down in some], beyond)
            tokens = batch.part.clean.rows(torch.arange(n, device=self.model.device).repeat(len(some)))
            edits = {site: _set_to(x) for site, x in values.items()}
            x = run_to(self.model, tokens, edits, node.site, skip=batch.skipped(sites[0].site)).to(self.model.device)
        out = {}
        for number, down in enumerate(some):
            component, at = self._component[down.site, down.kind], _columns(down)
            if isinstance(component, LatentUnits):
                component = replace(component, ids=self._latents[node.site])
            before = batch.read(component, "other")[:, at]
            here = x[number * n : (number + 1) * n, at] if sites else None  # before the first site, all runs are clean
            now = batch.read(component, "clean")[:, at] if here is None else component.read(here)
            out[down] = _alone(component, down.unit, now - before) * batch.where[node.site][:, at]
        return out

    @cached_property
    def _latents(self) -> dict[Site, tuple[int, ...]]:
        """The latents of each site that are members."""
        units: dict[Site, set[int]] = {}
        for node in (node for edge in self.members for node in (edge.up, edge.down)):
            if node.site is not None and node.kind == "latent":
                units.setdefault(node.site, set()).add(node.unit)
        return {site: tuple(sorted(some)) for site, some in units.items()}

    def _values(
        self,
        batch: "_Kept",
        sites: Sequence[NodeSite],
        ups: Sequence[Sequence[Node]],
        beyond: Mapping[Node, Float[Tensor, "rows _ width"]],
    ) -> dict[Site, Float[Tensor, "all pos _"]]:
        """What the upstream sites hold for some downstream nodes, each with its own incoming nodes."""
        n = len(batch.part)
        values = {}
        for node in sites:
            x = batch.other[node.site].float().repeat(len(ups), 1, 1)
            for number, mine in enumerate(ups):
                for up in mine:
                    if up.site == node.site:
                        x[number * n : (number + 1) * n, _columns(up)] += beyond[up]
            values[node.site] = x.to(batch.other[node.site].dtype)
        if (begin := entry(sites[0].site)) not in values:
            values[begin] = batch.clean.values[begin].repeat(len(ups), 1, 1)
        return values


@dataclass(frozen=True, eq=False)
class _Kept:
    """Both runs of a batch of pairs: `other` holds the counterfactual values of the sites, `where` their nodes."""

    part: PairBatch
    clean: KeptRun
    other: Mapping[Site, Float[Tensor, "rows pos _"]]
    where: Mapping[Site, Bool[Tensor, "rows pos 1"]]
    _read: dict[tuple[Site, str, str], Float[Tensor, "rows pos _"]] = field(default_factory=dict)

    def read(self, component: Component, run: Literal["clean", "other"]) -> Float[Tensor, "rows pos _"]:
        """What a component reads in one of the runs."""
        key = component.site, component.kind, run
        if key not in self._read:
            values = self.clean.values if run == "clean" else self.other
            self._read[key] = component.read(values[component.site])
        return self._read[key]

    def skipped(self, first: Site) -> int:
        """Number of blocks that passes from a site on leave out."""
        return first.enters if self.clean.way(first) != "whole" else 0


def _alone(component: Component, unit: int, change: Float[Tensor, "rows pos _"]) -> Float[Tensor, "rows _ width"]:
    """What one unit adds to its site, given the change of what the component reads."""
    if isinstance(component, LatentUnits):
        assert component.ids is not None
        return change[..., component.ids.index(unit), None] * component.dictionary.rows[unit]
    if isinstance(component, Heads):
        others = torch.arange(component.units, device=change.device) != unit
        return change.unflatten(-1, (component.units, -1)).masked_fill(others[:, None], 0).flatten(-2)
    return change


def _columns(node: Node) -> slice:
    return slice(None) if node.position is None else slice(node.position, node.position + 1)


def _chunks(listed: Sequence[Node], size: int) -> list[Sequence[Node]]:
    return [listed[start : start + size] for start in range(0, len(listed), size)]


def _set_to(value: Tensor) -> Hooked:
    return lambda x: value.to(x)
