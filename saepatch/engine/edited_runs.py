"""The metric under the edits of one batch of pairs: the change at the first site, and edits further downstream."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saepatch.data.batches import PairBatch
from saepatch.engine.changes import between, in_stretches
from saepatch.engine.chosen import known_where
from saepatch.engine.components import Changes, Component, LatentUnits
from saepatch.engine.metrics import Metric, answers_only, checked
from saepatch.engine.options import SweepOptions
from saepatch.engine.passes.kept_run import KeptRun
from saepatch.engine.passes.pieces import Later
from saepatch.engine.passes.shared_runs import forget_runs
from saepatch.engine.plan import EditPlan, Units, batches, column_of, plan
from saepatch.errors import UserError

log = logging.getLogger(__name__)

VECTORS = 2**15  # changes decoded at a time


@dataclass(frozen=True)
class Piece:
    """Units of one component (by its number) that an edit sets, at one position or (None) at all chosen positions."""

    component: int
    units: tuple[int, ...]
    position: int | None
    frozen: bool = False


Wanted = tuple[Piece, ...]  # one edit
Stage = tuple[tuple[int, bool], ...]  # the numbers of an edit's components, and whether their units are frozen


class EditedRuns:
    """Runs the edits of one stage in one batch of pairs. `asked[row]` are a row's edits; None: every unit alone."""

    def __init__(
        self,
        components: Sequence[Component],
        stage: Stage,
        runs: tuple[KeptRun, KeptRun],
        part: PairBatch,
        asked: Sequence[Sequence[Wanted] | None],
        options: SweepOptions,
    ) -> None:
        assert part.where is not None
        self.components, self.part, self.asked, self.options = components, part, asked, options
        self.base, self.source = runs
        self.where = {number: known_where(self.base.model, components[number], part) for number, _ in stage}
        acting = [number for number, frozen in stage if not frozen]
        first = min(components[number].site.order for number in acting)
        self.start = [number for number in acting if components[number].site.order == first]
        # units frozen upstream of every change cannot change anyway
        self.later = [(number, frozen) for number, frozen in stage if components[number].site.order > first]
        changes = {number: between(components[number], *runs, self.where[number]) for number in acting}
        self.changes, self._component_of, offsets = _joined(changes, components)
        self._check_positions()
        units = [None if mine is None else [_units(edit, offsets) for edit in mine] for mine in asked]
        self.planned: EditPlan = plan(self.changes, units, self.base.tokens, options.each_position)

    def _check_positions(self) -> None:
        """Raises UserError where an edit names a position whose token its dictionary was not trained on."""
        assert self.part.where is not None
        left_out = {number: (self.part.where & ~where).cpu() for number, where in self.where.items()}
        left_out = {number: mask for number, mask in left_out.items() if bool(mask.any())}
        lengths = self.base.tokens.lengths.tolist()
        for row, edits in enumerate(self.asked if left_out else ()):
            for piece in chain.from_iterable(edits or ()):
                if piece.frozen or piece.position is None or piece.component not in left_out:
                    continue
                column = column_of(piece.position, lengths[row], self.base.width)
                if bool(left_out[piece.component][row, column]):
                    raise UserError(
                        f"an edit at position {piece.position} of pair {self.part.pairs[row].example!r}, whose token "
                        "the dictionary was not trained on: load it with every_position=True (--every_position)"
                    )

    def run(self) -> Iterator[tuple[slice, Float[np.ndarray, "edits"]]]:
        """The metric of the planned edits, batch by batch."""
        metric, size = self.options.metric, self.options.batch_size
        live = sum(self.components[number].units for number, _ in self.later)
        several = batches(self.base.model, self.base, self.planned, metric, size, live)
        return chain.from_iterable(map(self._measured, several))

    def _measured(self, batch: slice) -> Iterator[tuple[slice, Float[np.ndarray, "edits"]]]:
        """Values of a batch of the plan, halved until it fits the device's memory."""
        try:
            yield batch, self._values(batch)
        except torch.OutOfMemoryError as error:
            middle = (batch.start + batch.stop) // 2
            if middle == batch.start:
                raise UserError(
                    f"a single edit of a prompt of {self.base.width} tokens does not fit in the memory of "
                    f"{self.base.model.device}: shorten the prompts, or spread the model (device_map)"
                ) from error
            forget_runs()
            log.info("%d edits at a time do not fit in the device's memory: trying half", batch.stop - batch.start)
            yield from self._measured(slice(batch.start, middle))
            yield from self._measured(slice(middle, batch.stop))

    def _values(self, batch: slice) -> Float[np.ndarray, "edits"]:
        rows, first = self.planned.row[batch], int(self.planned.first[batch.start])
        site, metric = self.components[self.start[0]].site, self.options.metric
        asking, only = self.part.rows(rows.tolist()), None
        if answers_only(metric):
            only, places = torch.unique(torch.stack([asking.answer, asking.counter]), return_inverse=True)
            asking = replace(asking, answer=places[0], counter=places[1])
        change, later = self._first_change(batch, first), self._later_edits(batch, first)
        values = metric_values(metric, self.base.resume(site, rows, first, change, only, later), asking)
        if np.isnan(values).any():
            example = asking.pairs[int(np.isnan(values).argmax())].example
            raise UserError(f"the metric is NaN for pair {example!r} under an edit at {site}: check the metric or pair")
        return values

    def _first_change(self, batch: slice, first: int) -> Float[Tensor, "edits columns width"]:
        """The changes that the edits add to the first site."""
        bounds = self.planned.starts[batch.start : batch.stop + 1]
        entries = self.planned.entries[int(bounds[0]) : int(bounds[-1])].to(self.changes.row.device)
        n = batch.stop - batch.start
        edit = torch.repeat_interleave(torch.arange(n), bounds.diff()).to(entries.device)
        if self._component_of is not None:  # entries of later sites only decide which edits run
            here = torch.isin(self._component_of[entries], torch.tensor(self.start, device=entries.device))
            entries, edit = entries[here], edit[here]
        old = self.base.values[self.components[self.start[0]].site]
        change = _zeros(old, n, self.base.width - first, old.shape[-1])
        _add_vectors(change, self.changes, entries, edit, first)
        return change

    def _later_edits(self, batch: slice, first: int) -> Later:
        """Functions that set units at later sites, given the sites' values in the edited runs."""
        by_order: dict[tuple[int, int], list[_DownstreamUnits]] = {}
        for number, frozen in self.later:
            if (live := self._live(number, frozen, batch, first)) is not None:
                by_order.setdefault(live.component.site.order, []).append(live)
        return {some[0].component.site: _setting(some) for _, some in sorted(by_order.items())}

    def _live(self, number: int, frozen: bool, batch: slice, first: int) -> "_DownstreamUnits | None":
        """The units of one component that a batch of edits sets downstream; None: there are none."""
        component, rows = self.components[number], self.planned.row[batch]
        asked = [self.asked[row] or () for row in rows.tolist()]
        edits = [mine[group] for mine, group in zip(asked, self.planned.group[batch].tolist(), strict=True)]
        mine = [[piece for piece in edit if (piece.component, piece.frozen) == (number, frozen)] for edit in edits]
        units = list(range(component.units))
        held, values = self._read[number, frozen]
        if isinstance(component, LatentUnits):
            units = sorted({unit for pieces in mine for piece in pieces for unit in piece.units})
            component, values = replace(component, ids=tuple(units)), values[..., [held[unit] for unit in units]]
        values = values[:, first:]
        may = (self.base.tokens.attention_mask.bool() if frozen else self.where[number])[rows, first:]
        chosen = self._chosen(mine, {unit: i for i, unit in enumerate(units)}, batch, first).to(may.device)
        chosen &= may[..., None]
        return _DownstreamUnits(component, values[rows], chosen) if bool(chosen.any()) else None

    def _chosen(
        self, edits: Sequence[Sequence[Piece]], place: dict[int, int], batch: slice, first: int
    ) -> Bool[Tensor, "edits columns units"]:
        """Mask of the units that each edit sets, from column `first` on; earlier columns are unchanged."""
        width, alone = self.base.width, self.planned.first[batch].tolist()
        lengths = self.base.tokens.lengths[self.planned.row[batch]].tolist()
        chosen = torch.zeros(len(edits), width - first, len(place), dtype=torch.bool)
        for number, pieces in enumerate(edits):
            for piece in pieces:
                ids = [place[unit] for unit in piece.units]
                column = None if piece.position is None else column_of(piece.position, lengths[number], width)
                if self.options.each_position and not piece.frozen:
                    column = alone[number]
                if column is None:
                    chosen[number, :, ids] = True
                elif column >= first:
                    chosen[number, column - first, ids] = True
        return chosen

    @cached_property
    def _read(self) -> dict[tuple[int, bool], tuple[dict[int, int], Float[Tensor, "batch pos values"]]]:
        """The values to which downstream units are set; of latents, those that some edit sets, and their places."""
        runs = {False: self.source, True: self.base}
        asked = [piece for edits in self.asked for edit in edits or () for piece in edit]
        read = {}
        for number, frozen in self.later:
            component, place = self.components[number], dict[int, int]()
            if isinstance(component, LatentUnits):
                mine = [piece.units for piece in asked if (piece.component, piece.frozen) == (number, frozen)]
                place = {unit: i for i, unit in enumerate(sorted(set(chain.from_iterable(mine))))}
                component = component if len(place) == component.units else replace(component, ids=tuple(place))
            read[number, frozen] = place, in_stretches(component, runs[frozen].values[component.site])
        return read


