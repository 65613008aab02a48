"""Results as words."""

from saepatch.records.statistics import Interval


def percent(interval: Interval) -> str:
    """A share with its interval, or the reason why there is none."""
    if interval.reason:
        return f"{interval.value:.0%} ({interval.reason})"
    return f"{interval.value:.0%} [{interval.low:.0%}, {interval.high:.0%}]"
