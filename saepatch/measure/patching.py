"""Exact activation patching: every edit is run through the model's own later blocks."""

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
from jaxtyping import Bool, Float, Int
from typing_extensions import Unpack

from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.latent_set import LatentSet
from saepatch.dictionaries.loading import Given, as_dictionaries
from saepatch.engine.components import Component, Edit, EditPart, Heads, Key, Patchable, Stream, as_components
from saepatch.engine.edited_runs import Piece, Stage, Wanted
from saepatch.engine.options import SweepKeywords, SweepOptions, with_keywords
from saepatch.engine.sweep import Swept, sweep
from saepatch.errors import UserError
from saepatch.measure.controls import DRAWS, Group, with_controls
from saepatch.measure.results.effects import Effects, precision_of
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site

# A latent, several patched together, or several at each of some sites.
Together = int | Sequence[int] | Mapping[Site, Sequence[int]] | Mapping[str, Sequence[int]] | LatentSet
Wished = Sequence[Together] | Mapping[Site | str, Sequence[int | Sequence[int]]] | LatentSet


def patch_latents(
    model: LanguageModel,
    dictionaries: Given | Sequence[Given],
    pairs: Sequence[PromptPair],
    latents: Wished | None = None,
    controls: int = DRAWS,
    seed: int = 0,
    options: SweepOptions | None = None,
    **keywords: Unpack[SweepKeywords],
) -> Effects:
    """Patch each latent, or group of latents, separately between the runs of every pair, keeping the error term.

    Only edits that change something are run; they resume after the site, at the first position they change, many at a
    time (`saepatch.engine.passes.kept_run`). Results equal one hooked forward pass per edit up to rounding. See `Edit`
    for how the sites of a group over several sites interact.

    Args:
        dictionaries: One or several; a `sae_lens.SAE` is wrapped (`wrap_sae`), at the site named in its metadata.
        latents: Single latents, or groups to patch together. For several dictionaries, by site, as in
            `{site: [3, 17]}`; or groups over several sites, as in `[{site: [281], other: [5, 7]}]`. The groups of
            a `LatentSet` are patched one by one, a `LatentSet` in a list as one group. None: every latent, one by one.
        controls: Number of random sets, and of sets matched in firing frequency and size, for each given group, drawn
            site by site with frequencies measured on the pairs' prompts. In a sweep of every latent, the other latents
            are the controls.
        seed: Seed of the controls.
        options: Options that sweeps share; each is also a keyword, as in `patch_latents(…, direction="noise")`.

    Raises:
        UserError: a latent or an option is unknown, or pairs are not aligned.
    """
    chosen = with_keywords(options or SweepOptions(), keywords)
    several = as_dictionaries(dictionaries)
    if latents is None:
        return _effects(model, as_components(model, several), pairs, None, chosen)
    if controls < 0:
        raise UserError(f"controls = {controls}: use 0 or more sets")
    groups = _groups(latents, several)
    components = as_components(model, several)
    return _effects(model, components, pairs, with_controls(model, several, pairs, groups, controls, seed), chosen)


def patch_components(
    model: LanguageModel,
    components: Patchable | Sequence[Patchable],
    pairs: Sequence[PromptPair],
    edits: Sequence[Edit] | None = None,
    options: SweepOptions | None = None,
    **keywords: Unpack[SweepKeywords],
) -> Effects:
    """The same sweep over any `saepatch.engine.components`: streams, heads, error terms, directions.

    `edits` are groups of units to patch together, at one site or several; None: every unit of every component, one by
    one.

    Raises:
        UserError: a component does not fit the model, or an edit names unknown units; otherwise as `patch_latents`.
    """
    return _effects(
        model, as_components(model, components), pairs, edits, with_keywords(options or SweepOptions(), keywords)
    )


def patch_streams(
    model: LanguageModel,
    pairs: Sequence[PromptPair],
    stream: str = "resid_post",
    options: SweepOptions | None = None,
    **keywords: Unpack[SweepKeywords],
) -> Effects:
    """Patch the whole value of a stream at every layer and position separately: the classic layer × position map.

    With the keyword `each_position=False`, all positions are patched together.
    """
    sites = [Stream(site) for site in model.layout.of_stream(stream)]
    chosen = with_keywords(options or SweepOptions(each_position=True), keywords)
    return _effects(model, as_components(model, sites), pairs, None, chosen)


