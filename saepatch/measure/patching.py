"""Exact activation patching: the effect of every edit, each run through the model's own later blocks."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.components import Component, Direction, Edit, Heads, Patchable, Stream, as_components
from saepatch.engine.corruptions import Corruption
from saepatch.engine.metrics import Metric, logit_difference, metric_name
from saepatch.engine.sweep import Align, Options, Progress, Swept, Wanted, sweep
from saepatch.errors import UserError
from saepatch.measure.controls import DRAWS, Group, with_controls
from saepatch.measure.effects import Effects
from saepatch.model.language_model import LanguageModel
from saepatch.model.positions import Positions
from saepatch.model.sites import Site

log = logging.getLogger(__name__)


def patch_latents(
    model: LanguageModel,
    dictionaries: Dictionary | Sequence[Dictionary],
    pairs: Sequence[PromptPair],
    latents: Sequence[int | Sequence[int]] | Mapping[Site | str, Sequence[int | Sequence[int]]] | None = None,
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
    progress: Progress = False,
) -> Effects:
    """Patch each latent, or group of latents, between the runs of every pair, each alone, error term kept.

    Only edits that change something are run; they resume after the site, at the first position they change, many at a
    time (`saepatch.engine.kept_run`). Equal to one plain hooked forward an edit, to float rounding.

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
        progress: Show a bar; or a function that is told how many edits were just done.

    Raises:
        UserError: unknown latents, an unknown direction, or pairs that do not line up.
    """
    several = [dictionaries] if isinstance(dictionaries, Dictionary) else list(dictionaries)
    options = Options(direction, metric, corruption, positions, each_position, align, batch_size, progress)
    if latents is None:
        return _effects(model, as_components(model, several), pairs, None, options, min_gap)
    if not isinstance(latents, Mapping):
        if len(several) > 1:
            raise UserError("several dictionaries: give the latents by site, as in {site: [3, 17]}")
        latents = {several[0].site: latents}
    if controls < 0:
        raise UserError(f"controls = {controls}: use 0 or more sets")
    chosen = {Site.parse(site): given for site, given in latents.items()}
    by_site = {dictionary.site: dictionary for dictionary in several}
    if unknown := [str(site) for site in chosen if site not in by_site]:
        raise UserError(f"latents for {unknown[0]}, but dictionaries are for {', '.join(map(str, by_site))}")
    edits: list[Edit] = []
    for site, given in chosen.items():
        edits += with_controls(model, by_site[site], pairs, _groups(given, by_site[site]), controls, seed)
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
    progress: Progress = False,
) -> Effects:
    """The same sweep over anything that `saepatch.engine.components` holds: whole sites, heads, error terms,
    directions.

    `edits` names what is patched together; None: every unit of every component, each alone. Arguments are those of
    `patch_latents`.
    """
    found = as_components(model, components)
    options = Options(direction, metric, corruption, positions, each_position, align, batch_size, progress)
    return _effects(model, found, pairs, edits, options, min_gap)


def patch_streams(
    model: LanguageModel,
    pairs: Sequence[PromptPair],
    stream: str = "resid_post",
    positions: Positions = "all",
    each_position: bool = True,
    direction: Direction = "denoise",
    metric: Metric = logit_difference,
    corruption: Corruption | None = None,
    min_gap: float = 1e-2,
    align: Align = "equal",
    batch_size: int | None = None,
    progress: Progress = False,
) -> Effects:
    """Patch the whole value of a stream at every layer and position, each alone: the classic layer × position map."""
    sites = [Stream(site) for site in model.layout.of_stream(stream)]
    return patch_components(
        model,
        sites,
        pairs,
        None,
        positions,
        each_position,
        direction,
        metric,
        corruption,
        min_gap,
        align,
        batch_size,
        progress,
    )


def patch_heads(
    model: LanguageModel,
    pairs: Sequence[PromptPair],
    positions: Positions = "all",
    each_position: bool = False,
    direction: Direction = "denoise",
    metric: Metric = logit_difference,
    corruption: Corruption | None = None,
    min_gap: float = 1e-2,
    align: Align = "equal",
    batch_size: int | None = None,
    progress: Progress = False,
) -> Effects:
    """Patch the output z of every attention head at every layer: the classic layer × head map."""
    heads = [Heads(site.layer, model.n_heads) for site in model.layout.of_stream("z")]
    return patch_components(
        model,
        heads,
        pairs,
        None,
        positions,
        each_position,
        direction,
        metric,
        corruption,
        min_gap,
        align,
        batch_size,
        progress,
    )


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
    progress: Progress = False,
) -> Float[np.ndarray, "edits"]:
    """The metric under a list of edits, each of one pair (named by its index): what verifying a screen runs.

    The base run's own value where an edit changes nothing.
    """
    options = Options(direction, metric, corruption, positions, False, align, batch_size, progress)
    swept, change, _ = _listed(model, as_components(model, components), pairs, edits, options)
    base = swept.corrupted if direction == "denoise" else swept.clean
    return base[[pair for pair, _ in edits]] + change


def patch_by_pair(
    model: LanguageModel,
    components: Patchable | Sequence[Patchable],
    pairs: Sequence[PromptPair],
    edits: Sequence[Sequence[Edit]],
    positions: Positions = "all",
    direction: Direction = "denoise",
    metric: Metric = logit_difference,
    corruption: Corruption | None = None,
    min_gap: float = 1e-2,
    align: Align = "equal",
    batch_size: int | None = None,
    progress: Progress = False,
) -> list[Effects]:
    """One sweep in which every pair has edits of its own; the effects of each pair."""
    options = Options(direction, metric, corruption, positions, False, align, batch_size, progress)
    flat = [(number, edit) for number, own in enumerate(edits) for edit in own]
    swept, change, ran = _listed(model, as_components(model, components), pairs, flat, options)
    base = swept.corrupted if direction == "denoise" else swept.clean
    bounds = np.cumsum([0, *map(len, edits)])
    return [
        Effects(
            direction=direction,
            metric=metric_name(metric),
            positions=positions if isinstance(positions, str) else repr(positions),
            edits=tuple(own),
            examples=(pairs[number].example or str(number),),
            clean=swept.clean[[number]],
            corrupted=swept.corrupted[[number]],
            patched=base[number] + change[None, bounds[number] : bounds[number + 1]],
            ran=ran[None, bounds[number] : bounds[number + 1]],
            min_gap=min_gap,
            corruption=_name(corruption),
            rounding=_rounding(model),
        )
        for number, own in enumerate(edits)
    ]


def _listed(
    model: LanguageModel,
    components: Sequence[Component],
    pairs: Sequence[PromptPair],
    edits: Sequence[tuple[int, Edit]],
    options: Options,
) -> tuple[Swept, Float[np.ndarray, "edits"], Bool[np.ndarray, "edits"]]:
    """Run listed edits of listed pairs: what was swept, how far each edit moved its base run, and which ran."""
    asked: dict[tuple[int, int], list[int]] = {}
    for number, ((pair, _), place) in enumerate(zip(edits, _places(components, [e for _, e in edits]), strict=True)):
        if not 0 <= pair < len(pairs):
            raise UserError(f"an edit of pair {pair}: there are {len(pairs)} pairs, from 0")
        asked.setdefault((pair, place), []).append(number)

    def wanted(component: int, pair: int) -> list[Wanted]:
        return [(edits[i][1].units, edits[i][1].position) for i in asked.get((pair, component), ())]

    swept = sweep(model, components, pairs, wanted, options)
    places = [asked[p, c][g] for p, c, g in zip(swept.pair, swept.component, swept.group, strict=True)]
    change, ran = np.zeros(len(edits)), np.zeros(len(edits), dtype=bool)
    np.add.at(change, places, swept.change)
    ran[places] = True
    return swept, change, ran


def _groups(latents: Sequence[int | Sequence[int]], dictionary: Dictionary) -> list[Group]:
    listed = latents.tolist() if hasattr(latents, "tolist") else latents  # a tensor or array of ids
    groups = [(int(g),) if isinstance(g, (int, np.integer)) else tuple(int(i) for i in g) for g in listed]
    if not groups or not all(groups):
        raise UserError("there are no latents to patch: give at least one, and no empty group")
    for group in groups:
        dictionary.check_ids(group)
        if len(set(group)) != len(group):
            raise UserError(f"latents {list(group)} name one twice: give each once")
    return groups


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
        if len(set(edit.units)) != len(edit.units):
            raise UserError(f"{edit.kind} {edit.units} at {edit.site} name one twice: give each once")
        places.append(place)
    return places


def _effects(
    model: LanguageModel,
    components: Sequence[Component],
    pairs: Sequence[PromptPair],
    edits: Sequence[Edit] | None,
    options: Options,
    min_gap: float,
) -> Effects:
    """Sweep, and lay what was found out as pairs × edits."""
    places = None if edits is None else _places(components, edits)
    numbers = [[i for i, place in enumerate(places or ()) if place == c] for c in range(len(components))]

    def wanted(component: int, pair: int) -> list[Wanted] | None:
        return None if edits is None else [(edits[i].units, edits[i].position) for i in numbers[component]]

    swept = sweep(model, components, pairs, wanted, options)
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
        axis, column = _apart(axis, column, position)
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
        corruption=_name(options.corruption),
        rounding=_rounding(model),
    )


def _name(corruption: Corruption | None) -> str:
    return "" if corruption is None else str(corruption)


def _rounding(model: LanguageModel) -> float:
    """Share of the mean gap that rounding alone may move a metric by."""
    return 1e-4 if model.dtype == torch.float32 else 2e-2


def _apart(
    edits: Sequence[Edit], number: Int[np.ndarray, "ran"], position: Int[np.ndarray, "ran"]
) -> tuple[list[Edit], Int[np.ndarray, "ran"]]:
    """One edit a position where it ran, and each run's place among them.

    A control that changes nothing where its group acts counts as run there, without effect.
    """
    ran = list(zip(number.tolist(), position.tolist(), strict=True))
    controls: dict[tuple[Site, str, Group], list[int]] = {}
    for i, edit in enumerate(edits):
        if edit.beside:
            controls.setdefault((edit.site, edit.kind, edit.beside), []).append(i)
    keys = set(ran)
    for i, at in ran:
        if not edits[i].beside:
            keys |= {(control, at) for control in controls.get((edits[i].site, edits[i].kind, edits[i].units), ())}
    place = {key: column for column, key in enumerate(sorted(keys))}
    return [replace(edits[i], position=at) for i, at in place], np.array([place[key] for key in ran], dtype=np.int64)
