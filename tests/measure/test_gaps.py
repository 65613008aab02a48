"""The arithmetic of effects, against values worked out by hand."""

from dataclasses import dataclass

import numpy as np
import pytest

from saepatch.errors import UserError
from saepatch.measure.results.gaps import PairGaps, moved_by, towards_source
from saepatch.records.statistics import bootstrap_ratio


@dataclass(frozen=True, eq=False)
class Ends(PairGaps):
    clean: np.ndarray
    corrupted: np.ndarray
    min_gap: float = 0.5


def ends(clean, corrupted, min_gap=0.5):
    return Ends(np.array(clean, dtype=float), np.array(corrupted, dtype=float), min_gap)


def test_changes_go_from_the_base_run_towards_the_source_run():
    clean, corrupted, patched = np.array([3.0, 3.0]), np.array([1.0, 1.0]), np.array([1.5, 4.0])
    np.testing.assert_allclose(towards_source(patched, clean, corrupted, True), [0.5, 3.0])
    np.testing.assert_allclose(towards_source(patched, clean, corrupted, False), [1.5, -1.0])
    np.testing.assert_allclose(towards_source(patched, clean, corrupted, np.array([True, False])), [0.5, -1.0])
    for denoise in (True, False):
        change = towards_source(patched, clean, corrupted, denoise)
        np.testing.assert_allclose(moved_by(change, clean, corrupted, denoise), patched)


def test_gaps():
    pairs = ends([2.0, 1.0, 0.5, -4.0], [0.0, 0.5, 0.1, 0.0])
    np.testing.assert_allclose(pairs.gap, [2.0, 0.5, 0.4, -4.0])
    np.testing.assert_allclose(pairs.usable_gap, [2.0, 0.5, np.nan, -4.0])  # one of just that size is used
    assert pairs.missing == 1
    assert np.isnan(pairs.mean_gap)  # -0.275
    assert ends([3.0, 1.0], [0.0, 0.0]).mean_gap == 2.0
    assert ends([1.0, 0.0], [0.0, 0.0]).mean_gap == 0.5
    assert ends([-1.0, 0.0], [0.0, 0.0]).mean_gap == -0.5
    assert ends([2.0, 1.0], [0.5, 0.75]).ends() == "1.500 clean, 0.625 corrupted, 2 pairs (1 with a gap below 0.5)"


def test_ratios_are_of_means_on_one_set_of_draws():
    rng = np.random.default_rng(0)
    pairs, change = ends(rng.normal(3, 1, 20), rng.normal(0, 1, 20)), rng.normal(1, 1, 20)
    found = pairs.ratio(change, seed=3)
    assert found == bootstrap_ratio(change, pairs.gap, seed=3) == pairs.bootstrap(3).of(change)
    assert found.value == pytest.approx(change.sum() / pairs.gap.sum())
    assert found != pairs.ratio(change, seed=4)
    mixed = ends(np.where(np.arange(20) % 5, pairs.clean, -pairs.clean), pairs.corrupted)
    sizes = mixed.bootstrap(3, sizes=True).of(change)
    assert sizes == bootstrap_ratio(change, np.abs(mixed.gap), seed=3) != mixed.bootstrap(3).of(change)
    flat = ends([0.4, 0.4], [0.0, 0.0]).ratio(np.ones(2))
    assert np.isnan([flat.value, flat.low, flat.high]).all()
    assert flat.n == 2


def test_order_of_effects_follows_the_gaps_sign():
    totals = np.array([1.0, -3.0, 2.0, 2.0])
    assert ends([2.0], [0.0]).largest_first(totals).tolist() == [2, 3, 0, 1]
    assert ends([0.0], [2.0]).largest_first(totals).tolist() == [1, 0, 2, 3]
    assert ends([0.0], [1e-3]).largest_first(totals).tolist() == [1, 0, 2, 3]  # too small a gap to divide by
    ends([2.0], [0.0]).check_gap("margin")
    with pytest.raises(UserError, match=r"differ by -0.001 in margin on average, less than 0.5"):
        ends([0.0], [1e-3]).check_gap("margin")
