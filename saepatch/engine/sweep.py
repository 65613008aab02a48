"""The engine of exact patching: run every edit that is asked for and that changes something, many at a time.

Each batch of pairs is run twice, clean and corrupted. Edits resume from the base run (`saepatch.engine.kept_run`),
sorted by the first position they change, so that a batch of edits shares the keys and values of the positions before.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from saepatch.data.batches import PairBatch, batch_pairs, own_positions, same_length_batches
from saepatch.data.pairs import PromptPair
from saepatch.engine.components import Changes, Component, Direction, between
from saepatch.engine.corruptions import Corruption
from saepatch.engine.kept_run import Checked, Run
from saepatch.engine.metrics import Metric, answers_only, bytes_per_logit, checked, needs_clean_logits
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.positions import Positions
from saepatch.splicing.splice import choose_positions

log = logging.getLogger(__name__)

Align = Literal["equal", "right"]
Progress = bool | Callable[[int], None]  # a bar, or a function that is told how many edits were just done
# Units that are patched together, and where: at one position, or (None) at all that were chosen.
Wanted = tuple[tuple[int, ...], int | None]
CPU_MEMORY = 2**28  # bytes that the activations of one batch of edits may take; more is no faster
PAIRS_MEMORY = 2**29  # bytes that the latents of one batch of pairs may take
SMALL = 512  # tokens: of fewer, two batches take hardly longer as one, for reading the weights takes longest
VECTORS = 2**15  # changes that are decoded at a time


@dataclass(frozen=True)
class Options:
    direction: Direction
    metric: Metric
    corruption: Corruption | None
    positions: Positions
    each_position: bool
    align: Align
    batch_size: int | None
    progress: Progress

    def __post_init__(self) -> None:
        if self.direction not in ("denoise", "noise"):
            raise UserError(f"unknown direction {self.direction!r}: use 'denoise' or 'noise'")
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"batch_size = {self.batch_size}: use at least 1, or None to have it chosen")


@dataclass(eq=False)
class Swept:
    """The runs' own metrics, and for each edit that ran how far it moved its pair's base run (a mean over samples)."""

    clean: Float[np.ndarray, "pairs"]
    corrupted: Float[np.ndarray, "pairs"]
    pair: list[int] = field(default_factory=list)
    component: list[int] = field(default_factory=list)
    group: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    change: list[float] = field(default_factory=list)


def sweep(
    model: LanguageModel,
    components: Sequence[Component],
    pairs: Sequence[PromptPair],
    wanted: Callable[[int, int], list[Wanted] | None],
    options: Options,
) -> Swept:
    """Run every edit that `wanted(component, pair)` asks for (None: every unit alone) and that changes something."""
    corruption = options.corruption
    if corruption is not None and corruption.at_component and len(components) > 1:
        raise UserError(
            f"{corruption} corrupts what is patched, so patch one component at a time, as in "
            "[patch_components(model, one, pairs, corruption=…) for one in components]"
        )
    samples = 1 if corruption is None else corruption.samples
    if corruption is not None:  # the corrupted prompts are not read
        pairs = [replace(pair, corrupted=pair.clean) for pair in pairs]
    whole = choose_positions(model, batch_pairs(model, pairs, align=options.align), options.positions)
    lengths = whole.clean.lengths.unique().tolist()
    if options.each_position and options.align == "equal" and len(lengths) > 1:
        log.warning(
            "prompts have %d to %d tokens, so a position is not the same token in all of them, and its effect is a "
            "share of the gap of all pairs: for a map of positions give pairs of one form", lengths[0], lengths[-1],
        )  # fmt: skip
    swept = Swept(np.zeros(len(pairs)), np.zeros(len(pairs)))
    at_once = _pairs_at_once(components, whole.clean.input_ids.shape[1] * samples, options.batch_size)
    shown = options.progress is True
    ways: Checked = {}
    bar = tqdm(desc=f"{options.direction} {components[0].site}", unit="edit", disable=not shown, leave=False)
    done = options.progress if callable(options.progress) else bar.update
    with bar:
        for part in same_length_batches(whole, at_once):
            part = part.rows([row for row in range(len(part)) for _ in range(samples)])
            clean, corrupted = _two_runs(model, components, part, options)
            if needs_clean_logits(options.metric):
                part = replace(part, clean_logits=clean.logits)
            base, source = (corrupted, clean) if options.direction == "denoise" else (clean, corrupted)
            base.checked = ways
            _check_padding(model, base)
            index = part.index.tolist()
            ends = [_values(options.metric, run.logits, part) for run in (clean, corrupted)]
            np.add.at(swept.clean, index, ends[0] / samples)
            np.add.at(swept.corrupted, index, ends[1] / samples)
            own = ends[1] if options.direction == "denoise" else ends[0]
            assert part.where is not None
            for number, component in enumerate(components):
                changes = between(component, base, source, part.where)
                asked = [wanted(number, pair) for pair in index]
                planned = _plan(changes, asked, base.tokens, options.each_position)
                measure = _Measure(component, base, part, changes, planned, options.metric)
                batches = _batches(model, base, planned, options.metric, options.batch_size)
                for batch, values in chain.from_iterable(map(measure, batches)):
                    rows = planned.row[batch]
                    swept.pair += [index[row] for row in rows.tolist()]
                    swept.component += [number] * len(rows)
                    swept.group += planned.group[batch].tolist()
                    swept.position += own_positions(base.tokens, rows, planned.first[batch], options.align).tolist()
                    swept.change += ((values - own[rows.numpy()]) / samples).tolist()
                    done(len(rows))
    return swept


def _two_runs(
    model: LanguageModel, components: Sequence[Component], part: PairBatch, options: Options
) -> tuple[Run, Run]:
    sites = {component.site for component in components}
    denoise = options.direction == "denoise"
    if options.corruption is None and part.clean.input_ids.numel() <= SMALL:
        both = (torch.cat(two) for two in zip(*(vars(t).values() for t in (part.clean, part.corrupted)), strict=True))
        return Run(model, Tokens(*both), sites).split(len(part))
    clean = Run(model, part.clean, sites, keep_cache=not denoise)
    if options.corruption is None:
        return clean, Run(model, part.corrupted, sites, keep_cache=denoise)
    return clean, options.corruption.run(model, part, components, clean, denoise)


def _check_padding(model: LanguageModel, run: Run) -> None:
    """See that the most padded prompt of a batch gives what it gives alone.

    Raises:
        UserError: it does not: the model does not know padding.
    """
    if not run.tokens.padded:
        return
    row = int(run.tokens.lengths.argmin())
    alone = Tokens(*(t[row : row + 1, run.tokens.attention_mask[row].bool()] for t in vars(run.tokens).values()))
    with torch.no_grad():
        expected = model.next_logits(alone)[0].float()
    worst = float((run.logits[row].float() - expected).abs().max())
    if worst > (1e-3 if model.dtype == torch.float32 else 0.1) * float(expected.abs().max()):
        raise UserError(
            f"{model.name} computes something else where a prompt is padded (logits differ by {worst:.1e}): give pairs "
            "of equal length (align='equal'), or one pair at a time"
        )


def _pairs_at_once(components: Sequence[Component], width: int, batch_size: int | None) -> int:
    """Pairs whose runs are kept at a time, so that their latents fit."""
    largest = max(component.units for component in components)
    return max(1, min(batch_size or 64, PAIRS_MEMORY // (16 * width * max(largest, 1024))))


@dataclass(frozen=True, eq=False)
class _Plan:
    """Edits to run, in order of the first column they change; `entries[starts[e]:starts[e + 1]]` are those of one."""

    row: Int[Tensor, "edits"]
    group: Int[Tensor, "edits"]
    first: Int[Tensor, "edits"]
    starts: Int[Tensor, "bounds"]
    entries: Int[Tensor, "entries"]

    def __len__(self) -> int:
        return len(self.row)


def _plan(changes: Changes, asked: Sequence[list[Wanted] | None], tokens: Tokens, each_position: bool) -> _Plan:
    row, pos, unit = (t.cpu().numpy() for t in (changes.row, changes.pos, changes.unit))
    bounds = np.searchsorted(row, np.arange(len(asked) + 1))
    width = tokens.input_ids.shape[1]
    entries, groups = [], []
    member = np.zeros(int(unit.max()) + 1 if len(unit) else 1, dtype=bool)
    for number, (mine, length) in enumerate(zip(asked, tokens.lengths.tolist(), strict=True)):
        here = np.arange(bounds[number], bounds[number + 1])
        if mine is None:
            entries.append(here)
            groups.append(unit[here])
            continue
        for group, (units, position) in enumerate(mine):
            ids = np.array([u for u in units if u < len(member)], dtype=np.int64)
            member[ids] = True
            found = here[member[unit[here]]]
            member[ids] = False
            if position is not None:
                if not -length <= position < length:
                    raise UserError(f"position {position} is out of range: the prompt has {length} tokens")
                found = found[pos[found] == (width if position < 0 else width - length) + position]
            entries.append(found)
            groups.append(np.full(len(found), group))
    entry = np.concatenate(entries) if entries else np.zeros(0, dtype=np.int64)
    number_of = np.concatenate(groups) if groups else np.zeros(0, dtype=np.int64)
    apart = pos[entry] if each_position else np.zeros(len(entry), dtype=np.int64)
    keys, inverse = np.unique(np.stack([row[entry], number_of, apart]), axis=1, return_inverse=True)
    edit, n = inverse.reshape(-1), keys.shape[1]
    first = np.full(n, np.iinfo(np.int64).max)
    np.minimum.at(first, edit, pos[entry])
    order = np.lexsort((keys[1], keys[0], first))
    place = np.empty(n, dtype=np.int64)
    place[order] = np.arange(n)
    sorted_entries = np.argsort(place[edit], kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(place[edit], minlength=n))])
    return _Plan(*(torch.from_numpy(np.ascontiguousarray(a, dtype=np.int64)) for a in (
        keys[0][order], keys[1][order], first[order], starts, entry[sorted_entries])))  # fmt: skip


def _batches(
    model: LanguageModel, base: Run, planned: _Plan, metric: Metric, batch_size: int | None
) -> Iterator[slice]:
    """Split the edits, which stand in order of their first column, into batches that start at one column.

    An edit that starts later runs some columns for nothing; it joins the batch where that costs less than a pass of
    its own would.
    """
    first = planned.first.tolist()
    (tokens, most), worth = _at_once(model, base.width, metric), _pass_worth(model)
    start = 0
    while start < len(first):
        columns = base.width - first[start]
        limit = batch_size or max(1, min(tokens // columns, most))
        end, wasted = start, 0
        while end < len(first) and end - start < limit:
            after = end
            while after < len(first) and first[after] == first[end]:
                after += 1
            wasted += (min(after, start + limit) - end) * (first[end] - first[start])
            if wasted > worth:
                break
            end = min(after, start + limit)
        yield slice(start, end)
        start = end


def _pass_worth(model: LanguageModel) -> int:
    """Tokens through a block that cost as much as starting one more pass: reading its weights, and Python's share."""
    if model.device.type != "cpu":
        return 4096
    block = sum(p.numel() for p in model.layout.blocks[0].parameters())
    return 10 + 10_000_000 // max(block, 1)


