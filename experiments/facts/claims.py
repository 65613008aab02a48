"""Verdicts on claims about edits of facts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from saepatch.facts.evaluation import EditEvaluation
from saepatch.records.statistics import Interval, bootstrap_mean, wilson_share

from .stages import MeasuredSequence, SequenceMeasure

SHOWN, OPPOSITE, NOT_SHOWN = "shown", "the opposite is shown", "not shown"
SEQUENCE_KINDS = ("efficacy", "neighbourhood")  # by which sequences are judged


@dataclass(frozen=True)
class FactClaim:
    """A claim, what was measured, the figure, and whether it is shown."""

    claim: str
    measured: str
    figure: Interval
    verdict: str


def judged(claim: str, measured: str, figure: Interval, bound: float, above: bool = True) -> FactClaim:
    """Whether the figure is above the bound (or below it); a withheld interval shows nothing."""
    over, under = figure.low > bound, figure.high < bound
    good, bad = (over, under) if above else (under, over)
    return FactClaim(claim, measured, figure, SHOWN if good else OPPOSITE if bad else NOT_SHOWN)


def claims(
    singles: Mapping[str, EditEvaluation], sequences: Sequence[MeasuredSequence], spread: tuple[str, str]
) -> list[FactClaim]:
    """Verdicts; `spread` names the one-layer and the several-layer sequence that are compared."""
    rome = singles["ROME"]
    made = [judged("Single edits have an efficacy of 95 %", "ROME", rome.success("efficacy"), 0.95)]
    for name in ("ROME", "MEMIT, 1 layer"):
        if run := next((each for each in sequences if each.method == name), None):
            made += _degradation(run)
    by_name = {run.method: run for run in sequences}
    if all(name in by_name for name in spread) and by_name[spread[0]].steps:
        one, several = (by_name[name].steps[-1].evaluation for name in spread)
        for kind in ("efficacy", "neighbourhood"):
            figure = paired(several, one, kind)
            where = f"{kind}: {spread[1]} minus {spread[0]}, after {by_name[spread[0]].steps[-1].edits} edits"
            made.append(judged("Spreading over layers helps", where, figure, 0.0))
    for kind, claim in (("reversal", "No reversal"), ("ripple", "No ripple")):
        if kind in rome.kinds and rome.left(kind)[0]:
            counted = "{} of {} questions count".format(*rome.left(kind))
            made.append(judged(claim, f"ROME, success below a half; {counted}", rome.success(kind), 0.5, above=False))
    return made


def _degradation(run: MeasuredSequence) -> list[FactClaim]:
    """Whether the first edits and other facts are worse at the last checkpoint than at the last of up to ten edits.

    An earlier one is compared where too few questions count at the last one, many neighbours being edited by then.
    """
    early = [step for step in run.steps if step.edits <= 10]
    late = [step for step in run.steps if step.edits > 10]
    if not early or not late:
        return []
    before, made = early[-1], []
    for kind in SEQUENCE_KINDS:
        figures = [(step, paired(step.evaluation, before.evaluation, kind)) for step in reversed(late)]
        after, figure = next((each for each in figures if not each[1].reason), figures[0])
        what = f"{kind}, {run.method}: the first {before.edits} edits after {after.edits} minus after {before.edits}"
        made.append(judged("Editing degrades after about ten", what, figure, 0.0, above=False))
    return made


def paired(one: EditEvaluation, other: EditEvaluation, kind: str) -> Interval:
    """Mean difference of a kind's P(right) - P(other), by request, over the questions that count in both."""
    first, second = ({(row.example, row.prompt): row for row in each.rows if row.counted} for each in (one, other))
    differences: dict[str, list[float]] = {}
    for key, row in first.items():
        if row.kind == kind and key in second:
            differences.setdefault(row.example, []).append(row.magnitude - second[key].magnitude)
    return bootstrap_mean(np.array([float(np.mean(own)) for own in differences.values()]))


def still_hold(step: SequenceMeasure, earlier: int) -> Interval:
    """Share of a sequence's first edits that hold at a later checkpoint."""
    names = list(dict.fromkeys(row.example for row in step.evaluation.rows))[:earlier]
    held = step.evaluation.by_request("efficacy", lambda row: float(row.success))
    return wilson_share(np.array([held[name] for name in names]))


def differences_to_rome(sequences: Sequence[MeasuredSequence]) -> dict[str, dict[int, dict[str, Interval]]]:
    """By method, number of edits and kind: mean P(right) - P(other) minus the same after as many edits by ROME."""
    rome = next((run for run in sequences if run.method == "ROME"), None)
    base = {} if rome is None else {step.edits: step.evaluation for step in rome.steps}
    return {
        run.method: {
            step.edits: {kind: paired(step.evaluation, base[step.edits], kind) for kind in SEQUENCE_KINDS}
            for step in run.steps
            if step.edits in base
        }
        for run in sequences
        if run is not rome
    }
