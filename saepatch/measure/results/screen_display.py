"""Display of screens: a line, blocks of a report, estimated against exact effects."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from saepatch.errors import UserError
from saepatch.measure.results.effects import describe
from saepatch.measure.results.screen import ERROR, Attribution
from saepatch.report.blocks import Cell, Facts, Notices, Points, ScatterChart, Simple, Table
from saepatch.report.notebook import Figure
from saepatch.report.text import number, token_text


def screen_line(screen: Attribution) -> str:
    """The screen in two or three lines."""
    lines = [
        f"Attribution ({screen.method}): estimates of {len(screen):,} nodes on {len(screen.clean)} pairs "
        f"({screen.direction}, {screen.metric}, positions {screen.positions})"
    ]
    if (run := screen.verified) is not None:
        lines.append(
            f"run exactly: {run.largest} largest and {run.sampled} others; Pearson {run.pearson():.3f}, "
            f"Spearman {run.spearman():.3f}"
        )
    return "\n".join([*lines, "summary() lists the largest; to_frame() has a row for every edit"])


def screen_blocks(screen: Attribution, k: int = 10) -> list[Simple]:
    """The metric of both runs, the largest estimates, and the result of verification."""
    ends = {"metric": screen.metric.replace("_", " "), "clean runs": number(float(screen.clean.mean()))}
    ends |= {"corrupted runs": number(float(screen.corrupted.mean())), "nodes": f"{len(screen):,}"}
    facts = Facts(ends | {"estimates": screen.method})
    if np.isnan(screen.mean_gap):
        return [Notices([f"The mean gap is below {screen.min_gap:g}, so there are no effects to rank."]), facts]
    (edits, mean), (keys, _) = screen.means(), screen.key_means(True)
    shares, rows = screen.shares(mean), list[list[Cell]]()
    for i in np.argsort(-shares, kind="stable")[:k].tolist():
        edit, (site, unit, at) = edits[i], keys[:, i].tolist()
        text = _token_of(screen, site, unit, at)
        name = describe(edit) if edit.kind == "latent" else f"{edit.kind} {describe(edit)}".strip()
        where = f"{at} {token_text(text)}" if text else str(at)
        rows.append([str(edit.site), name, where, float(mean[i]), float(shares[i])])
    columns = ["site", "unit", "at", f"estimate ({screen.metric.replace('_', ' ')})", "share of the gap"]
    caption = "Estimates from gradients, means over pairs."
    if screen.verified is not None:
        caption += "\n\n" + screen.verified.summary().replace("\n", "\n\n")
    return [facts, Table(columns, rows, caption, {columns[3]: ".4f", columns[4]: ".3f"})]


def _token_of(screen: Attribution, site: int, unit: int, at: int) -> str:
    """The token at a node's position in the pairs that have the node; "…" where they differ, empty where unknown."""
    mine = (screen.site == site) & (screen.unit == unit) & (screen.position == at)
    known = {screen.tokens[pair][at] for pair in screen.pair[mine]} if screen.tokens else {""}
    return known.pop() if len(known) == 1 else "…"


def screen_figure(screen: Attribution) -> Figure:
    """See `Attribution.plot`."""
    if (run := screen.verified) is None:
        raise UserError("no node was run exactly, so there is nothing to draw: attribute with verify=50, sample=50")
    is_error = screen.unit[run.index] == ERROR
    names = {"error terms": is_error, "other nodes" if is_error.any() else "nodes": ~is_error}
    series = [
        _points(name, screen, np.flatnonzero(which), screen.tokens) for name, which in names.items() if which.any()
    ]
    caption = f"The {run.largest} nodes with the largest estimates, and {run.sampled} drawn from the others."
    return Figure(_scatter("Estimated and exact effects", screen, series[::-1], caption))


def attribution_chart(
    title: str, attributions: Sequence[Attribution], tokens: Sequence[Sequence[str]], caption: str
) -> ScatterChart:
    """Estimated against exact effects of verified nodes; `tokens` are the texts of each pair's tokens."""
    verified = [(screen, screen.verified) for screen in attributions if screen.verified is not None]
    series = [_points(screen.method, screen, np.arange(len(run.index)), tokens) for screen, run in verified]
    return _scatter(title, attributions[0], series, caption)


def _scatter(title: str, screen: Attribution, series: Sequence[Points], caption: str) -> ScatterChart:
    unit = screen.metric.replace("_", " ")
    return ScatterChart(title, f"exact effect ({unit})", f"estimated effect ({unit})", series, caption, identity=True)


def _points(name: str, screen: Attribution, which: Int[ndarray, "some"], tokens: Sequence[Sequence[str]]) -> Points:
    run = screen.verified
    assert run is not None
    labels = [_node(screen, int(node), tokens) for node in run.index[which]]
    return Points(name, run.exact[which].tolist(), run.estimated[which].tolist(), labels)


def _node(screen: Attribution, node: int, tokens: Sequence[Sequence[str]]) -> str:
    pair, unit, position = int(screen.pair[node]), int(screen.unit[node]), int(screen.position[node])
    what = "error term" if unit == ERROR else f"{screen.kinds[int(screen.site[node])]} {unit}"
    text = f" ({token_text(tokens[pair][position])})" if tokens else ""
    return f"{screen.examples[pair]}: {what} at {position}{text}"
