"""Report blocks from estimates with intervals."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from saepatch import report
from saepatch.measure.controls import DRAWS
from saepatch.measure.curves import Curve
from saepatch.records.statistics import about_sets
from saepatch.report.text import with_interval

INTERVALS = "Intervals: 95 % over prompts (t and studentised bootstrap)."
WILSON = "Intervals: 95 % Wilson score over prompts."


@runtime_checkable
class Estimate(Protocol):
    """A value with its interval; missing numbers are None or NaN, and `reason` explains why."""

    @property
    def value(self) -> float | None: ...
    @property
    def low(self) -> float | None: ...
    @property
    def high(self) -> float | None: ...
    @property
    def reason(self) -> str: ...


def cell(estimate: Estimate | None) -> report.EstimateCell | None:
    """A table cell with an estimate and its interval; empty where there is no estimate."""
    return (
        None if estimate is None else report.EstimateCell(estimate.value, estimate.low, estimate.high, estimate.reason)
    )


def band(name: str, sizes: Sequence[float], points: Sequence[Estimate | None]) -> report.Series:
    """A line over sizes with its interval as a band; sizes without an estimate are left out."""
    present = [(x, point) for x, point in zip(sizes, points, strict=True) if point is not None]
    ends = ([getattr(point, end) for _, point in present] for end in ("value", "low", "high"))
    return report.Series(name, [x for x, _ in present], *ends)


def bars(name: str, values: Sequence[Estimate]) -> report.Bars:
    """Bars with their intervals as whiskers."""
    return report.Bars(name, [v.value for v in values], [v.low for v in values], [v.high for v in values])


def estimate_text(estimate: Estimate, spec: str = ".3f") -> str:
    """An estimate with its interval as text."""
    return with_interval(estimate.value, estimate.low, estimate.high, spec, estimate.reason)


# The axis label explains 0 and 1, since points often cover labels at the lines.
EFFECT = "normalised effect (0: base run, 1: source run)"
SOURCE = report.Reference(1.0, "")


def effect_chart(title: str, curve: Curve, n: int) -> report.LineChart:
    """Effect against the number of latents, over `n` pairs: top, random and matched latents, whole dictionary."""
    series = [
        band("top latents", curve.sizes, curve.top),
        band("random live latents", curve.sizes, curve.random),
        band("matched random latents", curve.sizes, curve.matched),
    ]
    if curve.differing is not None:
        series.append(band("random latents that differ in the pair", curve.sizes, curve.differing))
    caption = (
        f"n = {n} prompt pairs (report split). All latents together, error term kept: {curve.every}. "
        f"{about_sets(DRAWS)} {INTERVALS}"
    )
    return size_chart(title, "latents patched", series, caption)


def size_chart(title: str, x_label: str, series: Sequence[report.Series], caption: str) -> report.LineChart:
    """Effect against the number of latents or directions patched together."""
    return report.LineChart(title, x_label, EFFECT, series, caption, log_x=True, references=(SOURCE,))
