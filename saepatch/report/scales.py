"""Axes: the map from values to pixels, and the placing of ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

_APART = 36.0  # least distance in pixels between the ticks of a logarithmic axis


@dataclass(frozen=True)
class Scale:
    """A linear map from values (from their log2, if `log`) to pixels."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False
    zero: float = 0.0
    """Position of x = 0 on a logarithmic axis, in log2 units."""

    def __call__(self, value: float) -> float:
        """The pixel of a value, clamped to the axis."""
        place = self._place(value)
        share = (place - self.low) / (self.high - self.low)
        return round(self.start + min(max(share, 0.0), 1.0) * (self.end - self.start), 2)

    def _place(self, value: float) -> float:
        if not self.log:
            return value
        return math.log2(value) if value > 0 else self.zero


def linear(
    values: Iterable[float], start: float, end: float, count: int = 5, fixed: tuple[float, float] | None = None
) -> Scale:
    """An axis over the values, extended to round numbers and to 0 where that is near; or between `fixed` ends."""
    numbers = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = fixed or (min(numbers), max(numbers))
    if fixed is None:
        if 0 < low <= 0.6 * high:
            low = 0.0
        if 0.6 * low <= high < 0:
            high = 0.0
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    step = _round_step((high - low) / count)
    first, last = (math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9))
    if fixed is None:
        # Extend to the next round number, unless the values exceed the last one only slightly.
        spare = 0.3 * step
        if first * step - low > spare:
            first -= 1
        if high - last * step > spare:
            last += 1
        low = first * step if low > first * step - 1e-9 * step else low - 0.1 * spare
        high = last * step if high < last * step + 1e-9 * step else high + 0.1 * spare
    return Scale(low, high, start, end, tuple(round(i * step, 12) for i in range(first, last + 1)))


def logarithmic(values: Sequence[float], start: float, end: float, count: int = 8) -> Scale:
    """A log2 axis over the values; ticks at the values themselves where they are few and far enough apart, otherwise at
    powers of two or ten."""
    positive = sorted({value for value in values if math.isfinite(value) and value > 0}) or [1.0, 2.0]
    low, high = math.log2(positive[0]), math.log2(positive[-1])
    zero = low - 1
    has_zero = any(value == 0 for value in values)
    ticks = positive
    nearest = min((math.log2(b / a) for a, b in pairwise(positive)), default=high - low)
    crowded = len(positive) > 1 and nearest * abs(end - start) < _APART * (high - low)
    if len(positive) > count or crowded:
        base = 2 if all(math.log2(value).is_integer() for value in positive) else 10
        first = math.ceil(math.log(positive[0], base) - 1e-9)
        last = math.floor(math.log(positive[-1], base) + 1e-9)
        stride = max(1, math.ceil((last - first + 1) / count))
        ticks = [float(base) ** power for power in range(first, last + 1, stride)]
        if len(ticks) < 3:  # the axis spans less than two powers of ten
            steps = sorted(factor * 10.0**power for power in range(first - 1, last + 1) for factor in (1, 2, 5))
            ticks = [tick for tick in steps if positive[0] <= tick <= positive[-1]] or [positive[0], positive[-1]]
    if has_zero:
        low, ticks = zero, [0.0, *ticks]
    if high - low < 1e-9:
        low, high = low - 1, high + 1
    pad = 0.02 * (high - low)
    return Scale(low - pad, high + pad, start, end, tuple(ticks), log=True, zero=zero)


def _round_step(step: float) -> float:
    """The smallest of 1, 2, 2.5 or 5 times a power of ten that is at least `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * (1 - 1e-9))
