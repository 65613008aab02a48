"""Exact activation patching: the effect of every edit, each run through the model's own later blocks."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from saepatch.components import (
    Changes,
    Component,
    Edit,
    Heads,
    Patchable,
    Stream,
    as_components,
    between,
)
from saepatch.controls import DRAWS, control_sets
from saepatch.corruptions import Corruption
from saepatch.dictionaries import Dictionary
from saepatch.effects import Direction, Effects
from saepatch.errors import UserError
from saepatch.metrics import ANSWERS_ONLY, Metric, logit_difference, metric_name
from saepatch.models import LanguageModel, Tokens
from saepatch.positions import Positions
from saepatch.prompts import PairBatch, PromptPair, batch_pairs, same_length_batches
from saepatch.quality import latent_statistics
from saepatch.resume import Run
from saepatch.sites import Site
from saepatch.splicing import line_up, whole_prompt

log = logging.getLogger(__name__)

Group = tuple[int, ...]
Align = Literal["equal", "right"]
# Units that are patched together, and where: at one position, or (None) at all that were chosen.
Wanted = tuple[Group, int | None]
CPU_MEMORY = 2**28  # bytes that the activations of one batch of edits may take; more is no faster
PAIRS_MEMORY = 2**29  # bytes that the latents of one batch of pairs may take


def patch_latents(
    model: LanguageModel,
    dictionaries: Dictionary | Sequence[Dictionary],
    pairs: Sequence[PromptPair],
    latents: Sequence[int | Sequence[int]] | Mapping[Site, Sequence[int | Sequence[int]]] | None = None,
    positions: Positions = "all",
    each_position: bool = False,
    direction: Direction = "denoise",
    metric: Metric = logit_difference,
    corruption: Corruption | None = None,
    controls: int = DRAWS,
    min_gap: float = 1e-2,
    align: Align = "equal",
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Effects:
    """Patch each latent, or group of latents, between the runs of every pair, each alone, error term kept.

    Only edits that change something are run; they resume after the site, at the first position they change, many at a
    time (`saepatch.resume`). Equal to one plain hooked forward an edit, to float rounding.

    Args:
        latents: Single latents, or groups that are patched together; by site where there are several dictionaries.
            None: every latent, each alone.
        positions: Where; at all of them together, or with `each_position` at each alone.
        direction: "denoise" patches clean values into the corrupted run, "noise" the other way round.
        corruption: What makes the corrupted run; None: the pair's corrupted prompt.
        controls: Random sets, and sets matched on firing frequency and size, patched beside each given group, their
            frequencies counted in the pairs' own prompts. Where every latent is swept the others are its controls.
        min_gap: Pairs whose clean and corrupted metric differ by less have no normalised effect.
        align: As for `batch_pairs`.
        batch_size: Edits at a time; None: as many as pay and fit.
        seed: Of the controls.

    Raises:
        UserError: unknown latents, an unknown direction, or pairs that do not line up.
    """
    several = [dictionaries] if isinstance(dictionaries, Dictionary) else list(dictionaries)
    options = _Options(direction, metric, corruption, positions, each_position, align, batch_size, progress)
    if latents is None:
        return _effects(model, as_components(model, several), pairs, None, options, min_gap)
    if not isinstance(latents, Mapping):
        if len(several) > 1:
            raise UserError("several dictionaries: give the latents by site, as in {site: [3, 17]}")
        latents = {several[0].site: latents}
    by_site = {dictionary.site: dictionary for dictionary in several}
    if unknown := [str(site) for site in latents if site not in by_site]:
        raise UserError(f"latents for {unknown[0]}, but dictionaries are for {', '.join(map(str, by_site))}")
    edits: list[Edit] = []
    for site, given in latents.items():
        edits += _with_controls(model, by_site[site], pairs, _groups(given, by_site[site]), controls, seed)
    return _effects(model, as_components(model, several), pairs, edits, options, min_gap)


def patch_components(
    model: LanguageModel,
    components: Patchable | Sequence[Patchable],
    pairs: Sequence[PromptPair],
    edits: Sequence[Edit] | None = None,
    positions: Positions = "all",
    each_position: bool = False,
    direction: Direction = "denoise",
    metric: Metric = logit_difference,
    corruption: Corruption | None = None,
    min_gap: float = 1e-2,
    align: Align = "equal",
    batch_size: int | None = None,
    progress: bool = False,
) -> Effects:
    """The same sweep over anything that `saepatch.components` holds: whole sites, heads, error terms, directions.

    `edits` names what is patched together; None: every unit of every component, each alone. Arguments are those of
    `patch_latents`.
    """
    found = as_components(model, components)
    options = _Options(direction, metric, corruption, positions, each_position, align, batch_size, progress)
    return _effects(model, found, pairs, edits, options, min_gap)


def patch_streams(
    model: LanguageModel, pairs: Sequence[PromptPair], stream: str = "resid_post", **options: Any
) -> Effects:
    """Patch the whole value of a stream at every layer and position, each alone: the classic layer × position map."""
    sites = [Stream(site) for site in model.layout.sites if site.stream == stream]
    if not sites:
        model.layout.module(Site(0, stream))
    return patch_components(model, sites, pairs, **({"each_position": True} | options))


def patch_heads(model: LanguageModel, pairs: Sequence[PromptPair], **options: Any) -> Effects:
    """Patch the output z of every attention head at every layer: the classic layer × head map."""
    return patch_components(model, [Heads(layer, model.n_heads) for layer in range(model.n_layers)], pairs, **options)


def patch_edits(
    model: LanguageModel,
    components: Patchable | Sequence[Patchable],
    pairs: Sequence[PromptPair],
    edits: Sequence[tuple[int, Edit]],
    positions: Positions = "all",
    direction: Direction = "denoise",
    metric: Metric = logit_difference,
    corruption: Corruption | None = None,
    align: Align = "equal",
    batch_size: int | None = None,
    progress: bool = False,
) -> Float[np.ndarray, "edits"]:
    """The metric under a list of edits, each of one pair (named by its index): what verifying a screen runs.

    The base run's own value where an edit changes nothing.
    """
    found = as_components(model, components)
    options = _Options(direction, metric, corruption, positions, False, align, batch_size, progress)
    places = _places(found, [edit for _, edit in edits])
    asked: dict[tuple[int, int], list[int]] = {}
    for number, ((pair, _), place) in enumerate(zip(edits, places, strict=True)):
        asked.setdefault((pair, place), []).append(number)

    def wanted(component: int, pair: int) -> list[Wanted]:
        return [(edits[i][1].units, edits[i][1].position) for i in asked.get((pair, component), ())]

    swept = _sweep(model, found, pairs, wanted, options)
    base = swept.corrupted if direction == "denoise" else swept.clean
    values = np.array([base[pair] for pair, _ in edits])
    for pair, component, group, value in zip(swept.pair, swept.component, swept.group, swept.change, strict=True):
        values[asked[pair, component][group]] += value
    return values


def _groups(latents: Sequence[int | Sequence[int]], dictionary: Dictionary) -> list[Group]:
    groups = [(int(g),) if isinstance(g, (int, np.integer)) else tuple(int(i) for i in g) for g in latents]
    if not groups or not all(groups):
        raise UserError("there are no latents to patch: give at least one, and no empty group")
    for group in groups:
        dictionary.check_ids(group)
    return groups


def _with_controls(
    model: LanguageModel,
    dictionary: Dictionary,
    pairs: Sequence[PromptPair],
    groups: Sequence[Group],
    draws: int,
    seed: int,
) -> list[Edit]:
    """An edit for each group, and random and matched sets beside it; as large a set as is alive where one is not."""
    edits = [Edit(dictionary.site, group) for group in groups]
    if not draws:
        return edits
    dictionary.check(model)
    statistics = latent_statistics(
        model, dictionary, model.tokenize([t for p in pairs for t in (p.clean, p.corrupted)])
    )
    alive = int(statistics.alive.sum())
    for group in groups:
        k = min(len(group), alive - int(statistics.alive[list(group)].sum()))
        if k < len(group):
            log.warning("%d latents have no controls of their size: only %d others are alive", len(group), k)
            continue
        for role, sets in zip(("random", "matched"), control_sets(group, k, statistics, seed, draws), strict=True):
            edits += [Edit(dictionary.site, drawn, role=role, beside=group) for drawn in sets]
    return edits


@dataclass(frozen=True)
class _Options:
    direction: Direction
    metric: Metric
    corruption: Corruption | None
    positions: Positions
    each_position: bool
    align: Align
    batch_size: int | None
    progress: bool

    def __post_init__(self) -> None:
        if self.direction not in ("denoise", "noise"):
            raise UserError(f"unknown direction {self.direction!r}: use 'denoise' or 'noise'")
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"batch_size = {self.batch_size}: use at least 1, or None to have it chosen")


def _places(components: Sequence[Component], edits: Sequence[Edit]) -> list[int]:
    """Which component each edit is of."""
    known = {(component.site, component.kind): number for number, component in enumerate(components)}
    places = []
    for edit in edits:
        if (edit.site, edit.kind) not in known:
            raise UserError(f"an edit of {edit.kind} at {edit.site}, which is not among what is swept")
        place = known[edit.site, edit.kind]
        if not edit.units or not all(0 <= unit < components[place].units for unit in edit.units):
            raise UserError(f"{edit.kind} {edit.units} at {edit.site}: there are {components[place].units}, from 0")
        places.append(place)
    return places


def _effects(
    model: LanguageModel,
    components: Sequence[Component],
    pairs: Sequence[PromptPair],
    edits: Sequence[Edit] | None,
    options: _Options,
    min_gap: float,
) -> Effects:
    """Sweep, and lay what was found out as pairs × edits."""
    places = None if edits is None else _places(components, edits)
    numbers = [[i for i, place in enumerate(places or ()) if place == c] for c in range(len(components))]

    def wanted(component: int, pair: int) -> list[Wanted] | None:
        return None if edits is None else [(edits[i].units, edits[i].position) for i in numbers[component]]

    swept = _sweep(model, components, pairs, wanted, options)
    pair, component, group, position = (
        np.array(column, dtype=np.int64) for column in (swept.pair, swept.component, swept.group, swept.position)
    )
    if edits is None:
        axis = [Edit(c.site, (unit,), kind=c.kind) for c in components for unit in range(c.units)]
        column = np.cumsum([0, *(c.units for c in components)])[component] + group
    else:
        axis = list(edits)
        column = np.array([numbers[c][g] for c, g in zip(component, group, strict=True)], dtype=np.int64)
    if options.each_position:
        keys, column = np.unique(np.stack([column, position]), axis=1, return_inverse=True)
        axis = [replace(axis[number], position=int(at)) for number, at in keys.T]
        column = column.reshape(-1)
    base = swept.corrupted if options.direction == "denoise" else swept.clean
    patched = np.repeat(base[:, None], len(axis), axis=1)
    ran = np.zeros(patched.shape, dtype=bool)
    np.add.at(patched, (pair, column), swept.change)
    ran[pair, column] = True
    positions = options.positions
    return Effects(
        direction=options.direction,
        metric=metric_name(options.metric),
        positions=positions if isinstance(positions, str) else repr(positions),
        edits=tuple(axis),
        examples=tuple(pair.example or str(number) for number, pair in enumerate(pairs)),
        clean=swept.clean,
        corrupted=swept.corrupted,
        patched=patched,
        ran=ran,
        min_gap=min_gap,
    )


@dataclass(eq=False)
class _Swept:
    """The runs' own metrics, and for each edit that ran how far it moved its pair's base run (a mean over samples)."""

    clean: Float[np.ndarray, "pairs"]
    corrupted: Float[np.ndarray, "pairs"]
    pair: list[int] = field(default_factory=list)
    component: list[int] = field(default_factory=list)
    group: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    change: list[float] = field(default_factory=list)


def _sweep(
    model: LanguageModel,
    components: Sequence[Component],
    pairs: Sequence[PromptPair],
    wanted: Callable[[int, int], list[Wanted] | None],
    options: _Options,
) -> _Swept:
    """Run every edit that `wanted(component, pair)` asks for (None: every unit alone) and that changes something."""
    corruption = options.corruption
    if corruption is not None and corruption.at_component and len(components) > 1:
        raise UserError(f"{corruption} corrupts what is patched, so patch one component at a time")
    samples = 1 if corruption is None else corruption.samples
    whole = batch_pairs(model, pairs, align=options.align)
    swept = _Swept(np.zeros(len(pairs)), np.zeros(len(pairs)))
    at_once = _pairs_at_once(components, whole.clean.input_ids.shape[1] * samples, options.batch_size)
    bar = tqdm(desc=f"{options.direction} {components[0].site}", unit="edit", disable=not options.progress, leave=False)
    with bar:
        for part in same_length_batches(whole, at_once):
            part = part.rows([row for row in range(len(part)) for _ in range(samples)])
            clean, corrupted = _two_runs(model, components, part, options)
            base, source = (corrupted, clean) if options.direction == "denoise" else (clean, corrupted)
            where = whole_prompt(model, base.tokens).select(options.positions) & line_up(base.tokens, source.tokens)
            index = part.index.tolist()
            for values, run in ((swept.clean, clean), (swept.corrupted, corrupted)):
                np.add.at(values, index, _values(options.metric, run.logits, part) / samples)
            own = _values(options.metric, base.logits, part)
            for number, component in enumerate(components):
                changes = between(component, base, source, where)
                asked = [wanted(number, pair) for pair in index]
                planned = _plan(changes, asked, base.tokens, options.each_position)
                batches = _batches(model, component, base, planned, options.batch_size)
                for edits, values in _run(component, base, part, changes, planned, batches, options.metric):
                    rows = planned.row[edits]
                    swept.pair += [index[row] for row in rows.tolist()]
                    swept.component += [number] * len(edits)
                    swept.group += planned.group[edits].tolist()
                    swept.position += _own_positions(base.tokens, rows, planned.first[edits], options.align)
                    swept.change += ((values - own[rows]) / samples).tolist()
                    bar.update(len(edits))
    return swept


def _two_runs(
    model: LanguageModel, components: Sequence[Component], part: PairBatch, options: _Options
) -> tuple[Run, Run]:
    sites = {component.site for component in components}
    denoise = options.direction == "denoise"
    clean = Run(model, part.clean, sites, keep_cache=not denoise)
    if options.corruption is None:
        return clean, Run(model, part.corrupted, sites, keep_cache=denoise)
    return clean, options.corruption.run(model, part, components, clean, denoise)


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
    model: LanguageModel, component: Component, base: Run, planned: _Plan, batch_size: int | None
) -> Iterator[slice]:
    """Split the edits, which stand in order of their first column, into batches that start at one column.

    An edit that starts later runs some columns for nothing; it joins the batch where that costs less than a pass of
    its own would.
    """
    first = planned.first.tolist()
    most, worth = _tokens_at_once(model, base.width), _pass_worth(model)
    start = 0
    while start < len(first):
        columns = base.width - first[start]
        limit = batch_size or max(1, most // columns)
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


def _tokens_at_once(model: LanguageModel, width: int) -> int:
    """Tokens of one batch of edits, so that a block's activations, its keys and values and its scores fit."""
    config = model.config.get_text_config()
    wide = getattr(config, "intermediate_size", None) or 4 * model.d_model
    a_token = 4 * (4 * wide + 12 * model.d_model + 3 * model.n_heads * width)
    memory = CPU_MEMORY
    if model.device.type == "cuda":
        memory = int(0.4 * torch.cuda.mem_get_info(model.device)[0])
    return max(width, memory // a_token)


def _run(
    component: Component,
    base: Run,
    part: PairBatch,
    changes: Changes,
    planned: _Plan,
    batches: Iterator[slice],
    metric: Metric,
) -> Iterator[tuple[Int[Tensor, "edits"], Float[np.ndarray, "edits"]]]:
    """Indices into the plan, and the metric under these edits."""
    for batch in batches:
        edits = torch.arange(batch.start, batch.stop)
        rows, first = planned.row[batch], int(planned.first[batch.start])
        entries = planned.entries[int(planned.starts[batch.start]) : int(planned.starts[batch.stop])]
        counts = planned.starts[batch.start + 1 : batch.stop + 1] - planned.starts[batch]
        entries = entries.to(changes.row.device)
        vectors = changes.vectors(entries)
        change = vectors.new_zeros(len(rows), base.width - first, vectors.shape[-1])
        edit = torch.repeat_interleave(edits - batch.start, counts).to(entries.device)
        change.index_put_((edit, changes.pos[entries] - first), vectors, accumulate=True)
        asking = part.rows(rows.tolist())
        only = None
        if metric in ANSWERS_ONLY:
            only, places = torch.unique(torch.stack([asking.answer, asking.counter]), return_inverse=True)
            asking = replace(asking, answer=places[0], counter=places[1])
        values = _values(metric, base.resume(component.site, rows, first, change, only), asking)
        if np.isnan(values).any():
            example = asking.pairs[int(np.isnan(values).argmax())].example
            raise UserError(f"the metric is NaN for pair {example!r} under an edit at {component.site}")
        yield edits, values


def _values(metric: Metric, logits: Tensor, batch: PairBatch) -> Float[np.ndarray, "batch"]:
    return metric(logits, batch).double().cpu().numpy()


def _own_positions(
    tokens: Tokens, rows: Int[Tensor, "edits"], columns: Int[Tensor, "edits"], align: Align
) -> list[int]:
    """Columns as positions in the prompt: from 0, or back from -1 where prompts are aligned from the right."""
    width = tokens.input_ids.shape[1]
    if align == "right":
        return (columns - width).tolist()
    padding = (width - tokens.lengths).cpu()
    return (columns - padding[rows]).tolist()