@dataclass(frozen=True, eq=False)
class _DownstreamUnits:
    """Units of one component set downstream of the first site, for each edit of a batch."""

    component: Component
    values: Float[Tensor, "edits columns values"]
    chosen: Bool[Tensor, "edits columns units"]

    def add(
        self, x: Float[Tensor, "edits columns width"], before: int, out: Float[Tensor, "edits columns width"]
    ) -> None:
        """Add to `out` the change when the units are set and the site's value after `before` columns is `x`."""
        here = slice(before, before + x.shape[1])
        chosen = self.chosen[:, here]
        if not bool(chosen.any()):
            return
        changes = self.component.write(x, self.values[:, here], chosen.any(-1))
        mine = chosen[changes.row, changes.pos, changes.unit].nonzero().flatten()
        _add_vectors(out, changes, mine, changes.row[mine], 0)


def _setting(several: Sequence[_DownstreamUnits]) -> Callable[[Tensor, int], Tensor]:
    def edit(x: Float[Tensor, "edits columns width"], before: int) -> Float[Tensor, "edits columns width"]:
        change = _zeros(x, *x.shape)
        for live in several:
            live.add(x, before, change)
        return (x + change).to(x.dtype)

    return edit


def _zeros(like: Tensor, *shape: int) -> Tensor:
    # at least float32: many small changes may add up at one position
    return torch.zeros(shape, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))