def patch_heads(
    model: LanguageModel,
    pairs: Sequence[PromptPair],
    options: SweepOptions | None = None,
    **keywords: Unpack[SweepKeywords],
) -> Effects:
    """Patch the output z of every attention head at every layer: the classic layer × head map."""
    heads = [Heads(site.layer, model.n_heads) for site in model.layout.of_stream("z")]
    return _effects(model, as_components(model, heads), pairs, None, with_keywords(options or SweepOptions(), keywords))


def patch_edits(
    model: LanguageModel,
    components: Patchable | Sequence[Patchable],
    pairs: Sequence[PromptPair],
    edits: Sequence[tuple[int, Edit]],
    options: SweepOptions | None = None,
    **keywords: Unpack[SweepKeywords],
) -> Float[np.ndarray, "edits"]:
    """The metric under a list of edits, each of one pair (given by its index); used to verify a screen.

    It is the base run's metric where an edit changes nothing.
    """
    chosen = with_keywords(options or SweepOptions(), keywords)
    swept, change, _ = _listed(model, as_components(model, components), pairs, edits, chosen)
    base = swept.corrupted if chosen.denoises else swept.clean
    return base[[pair for pair, _ in edits]] + change


def patch_by_pair(
    model: LanguageModel,
    components: Patchable | Sequence[Patchable],
    pairs: Sequence[PromptPair],
    edits: Sequence[Sequence[Edit]],
    options: SweepOptions | None = None,
    **keywords: Unpack[SweepKeywords],
) -> list[Effects]:
    """One sweep with separate edits for every pair; returns the effects of each pair."""
    chosen = with_keywords(options or SweepOptions(), keywords)
    flat = [(number, edit) for number, own in enumerate(edits) for edit in own]
    swept, change, ran = _listed(model, as_components(model, components), pairs, flat, chosen)
    base = swept.corrupted if chosen.denoises else swept.clean
    bounds = np.cumsum([0, *map(len, edits)])
    return [
        Effects(
            edits=tuple(own),
            examples=(pairs[number].example or str(number),),
            clean=swept.clean[[number]],
            corrupted=swept.corrupted[[number]],
            patched=base[number] + change[None, bounds[number] : bounds[number + 1]],
            ran=ran[None, bounds[number] : bounds[number + 1]],
            corruption=_name(chosen),
            precision=precision_of(model.hf)[0],
            rounding=_rounding(model, swept),
            tokens=base_tokens(model, [pairs[number]], chosen),
            **chosen.labels,
        )
        for number, own in enumerate(edits)
    ]


def _listed(
    model: LanguageModel,
    components: Sequence[Component],
    pairs: Sequence[PromptPair],
    edits: Sequence[tuple[int, Edit]],
    options: SweepOptions,
) -> tuple[Swept, Float[np.ndarray, "edits"], Bool[np.ndarray, "edits"]]:
    """Run listed edits of listed pairs: the sweep, each edit's change of the base run's metric, and which edits ran."""
    if options.each_position:
        raise UserError("each_position=True, but listed edits have their own positions: leave it out")
    pieces = [_pieces(components, edit) for _, edit in edits]
    stages = _stages(pieces)
    asked: dict[tuple[int, Stage], list[int]] = {}
    for number, (pair, _) in enumerate(edits):
        if not 0 <= pair < len(pairs):
            raise UserError(f"an edit of pair {pair}: use 0 to {len(pairs) - 1}")
        asked.setdefault((pair, _stage(pieces[number])), []).append(number)

    def wanted(stage: int, pair: int) -> list[Wanted]:
        return [pieces[number] for number in asked.get((pair, stages[stage]), ())]

    swept = sweep(model, components, pairs, stages, wanted, options)
    places = [asked[p, stages[s]][g] for p, s, g in zip(swept.pair, swept.stage, swept.group, strict=True)]
    change, ran = np.zeros(len(edits)), np.zeros(len(edits), dtype=bool)
    np.add.at(change, places, swept.change)
    ran[places] = True
    return swept, change, ran


