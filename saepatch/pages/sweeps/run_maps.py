"""Heat maps of a run's effects, over all pairs and for single pairs, and the table of its edits."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from saepatch.model.sites import Site
from saepatch.pages.sweeps.maps import (
    EACH,
    EditTable,
    draw_map,
    edit_table,
    head_map,
    on_one_scale,
    site_key,
    unit_and_position,
    unit_of,
)
from saepatch.pages.sweeps.run_data import RunData
from saepatch.report import Choice, HeatMap, Section, Simple
from saepatch.runs.parts import EditKey

ROWS = 24  # units of a map by position
COLUMNS = 64  # positions of a map
EDITS = 600  # rows per direction of the table of edits
PAIRS = 3  # pairs with separate maps


def maps(run: RunData) -> Section | None:
    """Maps of the run's edits, both directions side by side: over all pairs, and for the first few separately."""
    if not any(key.position.isdigit() or key.component == "head" for key in run.changes.keys):
        return None
    count = len(run.pairs.examples)
    drawn = _twins([_maps(run, run.edits, run.own(direction), None) for direction in run.directions])
    views: list[tuple[str, list[Simple]]] = [(f"all {count} pairs", drawn)]
    shown = run.reading["prompts"]["first"] if run.reading and count > 1 else []
    for pair, prompts in enumerate(shown[:PAIRS]):
        effects, ran = run.effects_of(pair)
        edits = replace(run.edits, effects=effects, intervals=lambda numbers: [None] * len(numbers))
        own = [[number for number in run.own(direction) if ran[number]] for direction in run.directions]
        views.append(
            (f"pair {prompts['example']} alone", _twins([_maps(run, edits, numbers, pair) for numbers in own]))
        )
    views = [view for view in views if view[1]]
    return Section("Where: maps", _text(run), [Choice("Show", views)] if len(views) > 1 else drawn)


def _twins(maps: Sequence[Mapping[str, HeatMap]]) -> list[Simple]:
    """The maps of all directions by kind, so that those of one kind stand side by side; these have one scale."""
    kinds = dict.fromkeys(kind for drawn in maps for kind in drawn)
    return [heat for kind in kinds for heat in on_one_scale([drawn[kind] for drawn in maps if kind in drawn])]


def _text(run: RunData) -> str:
    kind = "estimated effects" if run.is_screen else "effects, each edit run exactly"
    text = (
        f"Shares of the gap in {run.metric}: {kind}. 0 is the base run, 1 the source run; values are not clipped. "
        "`denoise` patches clean values into the corrupted run, `noise` corrupted values into the clean run. "
        "Click a cell (or press Enter; arrow keys move) to list its edits, measured over all pairs."
    )
    if not run.reading:
        return text
    mixed = len(run.pairs.examples) > 1 and None in run.reading["prompts"]["shared"]["clean"]
    text += (
        "\n\nAbove the columns are the clean prompt's tokens, below them the corrupted one's"
        f"{' where they differ' if mixed else ''} (`=`: the same)."
    )
    if mixed:
        text += (
            " `…` marks a position whose token differs between pairs: its column is a mean over different tokens, and "
            "the map of a single pair is more informative."
        )
    return text


def _maps(run: RunData, edits: EditTable, own: Sequence[int], pair: int | None) -> dict[str, HeatMap]:
    """The maps of some edits with their effects, by kind."""
    placed = [number for number in own if edits.keys[number].position.isdigit()]
    heads = [n for n in own if edits.keys[n].component == "head" and not edits.keys[n].position.isdigit()]
    drawn = {"by site": _by_site(run, edits, placed, pair), "by unit": _by_unit(run, edits, placed, pair)}
    if heads:
        drawn["heads"] = head_map(f"Attention heads: {edits.keys[heads[0]].direction}", edits, heads)
    return {kind: chart for kind, chart in drawn.items() if chart is not None}


def _positions(edits: EditTable, numbers: Sequence[int]) -> list[int]:
    """The positions of a map: all, or the `COLUMNS` positions with the largest effects."""
    ranked = dict.fromkeys(int(edits.keys[number].position) for number in edits.by_size(numbers))
    return sorted(list(ranked)[:COLUMNS])


