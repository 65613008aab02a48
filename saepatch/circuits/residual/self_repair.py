"""Self-repair: how much of a node's lost direct effect later parts of the model make up for (McGrath et al. 2023)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from saepatch.circuits.residual.stream_parts import StreamPart, StreamParts, StreamRun
from saepatch.circuits.residual.unembedding import Unembedding, read_unembedding, tolerance_of
from saepatch.data.batches import PairBatch, batch_pairs, same_length_batches
from saepatch.data.pairs import PromptPair
from saepatch.engine.components import Component, ErrorTerm, LatentUnits, Patchable, as_components
from saepatch.errors import UserError
from saepatch.model.hooks import edit_sites
from saepatch.model.language_model import LanguageModel, Tokens, refuse_training
from saepatch.model.replaced import only_logits_of
from saepatch.model.sites import Site
from saepatch.records.statistics import Interval, bootstrap_mean, bootstrap_ratio
from saepatch.records.tables import text_table

SHARES = ("heads", "MLPs", "final norm")
BATCH = 32  # pairs per forward pass


@dataclass(frozen=True, eq=False)
class SelfRepair:
    """What the ablation of a node does to each pair's answer logit, before any soft cap, in parts that sum.

    `change = direct + repair.sum(1)`: the change of the logit is the node's direct effect (with the final norm's
    scale of the base run), plus what later `parts` and the norm's new scale (`norm`) add. `pairs` are the indices of
    the reported pairs. `backups` are parts that were chosen on the selection; `joint` is the change when the node and
    they are ablated together, `backups_alone` when only they are (None: there was no selection).
    """

    node: str
    ablation: str
    pairs: Int[ndarray, "pairs"]
    change: Float[ndarray, "pairs"]
    direct: Float[ndarray, "pairs"]
    parts: tuple[StreamPart, ...]
    part_change: Float[ndarray, "pairs parts"]
    norm: Float[ndarray, "pairs"]
    backups: tuple[StreamPart, ...] = ()
    joint: Float[ndarray, "pairs"] | None = None
    backups_alone: Float[ndarray, "pairs"] | None = None

    def __repr__(self) -> str:
        shares = ", ".join(f"{name} {share}" for name, share in self.shares().items())
        return (
            f"SelfRepair of {self.node} ({self.ablation}) on {len(self.pairs)} pairs: the logit changes by "
            f"{self.change.mean():.3g}, directly by {self.direct.mean():.3g}\n"
            f"repaired share of the lost direct effect: {shares}"
        )

    @property
    def repair(self) -> Float[ndarray, "pairs 3"]:
        """What attention layers ("heads"), MLPs and the final norm add after the ablation, in the order of `SHARES`.

        Modules that are neither count as MLPs.
        """
        attention = np.array([part.kind == "attn_out" for part in self.parts], dtype=bool)
        heads, others = (self.part_change[:, which].sum(1) for which in (attention, ~attention))
        return np.stack([heads, others, self.norm], 1)

    def shares(self) -> dict[str, Interval]:
        """Repair as a share of the lost direct effect: in total and by `SHARES`, ratios of sums over pairs."""
        repair, lost = self.repair, -self.direct
        parts = {name: bootstrap_ratio(repair[:, i], lost) for i, name in enumerate(SHARES)}
        return {"total": bootstrap_ratio(repair.sum(1), lost), **parts}

    def only(self, kept: Int[ndarray, "kept"]) -> "SelfRepair":
        """The same of some of the pairs, given by their places in `pairs`."""
        arrays = {name: value[kept] for name, value in vars(self).items() if isinstance(value, ndarray)}
        return replace(self, **arrays)

    def summary(self) -> str:
        """Changes of the logit and shares as a table, with intervals over pairs."""
        lost = bootstrap_mean(-self.direct)
        rows = [[name, str(share)] for name, share in self.shares().items()]
        lines = [text_table(["repaired by", "share of the lost direct effect"], rows)]
        lines.append(f"{self.node}, {self.ablation}, last position, n = {len(self.pairs)}: direct effect lost {lost}")
        if self.joint is not None and self.backups_alone is not None:
            names = ", ".join(map(str, self.backups)) or "none"
            lines.append(
                f"backups chosen on the selection: {names}; mean change of the logit {self.change.mean():.4f} alone, "
                f"{self.joint.mean():.4f} jointly, {self.backups_alone.mean():.4f} for the backups by themselves"
            )
        return "\n".join(lines)

    def rows(self, task: str = "") -> Iterator[dict[str, Any]]:
        """Flat records, one for each pair: the change and its parts."""
        for number, pair in enumerate(self.pairs.tolist()):
            record = {
                "task": task,
                "node": self.node,
                "ablation": self.ablation,
                "pair": pair,
                "change": float(self.change[number]),
                "direct": float(self.direct[number]),
                "norm": float(self.norm[number]),
            }
            yield record | {
                str(part): float(value) for part, value in zip(self.parts, self.part_change[number], strict=True)
            }


@torch.no_grad()
def self_repair(
    model: LanguageModel,
    component: Patchable,
    unit: int,
    pairs: Sequence[PromptPair],
    selection: Sequence[PromptPair] = (),
    mean_over: Sequence[str] = (),
    most: int | None = None,
    backups: int = 1,
) -> SelfRepair:
    """Ablate a node at each clean prompt's last position, and split the change of the answer's logit.

    The node's direct effect, and those of later attention layers and MLPs, are taken with the final norm's scale in the
    base run (McGrath et al. 2023; Rushing and Nanda 2024); what is left of the change is due to the norm's new scale.
    Shares are ratios of sums over pairs, not means of clipped ratios, which are biased upwards. For several nodes on
    the same pairs, `RepairRuns` runs the model without ablation once.

    Args:
        model: A model whose logits `direct_attribution` can attribute.
        component: A `Dictionary` (its latents), `Heads` (a layer's heads) or `Stream` (an MLP's output, say).
        unit: The latent or head; 0 for a stream.
        pairs: The reported pairs, clean and corrupted prompt of equal length.
        selection: Pairs with other corrupted prompts, on which pairs and backups are chosen.
        mean_over: Prompts over whose last positions the node is averaged; none: it takes its value in the corrupted
            prompt of its pair (resample ablation).
        most: Report only this many pairs, those that lose the largest direct effect in the selection, which then has
            the same clean prompts in the same order.
        backups: Number of later parts, those that repair most in the selection, to ablate jointly (by resampling).

    Raises:
        UserError: the unit does not exist or has the same value in all runs, its dictionary was not trained on a
            prompt's last token, the model cannot be attributed, or the selection does not fit.
    """
    return RepairRuns(model, pairs, selection).ablate(component, unit, mean_over, most, backups)


class RepairRuns:
    """Runs of a model in which nodes are ablated one at a time, all on the same pairs: see `self_repair`."""

    def __init__(self, model: LanguageModel, pairs: Sequence[PromptPair], selection: Sequence[PromptPair] = ()) -> None:
        refuse_training(model)
        self.model, self.pairs, self.selection = model, list(pairs), list(selection)
        self.parts, self.unembedding = StreamParts.of(model), read_unembedding(model)
        self._of_prompts: dict[tuple[str, ...], _LastValues] = {}
        self._of_pairs, self._of_selection = self._batches(self.pairs), self._batches(self.selection)

    @torch.no_grad()
    def _batches(self, pairs: Sequence[PromptPair]) -> list["_BaseRun"]:
        parts = same_length_batches(batch_pairs(self.model, pairs), BATCH) if pairs else ()
        return [_BaseRun.of(part, self.parts, self.unembedding) for part in parts]

    @torch.no_grad()
    def ablate(
        self,
        component: Patchable,
        unit: int,
        mean_over: Sequence[str] = (),
        most: int | None = None,
        backups: int = 1,
    ) -> SelfRepair:
        """What the ablation of one node does, as `self_repair` reports it."""
        if most is not None and [pair.clean for pair in self.selection] != [pair.clean for pair in self.pairs]:
            raise UserError("pairs are chosen on a selection with the same clean prompts in the same order: give that")
        if most is not None and mean_over:
            raise UserError("a mean ablation of the same prompts is no second sample to choose on: leave most out")
        node = _one_unit(self.model, component, unit)
        _check_known(self.model, node, [*self._of_pairs, *self._of_selection], mean_over)
        mean = self._mean(node, tuple(mean_over))
        ablation = _Ablation(self.model, node, unit, self.parts, self.unembedding, mean)
        if not self.selection:
            return ablation.measure(self._of_pairs, ())
        chosen = ablation.measure(self._of_selection, ())
        sizes = chosen.part_change.mean(0) * np.sign(-chosen.direct.mean())
        order = [i for i in np.argsort(-sizes, kind="stable")[:backups].tolist() if sizes[i] > 0]
        result = ablation.measure(self._of_pairs, tuple(chosen.parts[i] for i in order), jointly=True)
        return result if most is None else result.only(np.sort(np.argsort(chosen.direct, kind="stable")[:most]))

    def _mean(self, node: Component, prompts: tuple[str, ...]) -> Float[Tensor, "values"] | None:
        """A node's mean over the last positions of some prompts."""
        if not prompts:
            return None
        kept = self._of_prompts.setdefault(prompts, _LastValues(self.model, self.model.tokenize(list(prompts))))
        return node.read(kept.at(node.site)).mean((0, 1))


