"""Heat maps of a run, and the table of its edits that their cells lead to."""

from collections.abc import Sequence

import numpy as np

from saepatch.model.sites import Site
from saepatch.pages.left import Left
from saepatch.report import Cell, Choice, HeatMap, Link, Section, Simple, Table
from saepatch.runs.parts import EditKey

ROWS = 24  # units of a map by position
COLUMNS = 64  # positions of a map
EDITS = 600  # rows of the table of edits, of a direction
EACH = 4  # of them, of each cell of a map
COLOURS = (
    "Colours are relative to the largest cell of this map, orange towards the source run, blue away from it; "
    "–: nothing was run there, for nothing differs."
)
PAIRS = 3  # pairs that have maps of their own

Values = np.ndarray  # of each edit


def maps(left: Left) -> Section | None:
    """Maps of the run's edits in each direction, over all pairs and for the first few alone."""
    by_position = any(key.position.isdigit() for key in left.changes.keys)
    heads = any(key.component == "head" for key in left.changes.keys)
    if not by_position and not heads:
        return None
    options: list[tuple[str, list[Simple]]] = []
    for direction in left.directions:
        own = left.own(direction)
        there = np.zeros(len(left.changes.keys), dtype=bool)
        there[own] = True
        drawn = _maps(left, own, left.effects, there, None, direction)
        count = len(left.pairs.examples)
        options.append((f"{direction}, all {count} pairs" if count > 1 else direction, drawn))
    shown = left.reading["prompts"]["first"] if left.reading else []
    if len(left.pairs.examples) > 1:
        for pair, prompts in enumerate(shown[:PAIRS]):
            for direction in left.directions:
                effects, there = left.effects_of(pair)
                drawn = _maps(left, left.own(direction), effects, there, pair, direction)
                options.append((f"{direction}, pair {prompts['example']} alone", drawn))
    return Section("Where: maps", _text(left), [Choice("Show", [option for option in options if option[1]])])


def _text(left: Left) -> str:
    kind = "estimated effects" if left.is_screen else "effects, each edit run exactly"
    text = (
        f"Shares of the gap in {left.metric}: {kind}. 0 is the base run, 1 the source run; nothing is clipped. "
        "`denoise` patches clean values into the corrupted run, `noise` corrupted values into the clean run. "
        "A click on a cell (or Enter; arrow keys move) shows the edits that stand there, over all pairs."
    )
    if left.reading and len(left.pairs.examples) > 1 and None in left.reading["prompts"]["shared"]["clean"]:
        text += (
            "\n\nOver the columns stand the clean prompt's tokens, below them the corrupted one's where they differ "
            "(`=`: the same). `…` is a position whose token differs between pairs: what stands in such a column is a "
            "mean over different tokens, and a pair alone says more."
        )
    elif left.reading:
        text += "\n\nOver the columns stand the clean prompt's tokens, below them the corrupted one's (`=`: the same)."
    return text


def _maps(
    left: Left, own: Sequence[int], effects: Values, there: Values, pair: int | None, direction: str
) -> list[Simple]:
    """The maps of some edits that have these effects."""
    own = [number for number in own if there[number]]
    placed = [number for number in own if left.changes.keys[number].position.isdigit()]
    whole = [number for number in own if left.changes.keys[number].component == "head" and number not in set(placed)]
    found: list[Simple] = []
    if placed:
        found += _by_site(left, placed, effects, pair, direction)
        found += _by_unit(left, placed, effects, pair)
    if whole:
        found.append(_by_head(left, whole, effects))
    return found


def _columns(left: Left, own: Sequence[int], effects: Values) -> list[int]:
    """The positions of a map: all, or of very many those with the largest effects."""
    largest: dict[int, float] = {}
    for number in own:
        position = int(left.changes.keys[number].position)
        largest[position] = max(largest.get(position, 0.0), abs(float(np.nan_to_num(effects[number]))))
    return sorted(sorted(largest, key=lambda position: -largest[position])[:COLUMNS])


def _whole_prompt(left: Left, columns: list[int], pair: int | None) -> list[int]:
    """All positions of the prompts, where they are known and not too many."""
    if left.reading is None:
        return columns
    prompts = left.reading["prompts"]
    length = len((prompts["shared"] if pair is None else prompts["first"][pair])["clean"])
    return list(range(max(length, columns[-1] + 1))) if length <= COLUMNS else columns


