"""What a screen reports: means, ranking and rows against their definitions, and the bound on what it missed."""

from dataclasses import replace

import numpy as np
import pytest
from tiny import random_dictionary, tiny_model

from saepatch.attribution import attribute
from saepatch.errors import UserError
from saepatch.prompts import PromptPair
from saepatch.screen import Verification

PAIRS = [
    PromptPair("the cat sat", "the dog sat", "x", "y"),
    PromptPair("one big tree", "one red tree", "p", "q"),
    PromptPair("abc", "abd", "r", "s"),
]


def test_means_ranking_and_rows():
    model, several = tiny_model(), [random_dictionary("resid_post.0"), random_dictionary("resid_post.1", seed=1)]
    found = attribute(model, several, PAIRS, direction="noise", verify=4, sample=4)
    by_hand: dict = {}
    for node, score in enumerate(found.score):
        edit = found.edit(node)
        key = (edit.site, edit.kind, edit.units, edit.position)
        by_hand[key] = by_hand.get(key, 0) + score / len(PAIRS)
    edits, means = found.means()
    got = {(e.site, e.kind, e.units, e.position): m for e, m in zip(edits, means, strict=True)}
    assert got == pytest.approx(by_hand)
    edits, means = found.means(each_position=False)
    assert {e.position for e in edits} == {None}
    for edit, mean in zip(edits, means, strict=True):
        alike = [v for k, v in by_hand.items() if k[:3] == (edit.site, edit.kind, edit.units)]
        assert mean == pytest.approx(sum(alike))
    gap = found.gap.mean()
    best = sorted(by_hand.items(), key=lambda item: -item[1] / gap)
    assert [(e.site, e.kind, e.units, e.position) for e in found.top(3)] == [key for key, _ in best[:3]]
    largest = max(by_hand, key=lambda key: abs(by_hand[key]))
    top = found.top(1, by_size=True)[0]
    assert (top.site, top.kind, top.units, top.position) == largest
    rows = found.rows("task")
    assert len(rows) == len(found) + 8
    assert {row.method for row in rows} == {"first order", "exact"}
    for node, row in enumerate(rows[: len(found)]):
        pair = int(found.pair[node])
        assert row.patched == pytest.approx(found.clean[pair] - found.score[node])
        assert row.effect == pytest.approx(found.score[node] / found.gap[pair])
        assert (row.component == "error") == (row.latent == "")
    summary = found.summary(3)
    assert "first order" in summary
    assert f"{len(found)} nodes differ" in summary
    assert "4 drawn at random" in summary


def test_what_a_screen_may_have_missed():
    """The bound is that of Clopper and Pearson: with none of R found, `1 - 0.05 ** (1 / R)` of the others."""
    exact = np.array([5.0, -4.0, 0.1, *([0.5] * 20)])
    verified = Verification(np.arange(23), exact, exact, 3, 1020)
    assert verified.threshold(2) == 4
    assert verified.threshold() == pytest.approx(0.1)
    found, share, most = verified.missed(2)
    assert found == 0
    assert share == pytest.approx(1 - 0.05 ** (1 / 20))
    assert most == pytest.approx(1000 * share)
    assert verified.missed() == (20, 1.0, 1000.0)
    one = replace(verified, exact=np.array([5.0, -4.0, 3.0, 6.0, *([0.5] * 19)]))
    assert one.missed()[1] == pytest.approx(0.2161, abs=1e-4)  # the usual tables: 1 of 20
    assert replace(verified, others=20).missed()[2] == 0
    text = one.summary()
    assert "3 nodes with the largest estimates, and 20 drawn at random from the other 1020" in text
    assert "1 of the 20 drawn" in text
    assert "at most 216 are" in text
    for bad in (0, 4):
        with pytest.raises(UserError, match="k = "):
            verified.threshold(bad)
    with pytest.raises(UserError, match="random sample"):
        Verification(np.arange(3), exact[:3], exact[:3], 3, 0).missed()


def test_bound_holds_as_often_as_it_says():
    """Draw samples of a population in which 40 of 1000 are large, many times: the bound is below 40 in few of them."""
    population = np.where(np.arange(1000) < 40, 2.0, 0.0)
    rng, below = np.random.default_rng(0), 0
    for _ in range(400):
        drawn = rng.permutation(1000)[:100]
        verified = Verification(np.arange(101), np.concatenate([[1.0], population[drawn]]), np.zeros(101), 1, 1000)
        large, _, most = verified.missed()
        below += most < 40 - large
    assert below <= 0.05 * 400


def test_correlations_with_exact_effects():
    estimated = np.array([3.0, 2.0, 1.0, 0.0, 5.0])
    verified = Verification(np.arange(5), np.array([6.0, 4.0, 2.0, 0.0, 1.0]), estimated, 2, 3)
    assert verified.pearson() == pytest.approx(np.corrcoef(verified.exact, estimated)[0, 1])
    assert verified.spearman(sample_only=True) == pytest.approx(0.5)
    assert np.isnan(replace(verified, exact=np.zeros(5)).pearson())
    sizes = replace(verified, exact=np.array([6.0, -4.0, -2.0, 0.0, 1.0]), sizes=True)
    assert sizes.pearson() == pytest.approx(verified.pearson())
    assert "estimated sizes" in sizes.summary()