def _add_vectors(out: Tensor, changes: Changes, entries: Tensor, edit: Tensor, first: int) -> None:
    for some, of in zip(entries.split(VECTORS), edit.split(VECTORS), strict=True):
        out.index_put_((of, changes.pos[some] - first), changes.vectors(some).to(out.dtype), accumulate=True)


def _units(edit: Wanted, offsets: dict[int, int]) -> list[Units]:
    acting = [piece for piece in edit if not piece.frozen]
    return [([offsets[piece.component] + unit for unit in piece.units], piece.position) for piece in acting]


def _joined(
    changes: dict[int, Changes], components: Sequence[Component]
) -> tuple[Changes, Int[Tensor, "entries"] | None, dict[int, int]]:
    """The changes of several components as one, each entry's component, and each component's offset in unit numbers."""
    if len(changes) == 1:
        ((number, only),) = changes.items()
        return only, None, {number: 0}
    starts = np.cumsum([0, *(components[number].units for number in changes)]).tolist()
    offsets = dict(zip(changes, starts, strict=False))
    each = list(changes.values())
    row = torch.cat([some.row for some in each])
    order = row.argsort(stable=True)
    component_of = torch.cat([torch.full_like(some.row, number) for number, some in changes.items()])[order]
    within = torch.cat([torch.arange(len(some), device=row.device) for some in each])[order]

    def vectors(some: Int[Tensor, "some"]) -> Float[Tensor, "some width"]:
        parts = {n: (component_of[some] == n).nonzero().flatten() for n in component_of[some].unique().tolist()}
        made = {n: changes[n].vectors(within[some[at]]) for n, at in parts.items()}
        if not made:
            return each[0].vectors(some)
        out = next(iter(made.values()))
        out = out.new_zeros(
            len(some), out.shape[-1], dtype=max((m.dtype for m in made.values()), key=lambda d: d.itemsize)
        )
        for n, at in parts.items():
            out[at] = made[n].to(out.dtype)
        return out

    pos = torch.cat([some.pos for some in each])[order]
    unit = torch.cat([some.unit + offsets[number] for number, some in changes.items()])[order]
    return Changes(row[order], pos, unit, vectors), component_of, offsets


def metric_values(metric: Metric, logits: Tensor, batch: PairBatch) -> Float[np.ndarray, "batch"]:
    return checked(metric, logits, batch).double().cpu().numpy()