def _by_site(left: Left, own: Sequence[int], effects: Values, pair: int | None, direction: str) -> list[Simple]:
    """Component and site against position; of many units the sum of their effects."""
    keys = left.changes.keys
    columns = _whole_prompt(left, _columns(left, own, effects), pair)
    kinds = sorted({keys[n].component for n in own if keys[n].component != "head"})
    rows = sorted(
        {(Site.parse(keys[n].site), keys[n].component) for n in own if keys[n].component in kinds},
        key=lambda r: (r[1] == "error", r[0].layer, str(r)),
    )
    if not rows:
        return []
    values = np.full((len(rows), len(columns)), np.nan)
    place, column = {row: i for i, row in enumerate(rows)}, {position: i for i, position in enumerate(columns)}
    for number in own:
        _, site, kind, _, _, position = keys[number]
        row = place.get((Site.parse(site), kind))
        if row is not None and int(position) in column:
            cell = row, column[int(position)]
            values[cell] = np.nan_to_num(values[cell]) + effects[number]
    summed = "latent" in kinds
    names, below = left.tokens_at(columns, pair)
    caption = (
        "Latents of a cell: the sum of their effects one by one, "
        + ("which are estimates. " if left.is_screen else "which is no measurement of patching them together. ")
        if summed
        else ""
    )
    title = f"{'Latents' if summed else ' and '.join(kinds).capitalize()} by site and position: {direction}"
    return [
        HeatMap(
            title,
            [f"{site} {'' if kind in ('latent', 'stream') else kind}".strip() for site, kind in rows],
            names,
            values.tolist(),
            caption + COLOURS,
            value_format=_format(values),
            columns_below=below,
            keys=[[_cell_key(direction, str(site), kind, position) for position in columns] for site, kind in rows],
        )
    ]


def _cell_key(direction: str, site: str, kind: str, position: object) -> str:
    return f"{direction}/{site}/{kind}/{position}"


def _unit_key(key: EditKey) -> str:
    return f"{key.direction}/{key.site}/{key.component}:{key.latent}/{key.position.replace(' ', '')}"


def _by_unit(left: Left, own: Sequence[int], effects: Values, pair: int | None) -> list[Simple]:
    """The units with the largest effects against position."""
    keys = left.changes.keys
    units = [number for number in own if keys[number].component in ("latent", "head")]
    largest: dict[tuple[str, str, str], float] = {}
    for number in units:
        unit = (keys[number].site, keys[number].component, keys[number].latent)
        largest[unit] = max(largest.get(unit, 0.0), abs(float(np.nan_to_num(effects[number]))))
    rows = sorted(largest, key=lambda unit: -largest[unit])[:ROWS]
    if not rows:
        return []
    kept = set(rows)
    units = [number for number in units if (keys[number].site, keys[number].component, keys[number].latent) in kept]
    columns = _columns(left, units, effects)
    column = {position: i for i, position in enumerate(columns)}
    row = {unit: i for i, unit in enumerate(rows)}
    values = np.full((len(rows), len(columns)), np.nan)
    cells = [["" for _ in columns] for _ in rows]
    for number in units:
        key = keys[number]
        if int(key.position) in column:
            at = row[key.site, key.component, key.latent], column[int(key.position)]
            values[at] = effects[number]
            cells[at[0]][at[1]] = _unit_key(key)
    names, below = left.tokens_at(columns, pair)
    kind = "latents" if rows[0][1] == "latent" else "heads"
    return [
        HeatMap(
            f"The {len(rows)} {kind} with the largest effects, by position: {keys[units[0]].direction}",
            [f"{site} {'head ' if kind == 'head' else ''}{unit}" for site, kind, unit in rows],
            names,
            values.tolist(),
            COLOURS,
            value_format=_format(values),
            columns_below=below,
            keys=cells,
            anchors=[left.anchors.get((site, unit), "") for site, _, unit in rows],
        )
    ]