def _one_unit(model: LanguageModel, component: Patchable, unit: int) -> Component:
    listed = as_components(model, component)[0]
    if not 0 <= unit < listed.units:
        raise UserError(f"{listed.kind} {unit} is out of range: {listed.site} has {listed.units}, from 0")
    return replace(listed, ids=(unit,)) if isinstance(listed, LatentUnits) else listed


def _check_known(
    model: LanguageModel, node: Component, batches: Sequence["_BaseRun"], mean_over: Sequence[str]
) -> None:
    """Raises UserError where a prompt ends in a token that the node's dictionary was not trained on."""
    if isinstance(node, LatentUnits | ErrorTerm):
        prompts = [side for batch in batches for side in (batch.part.clean, batch.part.corrupted)]
        for tokens in [*prompts, *([model.tokenize(list(mean_over))] if mean_over else [])]:
            last = tokens.input_ids.gather(1, tokens.last[:, None])
            node.dictionary.editable(model, last, torch.ones_like(last, dtype=torch.bool), "last")


class _LastValues:
    """What sites hold at the last position of prompts. All sites of a stream are read in one pass."""

    def __init__(self, model: LanguageModel, tokens: Tokens) -> None:
        self.model, self.tokens = model, tokens
        self._values: dict[Site, Float[Tensor, "rows 1 width"]] = {}

    @torch.no_grad()
    def at(self, site: Site) -> Float[Tensor, "rows 1 width"]:
        if site not in self._values:
            read = self.model.capture(self.tokens, {site, *self.model.layout.of_stream(site.stream)})
            rows = torch.arange(len(self.tokens.last), device=self.tokens.last.device)
            self._values |= {other: x[rows, self.tokens.last][:, None] for other, x in read.items()}
        return self._values[site]


