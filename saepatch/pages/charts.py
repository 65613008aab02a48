"""From findings to blocks of a report: what the demo and the experiments draw alike."""

from collections.abc import Sequence

import numpy as np

from saepatch import report
from saepatch.measure.controls import DRAWS
from saepatch.measure.curves import Curve
from saepatch.measure.effects import Effects, Map
from saepatch.measure.screen import ERROR, Attribution
from saepatch.pages.maps import COLOURS
from saepatch.records.statistics import Interval

INTERVALS = "Intervals: 95 % bootstrap over prompts."


def cell(interval: Interval | None) -> report.Interval | None:
    """A table cell that shows an estimate with its interval; a gap where there is none."""
    return None if interval is None else report.Interval(interval.value, interval.low, interval.high)


def band(name: str, sizes: Sequence[float], points: Sequence[Interval]) -> report.Series:
    """A line over sizes with its interval as a band."""
    return report.Series(name, sizes, [p.value for p in points], [p.low for p in points], [p.high for p in points])


# Said here, and not at the lines: at 0 and 1 there are often points in the way of a label.
EFFECT = "normalised effect (0: base run, 1: source run)"
SOURCE = report.Reference(1.0, "")


def effect_chart(title: str, curve: Curve, n: int) -> report.LineChart:
    """Effect against the number of latents over `n` pairs: top, random and matched ones, and the whole dictionary."""
    series = [
        band("top latents", curve.sizes, curve.top),
        band("random live latents", curve.sizes, curve.random),
        band("matched random latents", curve.sizes, curve.matched),
    ]
    if curve.differing is not None:
        series.append(band("random latents that differ in the pair", curve.sizes, curve.differing))
    return report.LineChart(
        title,
        "latents patched",
        EFFECT,
        series,
        f"n = {n} prompt pairs (report split). All latents together, error term kept: {curve.every}. "
        f"Controls: means of {DRAWS} draws. {INTERVALS}",
        log_x=True,
        references=(SOURCE,),
    )


def comparison_chart(
    title: str, curves: Sequence[tuple[str, Sequence[int], Sequence[Interval]]], caption: str
) -> report.LineChart:
    """Effect against the number of directions, for several kinds of them: (name, sizes, intervals)."""
    return report.LineChart(
        title,
        "directions patched together",
        EFFECT,
        [band(*curve) for curve in curves],
        caption,
        log_x=True,
        references=(SOURCE,),
    )


def position_map(
    title: str, found: Map, tokens: Sequence[str], caption: str, rows: Sequence[str] | None = None
) -> report.HeatMap:
    """Effects by unit and position; `tokens` names every position of the prompts, `rows` the units."""
    small = not np.nanmax(np.abs(found.values), initial=0) >= 0.1
    return report.HeatMap(
        title,
        found.labels if rows is None else rows,
        [tokens[position] for position in found.positions],
        found.values.tolist(),
        f"{caption} {COLOURS}",
        value_format=".3f" if small else ".2f",
    )


def head_map(title: str, effects: Effects, n_heads: int, caption: str) -> report.HeatMap:
    """Effects by layer and attention head, at all positions together."""
    layers = sorted({edit.site.layer for edit in effects.edits})
    values = np.full((len(layers), n_heads), np.nan)
    ran = np.asarray(effects.ran.any(0)).tolist()
    for edit, ratio, changed in zip(effects.edits, effects.ratios().tolist(), ran, strict=True):
        if changed:
            values[layers.index(edit.site.layer), edit.units[0]] = ratio
    return report.HeatMap(
        title,
        [str(layer) for layer in layers],
        [str(head) for head in range(n_heads)],
        values.tolist(),
        f"{caption} {COLOURS}",
        row_label="layer",
        column_label="head",
        value_format=".2f",
    )


def attribution_chart(
    title: str, attributions: Sequence[Attribution], tokens: Sequence[Sequence[str]], caption: str
) -> report.ScatterChart:
    """Estimated against exact effects of the nodes that were verified; `tokens` are the texts of each pair's tokens."""
    series = []
    for found in attributions:
        if found.verified is None:
            continue
        series.append(
            report.Points(
                found.method,
                found.verified.exact.tolist(),
                found.verified.estimated.tolist(),
                [_node(found, int(node), tokens) for node in found.verified.index],
            )
        )
    unit = attributions[0].metric.replace("_", " ")
    return report.ScatterChart(
        title, f"exact effect ({unit})", f"estimated effect ({unit})", series, caption, identity=True
    )


def _node(found: Attribution, node: int, tokens: Sequence[Sequence[str]]) -> str:
    pair, unit, position = int(found.pair[node]), int(found.unit[node]), int(found.position[node])
    what = "error term" if unit == ERROR else f"latent {unit}"
    return f"{found.examples[pair]}: {what} at {position} ({tokens[pair][position].strip()})"