def _by_site(run: RunData, edits: EditTable, own: Sequence[int], pair: int | None) -> HeatMap | None:
    """Component and site against position; effects of several units are summed."""
    numbers = [number for number in own if edits.keys[number].component != "head"]
    places = {_site_of(edits.keys[number]) for number in numbers}
    rows = sorted(places, key=lambda row: (row[1] == "error", row[0].layer, str(row)))
    if not rows:
        return None
    kinds = sorted({kind for _, kind in rows})
    columns, below = run.tokens(pair).columns(_positions(edits, own))
    caption = ""
    if "latent" in kinds:
        caption = "Cells of latents: the sum of their single effects, " + (
            "which are estimates." if run.is_screen else "which does not measure the effect of patching them together."
        )
    what = "Latents" if "latent" in kinds else " and ".join(kinds).capitalize()
    drawn = draw_map(
        f"{what} by site and position: {edits.keys[numbers[0]].direction}",
        edits,
        numbers,
        lambda key: (_site_of(key), int(key.position)),
        {(site, kind): f"{site} {'' if kind in ('latent', 'stream') else kind}".strip() for site, kind in rows},
        columns,
        caption,
        site_key,
    )
    return replace(drawn, columns_below=below)


def _site_of(key: EditKey) -> tuple[Site, str]:
    return Site.parse(key.site), key.component


def _by_unit(run: RunData, edits: EditTable, own: Sequence[int], pair: int | None) -> HeatMap | None:
    """The units with the largest effects against position."""
    units = edits.by_size([number for number in own if edits.keys[number].component in ("latent", "head")])
    rows = list(dict.fromkeys(unit_of(edits.keys[number]) for number in units))[:ROWS]
    if not rows:
        return None
    numbers = [number for number in units if unit_of(edits.keys[number]) in set(rows)]
    columns, below = run.tokens(pair).columns(_positions(edits, numbers))
    kind = "latent" if rows[0][1] == "latent" else "head"
    largest = f"The {len(rows)} {kind}s with the largest effects" if len(rows) > 1 else "Effects"
    drawn = draw_map(
        f"{largest}, by position: {edits.keys[numbers[0]].direction}",
        edits,
        numbers,
        unit_and_position,
        {row: f"{row[0]} {'head ' if row[1] == 'head' else ''}{row[2]}" for row in rows},
        columns,
    )
    return replace(drawn, columns_below=below, anchors=[run.anchors.get((site, unit), "") for site, _, unit in rows])


def edits(run: RunData) -> Section:
    """The edits with the largest effects of each direction, including some of every cell of a map."""
    blocks: list[Simple] = []
    for direction in run.directions:
        own = run.own(direction)
        numbers = run.edits.largest_by_cell(own, EDITS, EDITS // 3)
        caption = f"{direction}: all {len(own):,} edits."
        if len(numbers) < len(own):
            caption = (
                f"{direction}: {len(numbers)} of {len(own):,} edits, the largest and the {EACH} largest of each site "
                "and position."
            )
        q = run.q if any(run.edits.keys[number] in run.q for number in numbers) else None
        if q is not None:
            caption += " q: false discovery rate over all edits of the direction, given for those in the run's summary."
        tokens = run.tokens(None if len(run.pairs.examples) > 1 or not run.reading else 0)
        blocks.append(edit_table(run.edits, numbers, tokens, run.anchors, caption, q))
    text = (
        "Effects are ratios of means over all pairs, with 95 % intervals over pairs. "
        + ("They are estimates from gradients. " if run.is_screen else "")
        + "An edit that changes nothing in a pair counts as effect 0 there."
    )
    return Section("Edits", text, blocks)


def positions_of(run: RunData) -> str:
    """Text on the positions of the edits."""
    settings = run.settings
    each = run.is_screen or settings.get("each_position")
    return f"{settings['positions']}, {'one by one' if each else 'together'}"
