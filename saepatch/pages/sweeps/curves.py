"""Effects of groups with their controls, and estimates against exact effects."""

from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from saepatch import report
from saepatch.measure.results.effects import CONTROLS
from saepatch.pages.charts import band, bars
from saepatch.pages.sweeps.run_data import EXACT, RunData

POINTS = 1000  # points of a scatter chart
NODES = 300  # rows of the table of verified nodes


def groups(run: RunData) -> report.Section | None:
    """The given groups and their controls: as curves over group size where sizes differ, otherwise as bars."""
    if run.is_screen:
        return None
    charts: list[report.Simple] = []
    for direction, top in run.summary["top"].items():
        whole = run.summary.get("curves", {}).get(direction, [])
        given = [line for line in top if line["role"] == "given"]
        for site in dict.fromkeys(line["site"] for line in [*whole, *given]):
            if curve := [line for line in whole if line["site"] == site]:
                charts.append(_curve(f"{site}: {direction}", curve))
                continue
            keys = (run.changes.keys[number] for number in run.own(direction))
            asked = sum((key.site, key.role) == (site, "given") for key in keys)
            mine = sorted((line for line in given if line["site"] == site), key=_size)
            charts.append(_bars(f"{site}: {direction}", mine, asked))
    if not charts:
        return None
    text = (
        "The given latents, with controls of the same size: latents drawn at random from those that fire, and latents "
        "matched in firing frequency and strength. 0 is the base run, 1 the source run. An effect that matched "
        "controls reach as well is not specific to the given latents."
    )
    return report.Section("Groups and their controls", text, charts)


def _size(line: dict[str, Any]) -> int:
    return line["latent"].count(",") + 1


def _interval(facts: dict[str, Any]) -> report.EstimateCell:
    return report.EstimateCell(facts["value"], facts["low"], facts["high"], facts.get("reason", ""))


def _estimates(lines: list[dict[str, Any]]) -> list[tuple[str, list[report.EstimateCell]]]:
    """Effects in the summary's lines and, where there are any, of their controls, by display name."""
    names = {"effect": "patched", "random_controls": "random controls", "matched_controls": "matched controls"}
    missing = {"value": None, "low": None, "high": None}
    return [
        (shown, [_interval(line.get(key, missing)) for line in lines])
        for key, shown in names.items()
        if any(key in line for line in lines)
    ]


INTERVALS = "Intervals: 95 % over pairs (t and studentised bootstrap)."


def _curve(title: str, lines: list[dict[str, Any]]) -> report.Chart:
    sizes = [_size(line) for line in lines]
    return report.LineChart(
        f"Effect over the number of latents, {title}",
        "latents patched together",
        "share of the gap (0: base run, 1: source run)",
        [band(name, sizes, estimates) for name, estimates in _estimates(lines)],
        f"n = {lines[0]['effect']['n']} pairs. {INTERVALS}",
        log_x=True,
        references=(report.Reference(0.0, ""),),
    )


def _bars(title: str, lines: list[dict[str, Any]], asked: int) -> report.Chart:
    """The groups listed in the summary, out of `asked` given ones."""
    ranked = sorted(lines, key=lambda line: -(line["effect"]["value"] or 0.0))
    return report.BarChart(
        f"Effects, {title}",
        [line["latent"] + (f" at {line['position']}" if line["position"].isdigit() else "") for line in ranked],
        [bars(name, estimates) for name, estimates in _estimates(ranked)],
        "share of the gap",
        (f"The {len(ranked)} largest of {asked}. " if asked > len(ranked) else "")
        + f"n = {ranked[0]['effect']['n']} pairs. {INTERVALS}",
        value_format=".3f",
    )


def verified(run: RunData) -> report.Section | None:
    """Estimates against exact effects of the verified nodes."""
    if not run.is_screen:
        return None
    blocks: list[report.Simple] = []
    for direction, screen in run.summary["screens"].items():
        exact, estimate = _verified(run, direction)
        if not len(exact):
            continue
        blocks.append(_scatter(run, direction, exact, estimate, screen))
        blocks.append(_nodes(run, direction, exact, estimate))
    if not blocks:
        return None
    text = (
        "The nodes with the largest estimates, and nodes drawn at random from all others, were run exactly. The "
        "agreement in the random sample shows how far to trust the unverified estimates: a large exact effect in it is "
        "one that the screen would have missed."
    )
    return report.Section("Estimates against exact effects", text, blocks)


