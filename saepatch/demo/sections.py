"""Parts of the demo's report beside its figures: the overview, maps, single latents, texts by activation."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from saepatch.demo.looks import BY_POSITION, Maps
from saepatch.measure.effects import Effects, Map
from saepatch.pages.cards import latent_card
from saepatch.pages.charts import INTERVALS, cell, head_map
from saepatch.pages.left import anchor
from saepatch.pages.maps import COLOURS
from saepatch.reading.cards import Card as Reading
from saepatch.report import (
    Cell,
    Choice,
    Facts,
    Headline,
    HeatMap,
    LineChart,
    Link,
    Notices,
    Section,
    Series,
    Simple,
    Table,
    token_text,
)
from saepatch.report.text import number

if TYPE_CHECKING:
    from saepatch.demo.run import Findings
    from saepatch.demo.stages import Steering
    from saepatch.records.statistics import Interval

EACH = 4  # latents of each cell of a map
KEPT = 0.95  # of the cross-entropy, that a dictionary should keep
CHANCE = 0.05  # more than this from random latents is worth a warning


def overview(found: "Findings") -> Section:
    """The headline figures with their intervals, and what to know before trusting them."""
    p, r = found.patching, found.restoration
    sixteen = p.denoise.sizes.index(16)
    items = {
        "16 latents, each prompt's own: logit difference restored": _said(p.denoise.top[sixteen]),
        "16 latents, one set for all prompts": _said(p.fixed.top[sixteen]),
        "16 random live latents": _said(p.denoise.random[sixteen]),
        f"jailbroken requests refused, {len(r.latents)} latents restored": _said(r.rates["restored"], ".0%"),
        "… nothing restored": _said(r.rates["jailbroken"], ".0%"),
        "… as many random latents": _said(r.rates["random"], ".0%"),
    }
    return Section("What came out", "95 % intervals in brackets.", [Headline(items), Notices(_notices(found))])


def _said(interval: "Interval", spec: str = ".3f") -> str:
    return f"{number(interval.value, spec)} [{number(interval.low, spec)}, {number(interval.high, spec)}]"


def _notices(found: "Findings") -> list[str]:
    p, r = found.patching, found.restoration
    sixteen = p.denoise.sizes.index(16)
    told = [
        "What the model does was planted in it: these figures say that the tools find what is there, and nothing about "
        "large models."
    ]
    own, fixed = p.denoise.top[sixteen].value, p.fixed.top[sixteen].value
    if fixed < 0.5 * own:
        told.append(
            f"Latents ranked on the very prompts they are patched in restore {own:.0%}, one set ranked on other names "
            f"{fixed:.0%}: most of the effect belongs to single names, not to the task."
        )
    if r.rates["harmless_clamped"].value > CHANCE:
        told.append(
            f"Setting the {len(r.latents)} latents to their mean over refused requests makes the model refuse "
            f"{r.rates['harmless_clamped'].value:.0%} of harmless ones: they carry the refusal, not what is harmful."
        )
    if r.share_of_active >= 0.5:
        told.append(
            f"{len(r.latents)} latents are few of the dictionary, but {r.share_of_active:.1f} times as many as are on "
            "at one position."
        )
    for quality in found.quality:
        if quality.ce_recovered < KEPT:
            told.append(f"The dictionary at {quality.site} keeps only {quality.ce_recovered:.1%} of the cross-entropy.")
        if quality.alive_share < 0.5:
            told.append(
                f"{1 - quality.alive_share:.0%} of the latents at {quality.site} fire nowhere in held-out text."
            )
    for name in ("random", "matched", "differing"):
        if r.rates[name].value > CHANCE:
            told.append(
                f"Restoring {name} latents refuses {r.rates[name].value:.0%}, too: the effect is not theirs alone."
            )
    return told


def where(found: "Findings") -> Section:
    """Maps of both directions."""
    maps = found.maps
    options: list[tuple[str, Sequence[Simple]]] = []
    for direction in maps.streams:
        options.append((direction, _maps(found, maps, direction)))
    names = token_text(maps.group[0].answer), token_text(maps.group[0].counter)
    text = (
        f"Streams and latents over the {len(maps.group)} pairs of the largest group of one form, so that a position "
        "means the same in all of them; heads at all positions together, over more pairs. Over the columns stand the "
        "clean prompt's tokens, below them the corrupted one's (`=`: the same); `…` differs from pair to pair. The "
        f"first pair asks for {names[0]}, and for {names[1]} in its corrupted prompt. `denoise` patches clean values "
        "into the corrupted run, `noise` corrupted values into the clean run. 0 is the base run, 1 the source run.\n\n"
        "A click on a cell (or Enter; arrow keys move) shows what stands there: of a layer and position at "
        f"least the {EACH} latents of that layer's dictionary that move the answer most when each is patched there "
        "alone. What they do alone does not add up to the whole layer: its error term, and all latents together, are "
        "patched with it."
    )
    return Section("Where: maps", text, [Choice("Show", options)])


def _maps(found: "Findings", maps: Maps, direction: str) -> list[Simple]:
    streams, latents = maps.streams[direction], maps.latents[direction]  # type: ignore[index]
    cards = {(card.site, str(card.latent)): anchor(card) for card in found.cards}
    site = found.patching.site
    best = [edit.units[0] for edit in found.patching.singles[0].top(BY_POSITION)]
    chosen = sorted(
        (i for i, edit in enumerate(latents.edits) if str(edit.site) == site and edit.units[0] in best),
        key=lambda i: best.index(latents.edits[i].units[0]),
    )
    shown = only(latents, chosen)
    units = [name.removeprefix(f"{site} ") for name in Map.of(shown).labels]
    group = f"n = {len(maps.group)} pairs."
    return [
        _by_position(f"Layer × position: {direction}", streams, maps, f"A layer's whole output, {group}"),
        _heads(f"Layer × head: {direction}", maps, direction, found.model.n_heads),
        _by_position(
            f"Latents of {site} × position: {direction}",
            shown,
            maps,
            f"The {len(units)} latents that restore most alone at all positions, here at one, {group}",
            units,
            [cards.get((site, unit), "") for unit in units],
        ),
        _behind(maps, direction, latents, chosen, cards),
    ]


def only(effects: Effects, chosen: Sequence[int]) -> Effects:
    """Some edits of a sweep."""
    edits, picked = tuple(effects.edits[i] for i in chosen), list(chosen)
    return replace(effects, edits=edits, patched=effects.patched[:, picked], ran=effects.ran[:, picked])


def of_each_cell(effects: Effects) -> list[int]:
    """Of every site and position the edits with the largest effects."""
    cells: dict[tuple[str, int | None], list[int]] = {}
    for i in np.argsort(-np.abs(effects.ratios()), kind="stable"):
        cells.setdefault((str(effects.edits[i].site), effects.edits[i].position), []).append(int(i))
    return [i for cell in cells.values() for i in cell[:EACH]]


def _behind(
    maps: Maps, direction: str, latents: Effects, chosen: Sequence[int], cards: Mapping[tuple[str, str], str]
) -> Table:
    """The edits that the cells of the maps lead to."""
    names = [f"{at} {'…' if clean is None else token_text(clean)}" for at, clean in enumerate(maps.clean)]
    rows: list[list[Cell]] = []
    keys: list[list[str]] = []
    numbers = [i for i in dict.fromkeys([*of_each_cell(latents), *chosen]) if latents.ran[:, i].any()]
    ratios = latents.ratios()
    for i in sorted(numbers, key=lambda i: -ratios[i]):
        edit = latents.edits[i]
        site, unit, at = str(edit.site), str(edit.units[0]), edit.position or 0
        anchor_of = cards.get((site, unit))
        pairs = int(latents.ran[:, i].sum())
        rows.append([site, Link(unit, anchor_of) if anchor_of else unit, names[at], cell(latents.of(i)), pairs])
        keys.append([_key(direction, site, at), _key(direction, site, unit, at)])
    heads: Effects = maps.heads[direction]  # type: ignore[index]
    for i, edit in enumerate(heads.edits):
        pairs = int(heads.ran[:, i].sum())
        rows.append([str(edit.site), f"head {edit.units[0]}", "all", cell(heads.of(i)), pairs])
        keys.append([_key(direction, str(edit.site), edit.units[0])])
    caption = (
        f"{direction}: what the cells of these maps lead to. Of {len(latents.edits):,} latents at one position, each "
        f"run exactly and alone, those in the last map and the {EACH} largest of each layer and position, n = "
        f"{len(maps.group)} pairs; every head, n = {maps.head_pairs}. {INTERVALS} What is nothing in a pair counts as "
        "no effect there. Latents without a link have no card here: `saepatch latent SITE:LATENT` shows one."
    )
    return Table(
        ["site", "unit", "position", "effect", "pairs changed"],
        rows,
        caption,
        {"effect": ".3f", "pairs changed": "d"},
        keys,
    )


def _key(direction: str, *place: object) -> str:
    return "/".join(map(str, (direction, *place)))


def _by_position(
    title: str,
    effects: Effects,
    maps: Maps,
    caption: str,
    rows: Sequence[str] | None = None,
    anchors: Sequence[str] | None = None,
) -> HeatMap:
    cells = Map.of(effects)
    # A row is a layer's whole stream, or one latent: labelled "resid_post.3" or "resid_post.3 115".
    keys = [[_key(effects.direction, *label.split(), at) for at in range(len(maps.clean))] for label in cells.labels]
    values = np.full((len(cells.labels), len(maps.clean)), np.nan)
    values[:, list(cells.positions)] = cells.values
    above, below = [
        ["…" if token is None else token_text(token) for token in side] for side in (maps.clean, maps.corrupted)
    ]
    return HeatMap(
        title,
        cells.labels if rows is None else rows,
        [f"{at} {name}" for at, name in enumerate(above)],
        values.tolist(),
        f"{caption} {COLOURS}",
        value_format=".2f" if np.nanmax(np.abs(values), initial=0) >= 0.1 else ".3f",
        columns_below=["=" if one == other and one != "…" else other for one, other in zip(above, below)],
        keys=keys,
        anchors=anchors,
    )


def _heads(title: str, maps: Maps, direction: str, n_heads: int) -> HeatMap:
    caption = f"Each head's output z at all positions, n = {maps.head_pairs} pairs."
    effects: Effects = maps.heads[direction]  # type: ignore[index]
    drawn = head_map(title, effects, n_heads, caption)
    layers = sorted({edit.site.layer for edit in effects.edits})
    names = {edit.site.layer: str(edit.site) for edit in effects.edits}
    return replace(drawn, keys=[[_key(direction, names[layer], head) for head in range(n_heads)] for layer in layers])


def cards(found: "Findings") -> Section:
    """Single latents: those that patch, restore and steer."""
    known = {anchor(card) for card in found.cards}
    first = found.cards[0]
    text = (
        f"Of the latents that patch, restore and steer most: where they fire in {first.texts:,} texts "
        f"({first.tokens:,} tokens) that the dictionary was not trained on, what their direction writes, which others "
        "are like them."
    )
    return Section("Latents", text, [latent_card(card, known, _role(found, card)) for card in found.cards])


def _role(found: "Findings", card: Reading) -> list[Simple]:
    """What the latent did in this run."""
    told: dict[str, str] = {}
    p, r = found.patching, found.restoration
    if card.site == p.site:
        for effects in p.singles:
            told[f"{effects.direction} alone"] = f"{_said(effects.of(card.latent))} of the logit difference"
    if card.site == r.site and card.latent in r.latents:
        told["restored under jailbreaks"] = f"number {r.latents.index(card.latent) + 1} of {len(r.latents)}"
    for steering in found.steering:
        ten = steering.of("top10").sets[0]
        if card.site == steering.site and card.latent in ten:
            told[f"steers towards {steering.concept}"] = f"number {ten.index(card.latent) + 1} of {len(ten)}"
    return [Facts(told)] if told else []


def trade_off(s: "Steering") -> LineChart:
    """Success against fluency, for every strength that was tried."""
    series = []
    for name in dict.fromkeys(condition.name for condition in s.tried):
        mine = [condition for condition in s.tried if condition.name == name]
        series.append(Series(name, [one.perplexity for one in mine], [one.success for one in mine]))
    strengths = ", ".join(number(one.strength) for one in s.tried if one.name == s.tried[0].name)
    return LineChart(
        "Success against perplexity",
        "perplexity of the continuations under the unsteered model",
        "share of prompts that show the concept",
        series,
        f"On `tune`; along a line the strength rises: {strengths}.",
        log_x=True,
        y_range=(0.0, 1.0),
        y_format=".0%",
    )
