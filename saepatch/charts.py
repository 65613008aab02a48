"""From findings to blocks of a report: what the demo and the experiments draw alike."""

from collections.abc import Sequence

from saepatch import report
from saepatch.controls import DRAWS
from saepatch.curves import Curve
from saepatch.statistics import Interval

INTERVALS = "Intervals: 95 % bootstrap over prompts."


def cell(interval: Interval) -> report.Interval:
    """A table cell that shows an estimate with its interval."""
    return report.Interval(interval.value, interval.low, interval.high)


def band(name: str, sizes: Sequence[int], points: Sequence[Interval]) -> report.Series:
    """A line over sizes with its interval as a band."""
    return report.Series(name, sizes, [p.value for p in points], [p.low for p in points], [p.high for p in points])


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
        "normalised effect",
        series,
        f"n = {n} prompt pairs (report split). All latents together, error term kept: {curve.every}. "
        f"Controls: means of {DRAWS} draws. {INTERVALS}",
        log_x=True,
        references=(report.Reference(0.0, "base run"), report.Reference(1.0, "source run")),
    )