def _groups(latents: Wished, dictionaries: Sequence[Dictionary]) -> list[dict[Site, Group]]:
    """The groups to patch together, each by site.

    Raises:
        UserError: there are none, a group is empty or contains a latent twice, or a latent or site is unknown.
    """
    if hasattr(latents, "tolist"):  # a tensor or array of ids
        latents = latents.tolist()
    known = {dictionary.site: dictionary for dictionary in dictionaries}
    if isinstance(latents, LatentSet):
        named = latents.at(list(known))
        groups = [{site: ids} for site in named for ids in named.groups(site) or (_every(known, site),)]
    elif isinstance(latents, Mapping):
        groups = [{Site.parse(site): _several(ids)} for site, given in latents.items() for ids in _alone(given or ())]
    else:
        sites = [group if isinstance(group, Mapping) else {_only(dictionaries): group} for group in latents]
        groups = [
            {Site.parse(site): _every(known, site) if ids is None else _several(ids) for site, ids in group.items()}
            for group in sites
        ]
    if not groups or not all(group and all(group.values()) for group in groups):
        raise UserError("there are no latents to patch: give at least one, and no empty group")
    for site, ids in (item for group in groups for item in group.items()):
        if site not in known:
            raise UserError(f"latents for {site}, but dictionaries are for {', '.join(map(str, known))}: use these")
        known[site].check_ids(ids)
        if len(set(ids)) != len(ids):
            raise UserError(f"latents {list(ids)} contain a latent twice: give each once")
    return groups


def _alone(listed: Sequence[int | Sequence[int]]) -> Sequence[int | Sequence[int]]:
    return listed.tolist() if hasattr(listed, "tolist") else listed  # a tensor or array of ids


def _several(group: int | Sequence[int]) -> Group:
    return (int(group),) if isinstance(group, (int, np.integer)) else tuple(int(i) for i in group)


def _every(known: Mapping[Site, Dictionary], site: Site | str) -> Group:
    """All latents of a site, where a `LatentSet` names none."""
    dictionary = known.get(Site.parse(site))
    return tuple(range(0 if dictionary is None else dictionary.d_sae))


def _only(dictionaries: Sequence[Dictionary]) -> Site:
    if len(dictionaries) > 1:
        raise UserError("several dictionaries: give the latents by site, as in {site: [3, 17]}")
    return dictionaries[0].site


def _pieces(components: Sequence[Component], edit: Edit) -> Wanted:
    """An edit in terms of the numbers of its components.

    Raises:
        UserError: a component or unit is not swept, a unit is named twice, or parts write the same tensor twice.
    """
    known = {(component.site, component.kind): number for number, component in enumerate(components)}
    pieces = []
    for part in edit.parts:
        if (part.site, part.kind) not in known:
            raise UserError(f"an edit of {part.kind} at {part.site}, which is not swept: add it to the components")
        units = components[known[part.site, part.kind]].units
        if not part.units or not all(0 <= unit < units for unit in part.units):
            raise UserError(f"{part.kind} {part.units} at {part.site}: use 0 to {units - 1}")
        if len(set(part.units)) != len(part.units):
            raise UserError(f"{part.kind} {part.units} at {part.site} contain a unit twice: give each once")
        pieces.append(Piece(known[part.site, part.kind], part.units, part.position, part.frozen))
    _check_apart(edit.parts)
    return tuple(pieces)


def _check_apart(parts: Sequence[EditPart]) -> None:
    """Raises UserError where two parts of an edit write the same thing."""
    for number, part in enumerate(parts):
        for other in parts[:number]:
            if not part.site.same_tensor(other.site):
                continue
            if (part.site, part.kind) == (other.site, other.kind):
                overlap = part.position is None or other.position is None or part.position == other.position
                if both := set(part.units) & set(other.units) if overlap else set():
                    raise UserError(f"{part.kind} {min(both)} at {part.site} is in two parts of one edit: name it once")
            elif {part.kind, other.kind} != {"latent", "error"} or part.site != other.site:
                raise UserError(
                    f"{other.kind} at {other.site} and {part.kind} at {part.site} write the same tensor, so one edit "
                    "cannot contain both (except latents and the error term of one dictionary): make two edits"
                )


def _stage(pieces: Wanted) -> Stage:
    return tuple(sorted({(piece.component, piece.frozen) for piece in pieces}))


