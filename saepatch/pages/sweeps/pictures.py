"""Effects at image tokens, drawn over the pictures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from saepatch.model.sites import Site
from saepatch.pages.sweeps.run_data import RunData
from saepatch.report import Choice, PictureMap, Section, Simple

SITES = 8  # sites with pictures of their own


def pictures(run: RunData) -> Section | None:
    """The effects of each site at image tokens, over the pictures of the first few pairs; None: there are none."""
    shown = run.reading["prompts"]["first"] if run.reading else []
    options: list[tuple[str, list[Simple]]] = []
    for pair, prompts in enumerate(shown):
        for direction in run.directions:
            for site, values in list(_by_site(run, direction, pair).items())[:SITES]:
                drawn: list[Simple] = [
                    chart
                    for side, several in prompts.get("pictures", {}).items()
                    for number, picture in enumerate(several)
                    for chart in _layers(f"{side} picture{f' {number}' if len(several) > 1 else ''}", picture, values)
                ]
                if drawn:
                    options.append((f"{direction}, {site}, pair {prompts['example']}", drawn))
    if not options:
        return None
    text = (
        "Each part of a picture has the colour of the effects at its token: the sum of the single effects of all units "
        "of the site there, as shares of the pair's gap" + (", estimated." if run.is_screen else ".")
    )
    return Section("Over the pictures", text, [Choice("Show", options)])


def _by_site(run: RunData, direction: str, pair: int) -> dict[str, dict[int, float]]:
    """The sums of a pair's effects by site and position, the earliest sites first."""
    effects, ran = run.effects_of(pair)
    sums: dict[str, dict[int, float]] = {}
    for number in run.own(direction):
        key = run.changes.keys[number]
        if ran[number] and key.position.isdigit() and key.component != "head":
            mine = sums.setdefault(key.site, {})
            mine[int(key.position)] = mine.get(int(key.position), 0.0) + float(effects[number])
    return {site: sums[site] for site in sorted(sums, key=lambda site: Site.parse(site).order)}


def _layers(title: str, picture: dict[str, Any], values: dict[int, float]) -> list[PictureMap]:
    """The picture once for each set of parts that do not overlap: tiles, and the whole picture beside them."""
    boxes = np.array(picture["boxes"], dtype=float).reshape(-1, 4)
    layers: list[list[int]] = []
    for part, box in enumerate(boxes):
        centre = (box[:2] + box[2:]) / 2
        free = next((layer for layer in layers if not _holds(boxes[layer], centre)), None)
        layers.append([part]) if free is None else free.append(part)
    return [
        PictureMap(
            title if len(layers) == 1 else f"{title}, parts {number + 1} of {len(layers)}",
            picture["picture"],
            picture["size"],
            boxes[layer].tolist(),
            [f"position {picture['positions'][part]}" for part in layer],
            [values.get(picture["positions"][part]) for part in layer],
        )
        for number, layer in enumerate(layers)
        if any(picture["positions"][part] in values for part in layer)
    ]


def _holds(boxes: Float[ndarray, "boxes 4"], point: Sequence[float] | ndarray) -> bool:
    inside = (boxes[:, 0] < point[0]) & (point[0] < boxes[:, 2]) & (boxes[:, 1] < point[1]) & (point[1] < boxes[:, 3])
    return bool(inside.any())