def _by_head(left: Left, own: Sequence[int], effects: Values) -> HeatMap:
    """Layer against head."""
    keys = left.changes.keys
    layers = sorted({Site.parse(keys[number].site).layer for number in own})
    count = 1 + max(int(keys[number].latent) for number in own)
    values = np.full((len(layers), count), np.nan)
    cells = [["" for _ in range(count)] for _ in layers]
    for number in own:
        at = layers.index(Site.parse(keys[number].site).layer), int(keys[number].latent)
        values[at] = effects[number]
        cells[at[0]][at[1]] = _unit_key(keys[number])
    return HeatMap(
        f"Attention heads: {keys[own[0]].direction}",
        [f"layer {layer}" for layer in layers],
        [str(head) for head in range(count)],
        values.tolist(),
        COLOURS,
        column_label="head",
        value_format=_format(values),
        keys=cells,
    )


def _format(values: Values) -> str:
    return ".2f" if np.nanmax(np.abs(values), initial=0.0) >= 0.1 else ".3f"


# The table


def edits(left: Left) -> Section:
    """The edits with the largest effects of each direction, those of every cell of a map among them."""
    blocks: list[Simple] = []
    for direction in left.directions:
        numbers = _largest(left, direction)
        every = len(left.own(direction))
        blocks.append(_table(left, direction, numbers, every))
    text = (
        "Effects are ratios of means over all pairs, with 95 % bootstrap intervals over pairs. "
        + ("They are estimates from gradients. " if left.is_screen else "")
        + "An edit that is nothing in a pair counts as no effect there."
    )
    return Section("Edits", text, blocks)


def _largest(left: Left, direction: str) -> list[int]:
    own = left.own(direction)
    size = np.abs(np.nan_to_num(left.effects))
    ranked = sorted(own, key=lambda number: -size[number])
    kept = dict.fromkeys(ranked[: EDITS // 3])
    seen: dict[tuple[str, str, str], int] = {}
    for number in ranked:
        cell = (left.changes.keys[number].site, left.changes.keys[number].component, left.changes.keys[number].position)
        seen[cell] = seen.get(cell, 0) + 1
        if len(kept) < EDITS and seen[cell] <= EACH:
            kept[number] = None
    return sorted(kept, key=lambda number: -float(np.nan_to_num(left.effects[number])))


def _table(left: Left, direction: str, numbers: Sequence[int], every: int) -> Table:
    keys, changed = left.changes.keys, left.changes.counts
    positions = sorted({int(keys[number].position) for number in numbers if keys[number].position.isdigit()})
    names = dict(zip(map(str, positions), _tokens(left, positions)))
    tested = any(keys[number] in left.q for number in numbers)
    columns = ["site", "unit", "position", "effect", "pairs changed", *(["q"] if tested else [])]
    rows: list[list[Cell]] = []
    for number, interval in zip(numbers, left.intervals(numbers)):
        _, site, component, _, latent, position = keys[number]
        row: list[Cell] = [site, _unit(left, site, component, latent), names.get(position, position), interval]
        rows.append([*row, int(changed[number]), *([left.q.get(keys[number])] if tested else [])])
    caption = (
        f"{direction}: {len(numbers)} of {every:,} edits, the largest and the {EACH} largest of each site and position."
    )
    if len(numbers) == every:
        caption = f"{direction}: all {every:,} edits."
    if tested:
        caption += " q: false discovery rate over all edits of the direction, said of those on top of the summary."
    return Table(
        columns,
        rows,
        caption,
        {"effect": ".3f", "pairs changed": "d", **({"q": ".2g"} if tested else {})},
        [
            [_cell_key(direction, keys[n].site, keys[n].component, keys[n].position), _unit_key(keys[n])]
            if _mapped(keys[n])
            else []
            for n in numbers
        ],
    )


def _mapped(key: EditKey) -> bool:
    return key.position.isdigit() or key.component == "head"


def _tokens(left: Left, positions: Sequence[int]) -> list[str]:
    names, below = left.tokens_at(positions, None if len(left.pairs.examples) > 1 or not left.reading else 0)
    names = [name.removesuffix(" …") for name in names]
    if below is None:
        return names
    return [name if other == "=" else f"{name} / {other}" for name, other in zip(names, below)]


def _unit(left: Left, site: str, component: str, latent: str) -> Cell:
    if component != "latent":
        return f"{component} {latent}".strip()
    anchor = left.anchors.get((site, latent))
    return Link(latent, anchor) if anchor else latent


def positions_of(left: Left) -> str:
    """Where edits act, in words."""
    settings = left.run.settings
    each = left.is_screen or settings.get("each_position")
    return f"{settings['positions']}, {'each alone' if each else 'together'}"
