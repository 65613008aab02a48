"""The metric when only some nodes act: all others have their counterfactual values, at all sites at once.

In the clean run each site becomes `x' + Σ (w_j(x) − w_j')`, over the nodes that act: x is what reaches the site in the
edited pass, x' the counterfactual value of the site, w what a node writes. So the acting nodes are computed live, from
the current values of earlier sites, and everything else, error terms too, has its value of the counterfactual run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saepatch.circuits.nodes import Node, NodeSite, node_sites
from saepatch.data.batches import PairBatch, same_length_batches
from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.chosen import chosen_pairs, known_where
from saepatch.engine.components import ErrorTerm, Heads, LatentUnits, Patchable
from saepatch.engine.gradients import Readout
from saepatch.engine.options import SweepOptions
from saepatch.engine.passes.kept_run import KeptRun, entry
from saepatch.engine.sweep import measured_rounding
from saepatch.errors import UserError
from saepatch.model.hooks import Edit as Hooked
from saepatch.model.hooks import edit_sites
from saepatch.model.language_model import LanguageModel
from saepatch.model.replaced import skip_blocks
from saepatch.model.sites import Site

Errors = Literal["nodes", "kept", "dropped"]
TOKENS = 4096  # columns in a batch of passes


@dataclass(frozen=True, eq=False)
class Counterfactual:
    """What sites hold in the counterfactual run: their values, and all latents of those with dictionaries."""

    values: Mapping[Site, Float[Tensor, "rows pos width"]]
    acts: Mapping[Site, Float[Tensor, "rows pos d_sae"]]

    def mean(self) -> "Counterfactual":
        values, acts = ({site: x.mean(0, keepdim=True) for site, x in of.items()} for of in (self.values, self.acts))
        return Counterfactual(values, acts)


class NodeRuns:
    """Runs of a model in which some of `members` act, on all pairs.

    Args:
        patchables: As for `edges`; each site's nodes make up its whole value.
        pairs: The circuit acts in clean runs; counterfactual values are those of corrupted runs.
        members: Nodes that may act. Positions are indices into a prompt's own tokens, or None: all of them.
        errors: "nodes": error terms act where they are members; "kept": all error terms act; "dropped": the
            reconstructions take the sites' place in every run, the clean and corrupted ones too.
        means: Pairs over whose clean runs counterfactual values are averaged, position by position; None: each pair's
            own corrupted run.
        options: Metric, positions and batch size. BOS, padding and tokens that a site's dictionary was not trained on
            (`Dictionary.excluded_tokens`), in either prompt, have no nodes: the edited pass goes through unchanged.

    Raises:
        UserError: a member is not a node, a mean of prompts of some length is missing, pairs are not aligned, or
            positions select tokens that a dictionary was not trained on.
    """

    def __init__(
        self,
        model: LanguageModel,
        patchables: Patchable | Sequence[Patchable],
        pairs: Sequence[PromptPair],
        members: Sequence[Node],
        errors: Errors = "nodes",
        means: Sequence[PromptPair] | None = None,
        options: SweepOptions | None = None,
    ) -> None:
        self.model, self.members, self.errors = model, list(members), errors
        self.nodes, self.options = node_sites(model, patchables), options or SweepOptions()
        self.pairs = list(pairs)
        if errors not in ("nodes", "kept", "dropped"):
            raise UserError(f"errors {errors!r}: use 'nodes', 'kept' or 'dropped'")
        known = {(node.site, component.kind) for node in self.nodes for component in node.components}
        for member in self.members:
            if (member.site, member.kind) not in known:
                raise UserError(f"{member} is not among the nodes: give its dictionary or component")
            if member.kind == "error" and errors != "nodes":
                raise UserError(f"{member} is a member, but error terms are {errors}: use errors='nodes'")
        self._batches = [self._batch(part) for part in self._parts(self.pairs)]
        if means is not None:
            self._use_means(means)
        self.whole, self.empty = self._ends()
        first = self._batches[0]
        self.rounding = measured_rounding(model, first.clean, first.part, self.options.metric, self.whole, self.empty)

    @property
    def start(self) -> Site:
        """The first site with nodes: what lies before it is the clean run's, whatever acts."""
        return self.nodes[0].site

    def _parts(self, pairs: Sequence[PromptPair]) -> list[PairBatch]:
        whole = chosen_pairs(self.model, [node.components[0] for node in self.nodes], pairs, self.options.positions)
        return list(same_length_batches(whole, 64))

    def _where(self, node: NodeSite, part: PairBatch) -> Bool[Tensor, "rows pos"]:
        return known_where(self.model, node.components[0], part)

    def _batch(self, part: PairBatch) -> "_Batch":
        sites = [node.site for node in self.nodes]
        clean = KeptRun(self.model, part.clean, sites, keep_cache=False)
        if self.errors == "dropped":
            read: dict[Site, Tensor] = {}  # latents of what a reconstruction replaces
            listed = [(n, d) for n in self.nodes if (d := _dictionary(n)) is not None]
            edits = {n.site: partial(_reconstructed, d, self._where(n, part), read, n.site) for n, d in listed}
            first = KeptRun(self.model, part.clean, sites, edits, keep_cache=False)
            corrupted = KeptRun(self.model, part.corrupted, sites, edits, keep_cache=False)
            part = replace(part, clean_logits=first.logits)
            return _Batch(part, clean, Counterfactual({site: corrupted.values[site] for site in sites}, read))
        corrupted = KeptRun(self.model, part.corrupted, sites, keep_cache=False)
        part = replace(part, clean_logits=clean.logits)
        return _Batch(part, clean, self._counterfactual(corrupted.values))

    def _counterfactual(self, values: Mapping[Site, Tensor]) -> Counterfactual:
        read = {n.site: d.activations(values[n.site])[0] for n in self.nodes if (d := _dictionary(n)) is not None}
        return Counterfactual({node.site: values[node.site] for node in self.nodes}, read)

    def _use_means(self, pairs: Sequence[PromptPair]) -> None:
        by_width: dict[int, list[PromptPair]] = {}
        for pair in pairs:
            by_width.setdefault(len(self.model.encode(pair.clean)), []).append(pair)
        if self.errors == "dropped":
            raise UserError("means are not offered with errors='dropped': use each pair's corrupted run (means=None)")
        means = {}
        for width, some in by_width.items():
            tokens = self.model.tokenize([pair.clean for pair in some])
            values = self.model.capture(tokens, [node.site for node in self.nodes])
            means[width] = self._counterfactual(values).mean()
        for batch in self._batches:
            if (width := batch.part.clean.width) not in means:
                raise UserError(f"no mean over prompts of {width} tokens: give pairs of that length among `means`")
            batch.other = means[width]

    def _ends(self) -> tuple[Float[np.ndarray, "pairs"], Float[np.ndarray, "pairs"]]:
        none = torch.zeros(1, len(self.members), dtype=torch.bool)
        return self.run(~none, others_act=True)[0], self.run(none)[0]

    def mask(self, nodes: Sequence[Node]) -> Bool[Tensor, "members"]:
        """Which members are among some nodes.

        Raises:
            UserError: a node is not a member.
        """
        if unknown := set(nodes) - set(self.members):
            raise UserError(f"{next(iter(unknown))} is not a member of these runs: build them with it")
        chosen = set(nodes)
        return torch.tensor([member in chosen for member in self.members])

    @torch.no_grad()
    def run(
        self, act: Bool[Tensor, "variants members"], others_act: bool = False
    ) -> Float[np.ndarray, "variants pairs"]:
        """The metric of every pair when some members act; nodes that are no members do if `others_act`."""
        out = np.zeros((len(act), len(self.pairs)))
        for batch in self._batches:
            at_once = max(1, (self.options.batch_size or TOKENS // batch.part.clean.width) // len(batch.part))
            for start in range(0, len(act), at_once):
                some = act[start : start + at_once].to(self.model.device)
                index = batch.part.index.cpu().numpy()
                out[start : start + len(some), index] = self._metric(batch, some, others_act)
        return out

    def _metric(
        self, batch: "_Batch", act: Bool[Tensor, "variants members"], others_act: bool
    ) -> Float[np.ndarray, "variants rows"]:
        variants, n = len(act), len(batch.part)
        rows = torch.arange(n, device=self.model.device).repeat(variants)
        part = batch.part.rows(rows.tolist())
        edits: dict[Site, Hooked] = {}
        for node in self.nodes:
            numbers, where = range(len(node.components)), self._where(node, part)
            masks = [self._masks(node, number, act, others_act, where.shape[1]) for number in numbers]
            edits[node.site] = _SiteNodes(node, batch, masks, rows, where, self.errors, others_act)
        first, readout = self.start, Readout.of(self.options.metric, part, self.model)
        edits[first] = batch.entering(first, rows, edits[first])
        if entry(first) != first:
            edits[entry(first)] = _set_to(batch.clean.values[entry(first)][rows])
        skipped = skip_blocks(self.model.layout, first.enters if batch.skips(first) else 0)
        with readout.running(self.model), skipped, edit_sites(self.model.layout, edits):
            metric = readout(self.model.call(part.clean, last=True)[:, -1])
        return metric.double().cpu().numpy().reshape(variants, n)

    def _masks(
        self, node: NodeSite, number: int, act: Bool[Tensor, "variants members"], others_act: bool, width: int
    ) -> tuple[list[int], Bool[Tensor, "variants pos units"]]:
        """The units of a component that have members, and which of them act, by position."""
        component = node.components[number]
        mine = [i for i, m in enumerate(self.members) if (m.site, m.kind) == (node.site, component.kind)]
        units = sorted({self.members[i].unit for i in mine})
        if not isinstance(component, LatentUnits):
            units = list(range(component.units))
        if unknown := [self.members[i] for i in mine if not 0 <= self.members[i].unit < component.units]:
            raise UserError(f"{unknown[0]}: use units 0 to {component.units - 1}")
        place = {unit: i for i, unit in enumerate(units)}
        mask = torch.full((len(act), width, len(units)), others_act, dtype=torch.bool, device=act.device)
        if component.kind == "error" and self.errors == "kept":
            mask[:] = True
        for i in mine:
            position, unit = self.members[i].position, place[self.members[i].unit]
            if position is None:
                mask[:, :, unit] = act[:, i, None]
            elif position < width:
                mask[:, position, unit] = act[:, i]
        return units, mask


@dataclass(eq=False)
class _Batch:
    part: PairBatch
    clean: KeptRun
    other: Counterfactual

    def skips(self, site: Site) -> bool:
        """Whether passes may start at a site."""
        return self.clean.way(site) != "whole"

    def entering(self, site: Site, rows: Tensor, edit: Hooked) -> Hooked:
        """An edit of the first site, whose value comes from the clean run where the blocks before it are skipped."""
        return lambda x: edit(self.clean.values[site][rows].to(x))


class _SiteNodes:
    """The edit of one site: see the module."""

    def __init__(
        self,
        node: NodeSite,
        batch: _Batch,
        masks: Sequence[tuple[list[int], Bool[Tensor, "variants pos _"]]],
        rows: Tensor,
        where: Bool[Tensor, "rows pos"],
        errors: Errors,
        others_act: bool,
    ) -> None:
        self.node, self.where, self.errors, self.others_act = node, where, errors, others_act
        repeats = len(rows) // max(1, len(masks[0][1]))
        self.masks = [(units, mask.repeat_interleave(repeats, 0)) for units, mask in masks]
        own = slice(None) if len(batch.other.values[node.site]) == 1 else rows
        self.source = batch.other.values[node.site][own]
        self.acts = batch.other.acts[node.site][own] if node.site in batch.other.acts else None

    def __call__(self, x: Float[Tensor, "rows pos width"]) -> Float[Tensor, "rows pos width"]:
        component = self.node.components[0]
        source = self.source.to(x.device)
        if isinstance(component, LatentUnits):
            new = self._latents(component.dictionary, x, source)
        elif isinstance(component, Heads):
            act = self.masks[0][1][..., None].expand(*x.shape[:2], component.units, x.shape[-1] // component.units)
            new = torch.where(act.flatten(2), x, source)
        else:
            new = torch.where(self.masks[0][1], x, source)
        return torch.where(self.where.to(x.device)[..., None], new, x).to(x.dtype)

    def _latents(self, dictionary: Dictionary, x: Tensor, source: Tensor) -> Float[Tensor, "rows pos width"]:
        assert self.acts is not None
        (units, act), of_error = (
            self.masks[0],
            next(
                mask for (_, mask), c in zip(self.masks, self.node.components, strict=True) if isinstance(c, ErrorTerm)
            ),
        )
        needs_all = self.others_act or self.errors == "dropped" or bool(of_error.any())
        alone = dictionary.alone(units) if not needs_all else None
        acts = dictionary.activations(x)[0] if alone is None else None
        mine = alone.activations(x)[0] if alone is not None else acts[..., units]  # type: ignore[index]
        change = mine - self.acts[..., units]
        rows = dictionary.rows[units]
        if self.others_act:  # everything is live but the members that do not act
            new = x - (change * ~act) @ rows
        else:
            new = source + (change * act) @ rows
        if self.errors == "dropped":
            return new - (dictionary.encode(x).error if self.others_act else 0)
        if needs_all:
            error = (x - source) - (acts - self.acts) @ dictionary.rows  # type: ignore[operator]
            new = new - error * ~of_error if self.others_act else new + error * of_error
        return new


def _dictionary(node: NodeSite) -> Dictionary | None:
    first = node.components[0]
    return first.dictionary if isinstance(first, LatentUnits) else None


def _reconstructed(
    dictionary: Dictionary, where: Bool[Tensor, "rows pos"], read: dict[Site, Tensor], site: Site, x: Tensor
) -> Float[Tensor, "rows pos width"]:
    latents = dictionary.encode(x)
    read[site] = latents.acts
    return torch.where(where.to(x.device)[..., None], latents.reconstruction.to(x.dtype), x)


def _set_to(value: Tensor) -> Hooked:
    return lambda x: value.to(x)
