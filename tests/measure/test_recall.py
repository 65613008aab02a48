"""Verification to a bound on recall: against the true top, where all effects are known."""

import numpy as np
import pytest
from tiny import random_dictionary, tiny_model

from saepatch.data.pairs import PromptPair
from saepatch.errors import UserError
from saepatch.measure.attribution import attribute
from saepatch.measure.recall import LOOKS, looks, verify_to_recall
from saepatch.measure.results.screen import Attribution
from saepatch.model.sites import Site

pytestmark = pytest.mark.whole


def screen_of(scores):
    n = len(scores)
    zeros = np.zeros(n, dtype=np.int64)
    return Attribution(
        "denoise", "logit_difference", "first order", "all", (Site(0),), ("latent",), ("a",), np.ones(1), np.zeros(1),
        zeros, zeros, np.arange(n), zeros, scores,
    )  # fmt: skip


def runs_of(effects):
    """Exact runs of nodes whose effects are known, and the nodes that were run."""
    ran = []

    def exact(edits):
        ran.extend(edit.units[0] for _, edit in edits)
        return effects[[edit.units[0] for _, edit in edits]]  # the corrupted run's metric is 0

    return exact, ran


def simulated(seed, n, hidden):
    """Effects with a heavy tail, estimated with noise; of the largest, `hidden` have an estimate of 0."""
    rng = np.random.default_rng(seed)
    effects = rng.standard_t(2, n) * 0.1
    scores = effects * rng.lognormal(0, 0.3, n) + 0.02 * rng.standard_normal(n)
    scores[rng.choice(np.argsort(-np.abs(effects))[:500], hidden, replace=False)] = 0.0
    return screen_of(scores), effects


@pytest.mark.parametrize(
    ("hidden", "seeds"), [(15, 20), *(pytest.param(h, 200, marks=pytest.mark.slow) for h in (0, 15, 60))]
)
def test_the_bound_holds_as_often_as_it_says(hidden, seeds):
    """The share of the true top that was run is at least the bound in 95 % of seeds (93 % of 200 is within chance)."""
    held, reached = [], []
    for seed in range(seeds):
        screen, effects = simulated(seed, 10_000, hidden)
        exact, ran = runs_of(effects)
        verified = verify_to_recall(screen, 400, 0.9, exact, seed).verified
        top = np.argsort(-np.abs(effects))[:400]
        share = np.isin(top, ran).mean()
        held.append(share >= verified.recall(400))
        reached.append(verified.recall(400) >= 0.9)
        assert len(ran) == len(set(ran)) == len(verified.index) <= 5000
        np.testing.assert_allclose(verified.exact, effects[verified.index])
    assert np.mean(held) >= 0.93
    assert np.mean(reached) > 0.9 if not hidden else not all(reached)


def test_many_large_nodes_are_found_with_a_twentieth_of_the_runs():
    """Where the estimates are good, a twentieth of the nodes is known to hold 95 % of the largest hundredth."""
    rng = np.random.default_rng(0)
    effects = rng.standard_t(2, 400_000) * 0.1
    screen = screen_of(effects * rng.lognormal(0, 0.2, 400_000))
    exact, ran = runs_of(effects)
    verified = verify_to_recall(screen, 4000, 0.95, exact).verified
    assert verified.recall(4000) >= 0.95
    assert np.isin(np.argsort(-np.abs(effects))[:4000], ran).mean() >= 0.95
    assert len(ran) <= 400_000 / 20


def test_looks_are_fixed_and_grow():
    several = list(looks(10_000, 400, 0.9))
    assert len(several) == LOOKS
    assert [look.largest for look in several] == [800, 1600, 3200, 6400]
    samples = [look.sample for look in several]
    assert samples[:3] == sorted(samples[:3])


def test_what_cannot_be_shown_is_said(caplog):
    screen, effects = simulated(1, 2000, 0)
    exact, ran = runs_of(effects)
    verified = verify_to_recall(screen, 10, 0.95, exact).verified
    assert "recall of 0.95 for the 10 largest of 2000 nodes takes" in caplog.text
    assert verified.recall(10) < 0.95
    assert len(ran) <= 1000
    with pytest.raises(UserError, match="recall = 1.5"):
        verify_to_recall(screen, 10, 1.5, exact)
    with pytest.raises(UserError, match="give their number as verify, from 1 to 2000"):
        verify_to_recall(screen, 0, 0.9, exact)


def test_against_the_full_sweep_of_a_model():
    model, dictionary = tiny_model(), random_dictionary("resid_post.0")
    pairs = [PromptPair("the cat sat on it", "the dog sat in it", "x", "y"), PromptPair("abcd", "abed", "r", "s")]
    every = attribute(model, dictionary, pairs, verify=10_000)
    sizes = dict(zip(every.verified.index.tolist(), np.abs(every.verified.exact), strict=True))
    k = len(sizes) // 4
    screen = attribute(model, dictionary, pairs, verify=k, recall=0.8)
    top = sorted(sizes, key=lambda node: -sizes[node])[:k]
    assert np.isin(top, screen.verified.index).mean() >= screen.verified.recall(k)
    assert len(screen.verified.index) < len(sizes)
    mine = dict(zip(screen.verified.index.tolist(), np.abs(screen.verified.exact), strict=True))
    assert all(mine[node] == pytest.approx(sizes[node], abs=1e-4) for node in mine)