@dataclass(frozen=True, eq=False)
class _BaseRun:
    """Pairs of one length: what the stream and its parts hold at the last position of both prompts, unablated.

    `toward` is what one unit of the stream adds to the answer's `logit` at the final norm's scale.
    """

    part: PairBatch
    clean: _LastValues
    corrupted: _LastValues
    stream: Float[Tensor, "pairs d_model"]
    wrote: Mapping[StreamPart, Float[Tensor, "pairs d_model"]]
    donor: Mapping[StreamPart, Float[Tensor, "pairs d_model"]]
    toward: Float[Tensor, "pairs d_model"]
    logit: Float[Tensor, "pairs"]

    @classmethod
    def of(cls, part: PairBatch, parts: StreamParts, unembedding: Unembedding) -> "_BaseRun":
        clean, corrupted = (parts.run(tokens, last=True) for tokens in (part.clean, part.corrupted))
        x, targets = clean.streams[-1][:, -1], part.answer[:, None]
        toward = unembedding.directions(unembedding.sigma(x), targets)[:, 0]
        wrote, donor = ({p: value[:, -1] for p, value in run.wrote.items()} for run in (clean, corrupted))
        last, others = (_LastValues(parts.model, tokens) for tokens in (part.clean, part.corrupted))
        return cls(part, last, others, x, wrote, donor, toward, unembedding.logits(x, targets)[:, 0])


