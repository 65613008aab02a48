"""Intervals cover, controls match, and nothing chosen is among its own controls."""

import numpy as np
import pytest
import torch

from saepatch.errors import UserError
from saepatch.statistics import bootstrap_mean, bootstrap_ratio, matched_latents, random_latents, wilson_share


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