def _verified(run: RunData, direction: str) -> tuple[Int[ndarray, "nodes"], Int[ndarray, "nodes"]]:
    """Row numbers of the exact effects, and of the same nodes' estimates."""
    keys, changes = run.changes.keys, run.changes
    numbers = {key: number for number, key in enumerate(keys)}
    partner = np.full(len(keys), -1)
    for number, key in enumerate(keys):
        if key.direction == direction and key.role in EXACT:
            partner[number] = numbers[key._replace(role="single")]
    exact = np.flatnonzero(partner[changes.key] >= 0)
    pairs = len(run.pairs.examples)
    code = changes.key * pairs + changes.pair
    order = np.argsort(code)
    wanted = partner[changes.key[exact]] * pairs + changes.pair[exact]
    return exact, order[np.searchsorted(code, wanted, sorter=order)]


def _label(run: RunData, row: int) -> str:
    key = run.changes.keys[run.changes.key[row]]
    return f"{run.pairs.examples[run.changes.pair[row]]}: {key.site} {key.unit} at {key.position}"


def _scatter(
    run: RunData, direction: str, exact: Int[ndarray, "nodes"], estimate: Int[ndarray, "nodes"], screen: dict[str, Any]
) -> report.Chart:
    change = run.changes.change
    roles = np.array([run.changes.keys[number].role for number in run.changes.key[exact]])
    size = np.abs if run.sizes else np.asarray
    series = []
    for role, name in zip(EXACT, ("largest estimates", "drawn at random")):
        mine = np.flatnonzero(roles == role)[: POINTS // 2]
        labels = [_label(run, int(row)) for row in exact[mine]]
        series.append(report.Points(name, size(change[exact[mine]]).tolist(), change[estimate[mine]].tolist(), labels))
    agreement = f"Pearson {screen['pearson']:.3f}, Spearman {screen['spearman']:.3f}" if screen.get("pearson") else ""
    missed = ""
    if screen.get("missed_at_most") is not None:
        missed = (
            f" Of all nodes that were not run, at most {screen['missed_at_most']:,.0f} "
            f"({screen['missed_share_at_most']:.1%}) are as large as the smallest of the top ones (95 % confidence)."
        )
    drawn = sum(len(points.x) for points in series)
    some = f" {drawn} of {len(exact)} are shown." if drawn < len(exact) else ""
    return report.ScatterChart(
        f"Estimated against exact effect: {direction}",
        f"exact effect ({run.metric})",
        f"estimated effect ({run.metric})",
        series,
        f"n = {len(exact)} nodes of {screen['nodes']:,}. {agreement}.{some}{missed}",
        identity=True,
    )


def _nodes(run: RunData, direction: str, exact: Int[ndarray, "nodes"], estimate: Int[ndarray, "nodes"]) -> report.Table:
    change = run.changes.change
    best = np.argsort(-np.abs(change[exact]), kind="stable")[:NODES]
    rows: list[list[report.Cell]] = []
    for i in best.tolist():
        key = run.changes.keys[run.changes.key[exact[i]]]
        anchor = run.anchors.get((key.site, key.latent))
        alone = key.latent if key.component == "latent" else key.component
        unit: report.Cell = report.Link(key.latent, anchor) if anchor else alone
        example = run.pairs.examples[run.changes.pair[exact[i]]]
        values = float(change[exact[i]]), float(change[estimate[i]])
        rows.append([example, key.site, unit, int(key.position), key.role, *values])
    return report.Table(
        ["pair", "site", "unit", "position", "why", "exact", "estimated"],
        rows,
        f"{direction}: the {len(rows)} largest of {len(exact)} nodes that were run exactly, in units of the "
        f"{run.metric}. Why: `top`, among the largest estimates; `random`, drawn at random.",
        {"exact": ".3f", "estimated": ".3f", "position": "d"},
    )


def controls_reach(run: RunData) -> list[str]:
    """Warnings about groups whose matched or random controls have as large an effect."""
    if run.is_screen:
        return []
    notices = []
    for direction, top in run.summary["top"].items():
        for line in top:
            for role in CONTROLS:
                control = line.get(f"{role}_controls")
                effect = line["effect"]["value"]
                if control and None not in (effect, control["high"]) and abs(control["value"]) >= abs(effect) > 0:
                    notices.append(
                        f"{direction}: the {role} controls of {line['site']} {line['latent']} have as large an effect "
                        f"({control['value']:.3f} against {effect:.3f}): it is not specific to these latents."
                    )
    return notices