def _at_once(model: LanguageModel, width: int, metric: Metric) -> tuple[int, int]:
    """Most tokens and most edits of one batch, so that a block's activations and scores, and logits, fit."""
    config = model.config.get_text_config()
    wide = getattr(config, "intermediate_size", None) or 4 * model.d_model
    memory = CPU_MEMORY
    if model.device.type == "cuda":
        memory = int(0.4 * torch.cuda.mem_get_info(model.device)[0])
    a_token = 4 * (4 * wide + 12 * model.d_model + 3 * getattr(config, "num_attention_heads", 1) * width)
    an_edit = 8 * model.d_model * width + bytes_per_logit(metric) * int(config.vocab_size)
    return memory // a_token, max(1, memory // an_edit)


@dataclass(frozen=True, eq=False)
class _Measure:
    """The metric under edits of one component in one batch of pairs."""

    component: Component
    base: Run
    part: PairBatch
    changes: Changes
    planned: _Plan
    metric: Metric

    def __call__(self, batch: slice) -> Iterator[tuple[slice, Float[np.ndarray, "edits"]]]:
        """Values of a batch of the plan; in two halves where it does not fit the device's memory."""
        try:
            yield batch, self._values(batch)
        except torch.OutOfMemoryError as error:
            middle = (batch.start + batch.stop) // 2
            if middle == batch.start:
                raise UserError(
                    f"one edit of a prompt of {self.base.width} tokens does not fit the memory of "
                    f"{self.base.model.device}: shorten the prompts, or spread the model (device_map)"
                ) from error
            log.info("%d edits at a time do not fit the device's memory: trying half", batch.stop - batch.start)
            yield from self(slice(batch.start, middle))
            yield from self(slice(middle, batch.stop))

    def _values(self, batch: slice) -> Float[np.ndarray, "edits"]:
        plan, changes = self.planned, self.changes
        rows, first = plan.row[batch], int(plan.first[batch.start])
        bounds = plan.starts[batch.start : batch.stop + 1]
        entries = plan.entries[int(bounds[0]) : int(bounds[-1])].to(changes.row.device)
        edit = torch.repeat_interleave(torch.arange(len(rows)), bounds.diff()).to(entries.device)
        old = self.base.values[self.component.site]
        change = torch.zeros(
            len(rows),
            self.base.width - first,
            old.shape[-1],
            device=old.device,
            dtype=torch.promote_types(old.dtype, torch.float32),
        )
        for some, of in zip(entries.split(VECTORS), edit.split(VECTORS), strict=True):
            change.index_put_((of, changes.pos[some] - first), changes.vectors(some).to(change.dtype), accumulate=True)
        asking, only = self.part.rows(rows.tolist()), None
        if answers_only(self.metric):
            only, places = torch.unique(torch.stack([asking.answer, asking.counter]), return_inverse=True)
            asking = replace(asking, answer=places[0], counter=places[1])
        values = _values(self.metric, self.base.resume(self.component.site, rows, first, change, only), asking)
        if np.isnan(values).any():
            example = asking.pairs[int(np.isnan(values).argmax())].example
            raise UserError(f"the metric is NaN for pair {example!r} under an edit at {self.component.site}")
        return values


def _values(metric: Metric, logits: Tensor, batch: PairBatch) -> Float[np.ndarray, "batch"]:
    return checked(metric, logits, batch).double().cpu().numpy()
