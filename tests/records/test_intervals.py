"""Intervals cover the true value as often as they say, or are withheld with the reason."""

import numpy as np
import pytest
from covering import DOCUMENT, KINDS, SIZES, coverage, table

from saepatch.errors import UserError
from saepatch.records import statistics
from saepatch.records.statistics import Interval, RatioBootstrap, bootstrap_mean, bootstrap_ratio, paired_difference


@pytest.mark.parametrize("kind", ["skewed values", "one effect, skewed gaps", "effect on 3 of 10 pairs", "0/1 differs"])
def test_intervals_cover_or_are_withheld(kind):
    """Each fails with percentile intervals, which cover 0.6 to 0.9 here."""
    shown, covered = coverage(KINDS[kind], 10, trials=250, draws=400)
    assert covered >= 0.93 - 2 * np.sqrt(0.07 * 0.93 / 250 / max(shown, 0.1))
    assert shown > (0.05 if "3 of 10" in kind else 0.9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_coverage_of_every_kind(kind):
    for n in SIZES:
        shown, covered = coverage(KINDS[kind], n, trials=2000)
        assert covered >= 0.93 or shown * 2000 < 40, (kind, n, shown, covered)


def test_the_documented_table_is_of_these_kinds():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert all(f"| {kind} |" in text for kind in KINDS)
    short = table(trials=1, draws=20)
    assert [line.split("|")[1].strip() for line in short.splitlines()[2:]] == list(KINDS)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([0.4], "too few for an interval: n = 1"),
        ([0.1, 0.2, 0.3, 0.4, 0.5], "too few for an interval: n = 5"),
        ([0.0] * 8 + [0.4, 0.5], "too few for an interval: 2 of 10 moved"),
        ([0.0] * 10, None),  # of outcomes: the same everywhere is an observation too
        ([0.0] * 6 + [0.2] * 2, "too few for an interval: 2 of 8 moved"),
        (
            [0.0] * 19 + [0.001, 0.001, 0.002, 0.001, 0.4],
            "too few for an interval: values too uneven",
        ),
        ([0.7] * 9 + [0.1], "too few for an interval: 1 of 10 differ from the rest"),
    ],
)
def test_what_allows_no_interval_says_why(values, reason):
    interval = bootstrap_mean(np.array(values))
    assert interval.value == pytest.approx(np.mean(values))
    if reason is None:
        assert interval.low < 0 < interval.high
        return
    assert np.isnan([interval.low, interval.high]).all()
    assert interval.reason == reason
    assert str(interval) == f"{np.mean(values):.3f} ({reason})"
    assert interval.facts()["reason"] == reason


def test_six_examples_are_enough():
    interval = bootstrap_mean(np.linspace(0.1, 0.6, 6))
    assert interval.low < interval.value < interval.high


def test_an_interval_without_a_reason_is_held_as_before():
    assert Interval(0.5, 0.4, 0.6, 9).facts() == {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}


def test_gaps_of_both_signs_whose_mean_may_be_nothing_allow_no_interval():
    gap = np.array([1.0, -0.9, 1.1, -1.2, 0.8, -0.7, 1.3, 0.2])
    interval = bootstrap_ratio(0.5 * gap + np.linspace(-0.1, 0.1, 8), gap)
    assert interval.reason == "no interval: the mean to divide by may be 0"
    assert not bootstrap_ratio(0.5 * gap + np.linspace(-0.1, 0.1, 8), gap + 3).reason
    # the bound is t · s / √n = 2.3646 · 1.0690 / 2.8284, with s from n - 1
    for mean, withheld in [(0.88, True), (0.91, False)]:
        gap = mean + np.array([1.0, -1.0] * 4)
        assert bool(bootstrap_ratio(0.5 * gap + np.linspace(-0.1, 0.1, 8), gap).reason) == withheld


def test_paired_differences_are_those_of_bonett_and_price():
    """Against the formula with the discordant counts: 6 and 1 of 20."""
    differences = np.array([1.0] * 6 + [-1.0] + [0.0] * 13)
    p, q, n = 7 / 22, 2 / 22, 20
    half = statistics._t_quantile(0.975, 21) * np.sqrt((p + q - (p - q) ** 2) / (n + 2))
    interval = paired_difference(differences)
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.25, p - q - half, p - q + half))
    assert bootstrap_mean(differences) == interval
    assert paired_difference(-differences).low == pytest.approx(-interval.high)
    halved = paired_difference(np.repeat(differences, 1) / 2)  # means over draws
    assert halved.value == pytest.approx(0.125)
    assert paired_difference(np.ones(8)).high == 1.0
    with pytest.raises(UserError, match="between -1 and 1"):
        paired_difference(np.array([1.5]))


def test_one_denominator_serves_many_numerators():
    rng = np.random.default_rng(5)
    gap, change = rng.uniform(1, 3, 25), rng.normal(1, 1, (25, 3))
    together = RatioBootstrap(gap, seed=4)
    for column in change.T:
        assert together.of(column) == bootstrap_ratio(column, gap, seed=4)
        low, high = (getattr(bootstrap_ratio(-column, gap, seed=4), end) for end in ("low", "high"))
        assert (together.of(column).low, together.of(column).high) == pytest.approx((-high, -low))


def test_the_interval_is_the_union_by_definition():
    """Draw by draw, as the two intervals are written in the books."""
    rng = np.random.default_rng(2)
    gap = rng.lognormal(0, 0.5, 12)
    change = 0.4 * gap + rng.normal(0, 0.3, 12)
    draws = RatioBootstrap(gap, draws=300, seed=7)
    ratio = change.mean() / gap.mean()
    np.testing.assert_array_equal(draws._counts, np.random.default_rng(7).multinomial(12, np.full(12, 1 / 12), 300))

    def error(top, bottom):
        return (top - top.mean() / bottom.mean() * bottom).std(ddof=1) / np.sqrt(len(top)) / bottom.mean()

    scaled = []
    for counts in draws._counts.astype(int):
        drawn = np.repeat(np.arange(12), counts)
        top, bottom = change[drawn], gap[drawn]
        scaled.append((top.mean() / bottom.mean() - ratio) / error(top, bottom))
    from scipy import stats

    t = stats.t.ppf(0.975, 11)
    tail = stats.norm.cdf(-np.sqrt(12 / 11) * t)
    lower, upper = np.quantile(scaled, [tail, 1 - tail], method="inverted_cdf")
    se = error(change, gap)
    interval = draws.of(change)
    assert interval.low == pytest.approx(ratio - max(upper, t) * se)
    assert interval.high == pytest.approx(ratio + max(-lower, t) * se)
