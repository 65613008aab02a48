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
from saepatch.engine.components import Component, LatentUnits, Patchable, as_components
from saepatch.errors import UserError
from saepatch.model.hooks import edit_sites
from saepatch.model.language_model import LanguageModel, refuse_training
from saepatch.model.sites import Site
from saepatch.records.statistics import Interval, bootstrap_mean, bootstrap_ratio
from saepatch.records.tables import text_table

SHARES = ("heads", "MLPs", "final norm")


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
    Shares are ratios of sums over pairs, not means of clipped ratios, which are biased upwards.

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
        UserError: the unit does not exist or has the same value in all runs, the model cannot be attributed, or the
            selection does not fit.
    """
    refuse_training(model)
    node = _one_unit(model, component, unit)
    repairs = _Repairs(model, node, unit, StreamParts.of(model), read_unembedding(model), mean_over)
    if most is not None and [pair.clean for pair in selection] != [pair.clean for pair in pairs]:
        raise UserError("pairs are chosen on a selection with the same clean prompts in the same order: give that")
    if most is not None and mean_over:
        raise UserError("a mean ablation of the same prompts is no second sample to choose on: leave most out")
    if not selection:
        return repairs.measure(pairs, ())
    chosen = repairs.measure(selection, ())
    sizes = chosen.part_change.mean(0) * np.sign(-chosen.direct.mean())
    order = [i for i in np.argsort(-sizes, kind="stable")[:backups].tolist() if sizes[i] > 0]
    kept = list(range(len(pairs)))
    if most is not None:
        kept = sorted(np.argsort(chosen.direct, kind="stable")[:most].tolist())
    result = repairs.measure([pairs[i] for i in kept], tuple(chosen.parts[i] for i in order), jointly=True)
    return replace(result, pairs=np.array(kept))


def _one_unit(model: LanguageModel, component: Patchable, unit: int) -> Component:
    listed = as_components(model, component)[0]
    if not 0 <= unit < listed.units:
        raise UserError(f"{listed.kind} {unit} is out of range: {listed.site} has {listed.units}, from 0")
    return replace(listed, ids=(unit,)) if isinstance(listed, LatentUnits) else listed


@dataclass(frozen=True, eq=False)
class _Repairs:
    """Measures the ablation of one unit of a component."""

    model: LanguageModel
    node: Component
    unit: int
    parts: StreamParts
    unembedding: Unembedding
    mean_over: Sequence[str]

    def measure(self, pairs: Sequence[PromptPair], backups: Sequence[StreamPart], jointly: bool = False) -> SelfRepair:
        values: dict[str, Tensor] = {}
        later = self._later()
        mean = self._mean() if self.mean_over else None
        for part in same_length_batches(batch_pairs(self.model, pairs), 32):
            measured = self._batch(part, later, mean, backups, jointly)
            for name, value in measured.items():
                whole = values.setdefault(name, value.new_zeros(len(pairs), *value.shape[1:]))
                whole[part.index.to(whole.device)] = value
        if not any(bool(values[name].any()) for name in ("change", "direct")):
            raise UserError(
                f"{self.node.site} {self.node.kind} {self.unit} has the same value at the last position of both "
                "prompts of every pair, so nothing is ablated: choose a node that differs there, or other prompts"
            )
        arrays = {name: value.cpu().numpy() for name, value in values.items()}
        ablation = "mean ablation" if self.mean_over else "resample ablation"
        name = f"{self.node.site} {self.node.kind} {self.unit}"
        return SelfRepair(name, ablation, np.arange(len(pairs)), parts=later, backups=tuple(backups), **arrays)

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

    def _mean(self) -> Float[Tensor, "values"]:
        tokens, site = self.model.tokenize(list(self.mean_over)), self.node.site
        x = self.model.capture(tokens, [site])[site]
        return self.node.read(x[torch.arange(len(x)), tokens.last][:, None]).mean((0, 1))

    def _batch(
        self,
        part: PairBatch,
        later: Sequence[StreamPart],
        mean: Float[Tensor, "values"] | None,
        backups: Sequence[StreamPart],
        jointly: bool,
    ) -> dict[str, Tensor]:
        """The change of the answer's logit and its parts, for pairs of one length."""
        base, targets = self.parts.run(part.clean), part.answer[:, None]
        x = base.streams[-1][:, -1]
        toward = self.unembedding.directions(self.unembedding.sigma(x), targets)[:, 0]
        logit = self.unembedding.logits(x, targets)[:, 0]
        donor = self.parts.run(part.corrupted)
        moved, edit = self._ablation(part, mean)

        def run(edits: Mapping[Site, Any]) -> tuple[StreamRun, Float[Tensor, "pairs"]]:
            with ExitStack() as stack:
                if edits:
                    stack.enter_context(edit_sites(self.model.layout, edits))
                edited = self.parts.run(part.clean)
            return edited, self.unembedding.logits(edited.streams[-1][:, -1], targets)[:, 0] - logit

        def along(change: Tensor) -> Float[Tensor, "pairs"]:
            return (toward * change.double()).sum(-1)

        edited, change = run({self.node.site: edit})
        of_part = {p: along(edited.wrote[p][:, -1].double() - base.wrote[p][:, -1].double()) for p in later}
        own = self._own_part()
        direct = along(moved[:, -1] if own is None else edited.wrote[own][:, -1].double() - base.wrote[own][:, -1])
        through = along(edited.streams[-1][:, -1].double() - x)
        self._check(direct, of_part, through, edited.streams[-1][:, -1], toward)
        result = {
            "change": change,
            "direct": direct,
            "part_change": torch.stack(list(of_part.values()), 1) if of_part else toward[:, :0],
            "norm": change - through,
        }
        if jointly:
            others = {Site(p.layer or 0, p.kind): partial(_with_last, value=donor.wrote[p][:, -1]) for p in backups}
            for site in others:
                self.model.layout.module(site)  # raises
            result["joint"] = run({self.node.site: edit, **others})[1]
            result["backups_alone"] = run(others)[1]
        return result

    def _ablation(self, part: PairBatch, mean: Float[Tensor, "values"] | None) -> tuple[Tensor, Any]:
        """The change of the node's site, and the edit that makes it."""
        site, captured = self.node.site, self.model.capture
        x = captured(part.clean, [site])[site]
        values = self.node.read(captured(part.corrupted, [site])[site])
        if mean is not None:
            values = mean.expand(values.shape)
        where = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        where[:, -1] = True
        changes = self.node.write(x, values, where)
        unit = 0 if isinstance(self.node, LatentUnits) else self.unit
        mine = (changes.unit == unit).nonzero().flatten()
        moved = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        moved[changes.row[mine], changes.pos[mine]] = changes.vectors(mine).to(moved.dtype)
        return moved, lambda value: (value + moved).to(value.dtype)

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
