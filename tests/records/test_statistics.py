"""Intervals cover, tests keep their level, controls match, and nothing chosen is among its own controls."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from saepatch.errors import UserError
from saepatch.measure.controls import matched_latents, random_latents
from saepatch.records.statistics import (
    bootstrap_mean,
    bootstrap_ratio,
    false_discovery,
    sign_flip_test,
    studentised_max_test,
    wilson_share,
)


def test_bootstrap_interval_covers_at_its_level():
    rng = np.random.default_rng(0)
    covered = sum(
        (i := bootstrap_mean(rng.normal(2.0, 1.0, 60), draws=400, seed=trial)).low <= 2.0 <= i.high
        for trial in range(300)
    )
    assert 0.88 <= covered / 300 <= 0.98


def test_ratio_of_means_draws_both_from_the_same_examples():
    rng = np.random.default_rng(1)
    gap = rng.uniform(0.1, 10, 40)
    interval = bootstrap_ratio(0.7 * gap, gap)
    assert interval.value == pytest.approx(0.7)
    assert interval.low == pytest.approx(0.7)
    assert interval.high == pytest.approx(0.7)
    assert bootstrap_ratio(gap**2, gap, seed=3) == bootstrap_ratio(gap**2, gap, seed=3)


def test_missing_values_are_left_out_and_counted():
    interval = bootstrap_mean(np.array([1.0, np.nan, 3.0]))
    assert (interval.value, interval.n) == (2.0, 2)
    nothing = bootstrap_mean(np.array([np.nan]))
    assert np.isnan(nothing.value)
    assert nothing.n == 0


def test_wilson_intervals_stay_open_at_none_and_all():
    none, every = wilson_share(np.zeros(100)), wilson_share(np.ones(100))
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(0.0370, abs=1e-4)  # the textbook value for 0 of 100
    assert (every.low, every.high) == pytest.approx((1 - none.high, 1.0))
    rng = np.random.default_rng(0)
    covered = sum((i := wilson_share((rng.random(50) < 0.1).astype(float))).low <= 0.1 <= i.high for _ in range(500))
    assert 0.92 <= covered / 500 <= 0.99
    with pytest.raises(UserError, match="between 0 and 1"):
        wilson_share(np.array([1.5]))


def test_random_latents():
    alive = torch.arange(100) % 2 == 0
    sets = random_latents(alive, exclude=range(20), k=10, draws=7, seed=1)
    assert len(sets) == 7
    assert len(set(sets)) > 1
    for drawn in sets:
        assert len(set(drawn)) == 10
        assert all(i >= 20 and i % 2 == 0 for i in drawn)
    assert sets == random_latents(alive, exclude=range(20), k=10, draws=7, seed=1)
    with pytest.raises(UserError, match="only 40 are left"):
        random_latents(alive, exclude=range(20), k=41)


def test_matched_latents_match_in_frequency_and_size():
    generator = torch.Generator().manual_seed(0)
    frequency = torch.rand(2000, generator=generator) ** 3
    frequency[:50] = 0
    size = torch.rand(2000, generator=generator) * 5
    chosen = [100, 700, 1500]
    for drawn in matched_latents(chosen, frequency, size, draws=5):
        assert not set(drawn) & set(chosen)
        assert len(set(drawn)) == 3
        for latent, other in zip(chosen, drawn, strict=True):
            assert other >= 50
            assert (
                abs((frequency < frequency[latent]).float().mean() - (frequency < frequency[other]).float().mean())
                < 0.08
            )
            assert abs((size < size[latent]).float().mean() - (size < size[other]).float().mean()) < 0.08
    with pytest.raises(UserError, match="only 1 live ones are left"):
        matched_latents([0, 1], torch.tensor([1.0, 1.0, 1.0]), torch.ones(3))


def all_of(change):
    return np.ones(change.shape, dtype=bool)


def test_q_values_are_those_of_one_t_test_a_column():
    rng = np.random.default_rng(0)
    change = rng.normal(0, 1, (12, 40)) + np.where(np.arange(40) < 5, 1.5, 0)
    change[rng.random(change.shape) < 0.3] = 0.0  # edits that did not run
    p = [stats.ttest_1samp(column, 0).pvalue for column in change.T]
    np.testing.assert_allclose(false_discovery(change, change != 0), stats.false_discovery_control(p), rtol=1e-9)
    one = [false_discovery(change[:, [i]], all_of(change[:, [i]]))[0] for i in range(40)]
    np.testing.assert_allclose(one, p, rtol=1e-9)


def test_false_discoveries_keep_to_their_rate():
    """100 of 1000 columns are real: of those below q = 0.1 at most a tenth are not, and most real ones are there."""
    false, found = [], []
    for trial in range(40):
        change = np.random.default_rng(trial).normal(0, 1, (25, 1000))
        change[:, :100] += 0.9
        chosen = false_discovery(change, all_of(change)) <= 0.1
        false.append(chosen[100:].sum() / max(1, chosen.sum()))
        found.append(chosen[:100].mean())
    assert 0.06 < np.mean(false) < 0.1
    assert np.mean(found) > 0.85


@pytest.mark.parametrize("test", [false_discovery, sign_flip_test])
def test_what_was_not_tested_is_missing_and_counts_for_nothing(test):
    rng = np.random.default_rng(0)
    change = rng.normal(0.4, 1, (20, 6))
    tested = all_of(change)
    tested[:, 1] = False  # a control
    tested[1:, 2] = False  # ran on one pair
    tested[2:, 3] = False  # ran on two: the others are zeros, and are in the mean
    change[:, 1], change[1:, 2], change[2:, 3] = 50.0, 0.0, 0.0
    found = test(change, tested)
    assert np.isnan(found).tolist() == [False, True, True, False, False, False]
    kept = [0, 3, 4, 5]
    np.testing.assert_array_equal(found[kept], test(change[:, kept], tested[:, kept]))
    np.testing.assert_allclose(found, test(change * 1e-200, tested))  # units do not matter
    change[3, 4] = np.inf
    assert np.isnan(test(change, tested)[4])
    assert np.isnan(test(change, tested & False)).all()
    assert np.isnan(test(change[:1], tested[:1])).all()
    assert test(change[:, :0], tested[:, :0]).shape == (0,)


def test_columns_without_any_spread():
    change = np.tile([0.1 + 0.2, 0.0, -7.0], (10, 1))
    least = 2**-9  # ten equal signs; ten equal rows are no surer than that
    assert false_discovery(change, all_of(change)) == pytest.approx([1.5 * least, 1.0, 1.5 * least])
    p = sign_flip_test(change, all_of(change), draws=20_000)
    assert p[0] == p[2] == pytest.approx(2 / 2**10, abs=1e-3)  # all signs equal, one way or the other
    assert p[1] == 1.0


def test_sign_flips_are_the_maximum_over_columns_by_definition():
    """Against all sign patterns of a small table, statistic by statistic."""
    rng = np.random.default_rng(3)
    change = rng.normal(0, 1, (8, 5)) + np.array([1.2, 0, 0, 0, -0.8])

    def t(x):
        return np.abs(x.mean(0) / (x.std(0, ddof=1) / np.sqrt(len(x))))

    largest = np.array([t(np.array(signs)[:, None] * change).max() for signs in itertools.product([-1, 1], repeat=8)])
    exact = [(largest >= own - 1e-9).mean() for own in t(change)]
    np.testing.assert_allclose(sign_flip_test(change, all_of(change), draws=40_000), exact, atol=0.01)
    few = sign_flip_test(change, all_of(change), draws=99, seed=1)
    assert np.array_equal(few, sign_flip_test(change, all_of(change), draws=99, seed=1))
    assert not np.array_equal(few, sign_flip_test(change, all_of(change), draws=99, seed=2))
    np.testing.assert_allclose(few * 100, np.round(few * 100))
    assert few.min() >= 0.01
    with pytest.raises(UserError, match="0 draws of signs"):
        sign_flip_test(change, all_of(change), draws=0)


def test_the_smallest_p_of_the_maximum_is_uniform_where_nothing_is_real():
    """Also where columns go together and have heavy tails: a Kolmogorov-Smirnov test cannot tell."""
    smallest = []
    for trial in range(300):
        rng = np.random.default_rng(trial)
        change = rng.standard_t(3, (15, 10)) @ rng.normal(0, 1, (10, 60))
        smallest.append(sign_flip_test(change, all_of(change), draws=199, seed=trial).min())
    assert stats.kstest(smallest, "uniform").pvalue > 0.05
    assert np.mean(np.array(smallest) <= 0.05) < 0.08


def test_planted_columns_are_found_among_many(monkeypatch):
    change = np.random.default_rng(0).normal(0, 1, (40, 2000))
    planted = [3, 700, 1999]
    change[:, planted] += np.array([1.5, -1.5, 1.5])
    p = sign_flip_test(change, all_of(change), draws=500)
    assert np.flatnonzero(p <= 0.05).tolist() == planted
    assert np.flatnonzero(false_discovery(change, all_of(change)) <= 0.01).tolist() == planted
    monkeypatch.setattr("saepatch.records.statistics.CELLS", 1000)  # two columns at a time
    np.testing.assert_array_equal(sign_flip_test(change, all_of(change), draws=500), p)


def test_matched_latents_are_drawn_once_a_set_from_so_many_neighbours():
    frequency = size = torch.linspace(0.1, 1.0, 30)  # ranks are ids: the nearest to 10 are 9, 11, then 8, 12
    drawn = [set(latents) for latents in matched_latents([10], frequency, size, draws=200, neighbours=4)]
    assert set().union(*drawn) == {8, 9, 11, 12}
    pairs = matched_latents([10, 11], frequency, size, draws=100, neighbours=2)
    assert all(len(set(latents)) == 2 for latents in pairs)
    assert not {10, 11} & set().union(*map(set, pairs))


def test_no_p_of_the_studentised_test_is_zero():
    """The observed data count as one of the draws."""
    change = 10 + np.random.default_rng(0).normal(size=(30, 1))
    assert studentised_max_test(change, np.ones((30, 1), dtype=bool), draws=99)[0] == 1 / 100