@dataclass(frozen=True, eq=False)
class _Ablation:
    """Measures the ablation of one unit of a component: to its value in the corrupted prompt, or to a mean."""

    model: LanguageModel
    node: Component
    unit: int
    parts: StreamParts
    unembedding: Unembedding
    mean: Float[Tensor, "values"] | None

    def measure(self, batches: Sequence[_BaseRun], backups: Sequence[StreamPart], jointly: bool = False) -> SelfRepair:
        values: dict[str, Tensor] = {}
        later, count = self._later(), sum(len(batch.part) for batch in batches)
        for batch in batches:
            for name, value in self._batch(batch, later, backups, jointly).items():
                whole = values.setdefault(name, value.new_zeros(count, *value.shape[1:]))
                whole[batch.part.index.to(whole.device)] = value
        if not any(bool(values[name].any()) for name in ("change", "direct")):
            raise UserError(
                f"{self.node.site} {self.node.kind} {self.unit} has the same value at the last position of both "
                "prompts of every pair, so nothing is ablated: choose a node that differs there, or other prompts"
            )
        arrays = {name: value.cpu().numpy() for name, value in values.items()}
        ablation = "resample ablation" if self.mean is None else "mean ablation"
        name = f"{self.node.site} {self.node.kind} {self.unit}"
        return SelfRepair(name, ablation, np.arange(count), parts=later, backups=tuple(backups), **arrays)

    def _later(self) -> tuple[StreamPart, ...]:
        """The parts of the stream that the node can act on, without that through which it acts directly."""
        own = self._own_part()
        parts = [writer.part for writer in self.parts.writers]
        site = self.node.site
        return tuple(part for part in parts if part != own and _order(part) > (site.order[0], site.order[1]))

    def _own_part(self) -> StreamPart | None:
        stream = {"z": "attn_out", "neurons": "mlp_out"}.get(self.node.site.stream, self.node.site.stream)
        part = StreamPart(stream, self.node.site.layer)
        return part if any(writer.part == part for writer in self.parts.writers) else None

    def _batch(
        self, base: _BaseRun, later: Sequence[StreamPart], backups: Sequence[StreamPart], jointly: bool
    ) -> dict[str, Tensor]:
        """The change of the answer's logit and its parts, for pairs of one length."""
        part, x = base.part, base.stream
        moved, edit = self._edit(base)

        def run(edits: Mapping[Site, Any]) -> tuple[StreamRun, Float[Tensor, "pairs"]]:
            with ExitStack() as stack:
                stack.enter_context(only_logits_of(self.model.hf, part.answer[:1]))  # those needed are of the stream
                if edits:
                    stack.enter_context(edit_sites(self.model.layout, edits))
                edited = self.parts.run(part.clean, last=True)
            logits = self.unembedding.logits(edited.streams[-1][:, -1], part.answer[:, None])
            return edited, logits[:, 0] - base.logit

        def along(change: Tensor) -> Float[Tensor, "pairs"]:
            return (base.toward * change.double()).sum(-1)

        edited, change = run({self.node.site: edit})
        of_part = {p: along(edited.wrote[p][:, -1].double() - base.wrote[p].double()) for p in later}
        own = self._own_part()
        direct = along(moved[:, -1] if own is None else edited.wrote[own][:, -1].double() - base.wrote[own])
        through = along(edited.streams[-1][:, -1].double() - x)
        self._check(direct, of_part, through, edited.streams[-1][:, -1], base.toward)
        result = {
            "change": change,
            "direct": direct,
            "part_change": torch.stack(list(of_part.values()), 1) if of_part else base.toward[:, :0],
            "norm": change - through,
        }
        if jointly:
            others = {Site(p.layer or 0, p.kind): partial(_with_last, value=base.donor[p]) for p in backups}
            for site in others:
                self.model.layout.module(site)  # raises
            result["joint"] = run({self.node.site: edit, **others})[1]
            result["backups_alone"] = run(others)[1]
        return result

    def _edit(self, base: _BaseRun) -> tuple[Tensor, Any]:
        """The change of the node's site at the last position, and the edit that makes it."""
        x = base.clean.at(self.node.site)
        if self.mean is None:
            values = self.node.read(base.corrupted.at(self.node.site))
        else:
            values = self.mean.expand(*x.shape[:2], *self.mean.shape)
        changes = self.node.write(x, values, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))
        unit = 0 if isinstance(self.node, LatentUnits) else self.unit
        mine = (changes.unit == unit).nonzero().flatten()
        moved = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        moved[changes.row[mine], changes.pos[mine]] = changes.vectors(mine).to(moved.dtype)
        return moved, lambda value: torch.cat([value[:, :-1], (value[:, -1:] + moved).to(value.dtype)], 1)

    def _check(
        self,
        direct: Float[Tensor, "pairs"],
        of_part: Mapping[StreamPart, Float[Tensor, "pairs"]],
        through: Float[Tensor, "pairs"],
        x: Float[Tensor, "pairs d_model"],
        toward: Float[Tensor, "pairs d_model"],
    ) -> None:
        """Raises UserError where the changes of the parts are not that of the stream."""
        off = (torch.stack([direct, *of_part.values()]).sum(0) - through).abs()
        size = (toward.abs() * x.double().abs()).sum(-1) + through.abs()
        if not bool((off <= tolerance_of(x.dtype) * size).all()):
            raise UserError(
                f"{self.model.name}: after the ablation of {self.node.site} the parts of the stream do not add up to "
                f"it (off by {float((off / size).max()):.1e} of its size), so self-repair has no parts here"
            )


def _order(part: StreamPart) -> tuple[int, int]:
    stream = part.kind if part.kind in ("attn_out", "mlp_out") else "mlp_out"
    return Site(part.layer or 0, stream).order


def _with_last(x: Tensor, value: Tensor) -> Tensor:
    out = x.clone()
    out[:, -1] = value
    return out