def _stages(edits: Sequence[Wanted]) -> list[Stage]:
    """The distinct stages; edits of the same components share one, and single components come first."""
    return sorted(set(map(_stage, edits)), key=lambda stage: (len(stage), stage))


def _effects(
    model: LanguageModel,
    components: Sequence[Component],
    pairs: Sequence[PromptPair],
    edits: Sequence[Edit] | None,
    options: SweepOptions,
) -> Effects:
    """Sweep, and arrange the results as pairs × edits."""
    pieces = [_pieces(components, edit) for edit in edits or ()]
    if options.each_position and any(part.position is not None for edit in edits or () for part in edit.others):
        raise UserError("each_position=True, but parts of an edit have their own positions: leave it out")
    stages: list[Stage] = (
        [((number, False),) for number in range(len(components))] if edits is None else _stages(pieces)
    )
    numbers = [[i for i, edit in enumerate(pieces) if _stage(edit) == stage] for stage in stages]

    def wanted(stage: int, pair: int) -> list[Wanted] | None:
        return None if edits is None else [pieces[i] for i in numbers[stage]]

    swept = sweep(model, components, pairs, stages, wanted, options)
    pair, stage, group, position = (
        np.array(column, dtype=np.int64) for column in (swept.pair, swept.stage, swept.group, swept.position)
    )
    if edits is None:
        axis = [Edit(c.site, (unit,), kind=c.kind) for c in components for unit in range(c.units)]
        column = np.cumsum([0, *(c.units for c in components)])[stage] + group
    else:
        axis = list(edits)
        column = np.array([numbers[s][g] for s, g in zip(stage, group, strict=True)], dtype=np.int64)
    if options.each_position:
        axis, column = _apart(axis, column, position)
    base = swept.corrupted if options.denoises else swept.clean
    patched = np.repeat(base[:, None], len(axis), axis=1)
    ran = np.zeros(patched.shape, dtype=bool)
    np.add.at(patched, (pair, column), swept.change)
    ran[pair, column] = True
    return Effects(
        edits=tuple(axis),
        examples=tuple(pair.example or str(number) for number, pair in enumerate(pairs)),
        clean=swept.clean,
        corrupted=swept.corrupted,
        patched=patched,
        ran=ran,
        corruption=_name(options),
        precision=precision_of(model.hf)[0],
        rounding=_rounding(model, swept),
        tokens=base_tokens(model, pairs, options),
        **options.labels,
    )


def _name(options: SweepOptions) -> str:
    return "" if options.corruption is None else str(options.corruption)


def base_tokens(
    model: LanguageModel, pairs: Sequence[PromptPair], options: SweepOptions
) -> tuple[tuple[str, ...], ...]:
    """The texts of each base prompt's own tokens: those of the prompt that is edited."""
    corrupted = options.denoises and options.corruption is None
    rows = [model.encode(pair.corrupted if corrupted else pair.clean) for pair in pairs]
    texts = {token: text for token in {*chain(*rows)} for text in model.token_texts([token])}
    return tuple(tuple(texts[token] for token in row) for row in rows)


def _rounding(model: LanguageModel, swept: Swept) -> float:
    """Largest change by rounding alone, as a share of the mean gap: from the dtype, and from measured noise."""
    return max(precision_of(model.hf)[1], 2 * swept.noise_share)


def _apart(
    edits: Sequence[Edit], number: Int[np.ndarray, "ran"], position: Int[np.ndarray, "ran"]
) -> tuple[list[Edit], Int[np.ndarray, "ran"]]:
    """One edit per position where it ran, and each run's index among them.

    A control that changes nothing at a position where its group acts counts as run there, with effect 0.
    """
    ran = list(zip(number.tolist(), position.tolist(), strict=True))
    controls: dict[Key, list[int]] = {}
    for i, edit in enumerate(edits):
        if edit.beside:
            controls.setdefault(edit.beside_key, []).append(i)
    keys = set(ran)
    for i, at in ran:
        if not edits[i].beside:
            keys |= {(control, at) for control in controls.get(edits[i].key, ())}
    place = {key: column for column, key in enumerate(sorted(keys))}
    return [edits[i].at(at) for i, at in place], np.array([place[key] for key in ran], dtype=np.int64)
