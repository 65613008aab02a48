"""What a screen reports: means, ranking and rows against their definitions, and the bound on what it missed."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import hypergeom
from tiny import random_dictionary, tiny_model

from saepatch.data.pairs import PromptPair
from saepatch.errors import UserError
from saepatch.measure.attribution import GradDrop, attribute
from saepatch.measure.results.effects import describe
from saepatch.measure.results.screen import Verification
from saepatch.runs.commands.screens import _top

pytestmark = pytest.mark.whole

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
    sizes = np.abs(found.score)
    again = found.verify(16, 0, lambda edits: np.zeros(len(edits)))
    assert sorted(sizes[again.verified.index]) == sorted(sizes)[-16:]
    assert found.score[again.verified.index].min() < 0  # the largest by size, of either sign
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


def test_sizes_have_no_direction():
    """GradDrop: the largest sizes come first whichever way the gap goes, and do not move the metric anywhere."""
    model, dictionary = tiny_model(), random_dictionary("resid_post.0")
    turned = [PromptPair(p.corrupted, p.clean, p.answer, p.counter) for p in PAIRS]
    signs = set()
    for pairs in (PAIRS, turned):
        found = attribute(model, dictionary, pairs, method=GradDrop(), verify=4)
        edits, means = found.means()
        assert found.top(3) == [edits[i] for i in np.argsort(-means, kind="stable")[:3]] == found.top(3, by_size=True)
        np.testing.assert_allclose(found.normalised, found.score / np.abs(found.gap[found.pair]))
        signs.add(np.sign(found.gap.mean()))
        rows = found.rows("task")
        assert all(np.isnan(row.patched) and row.effect >= 0 for row in rows[: len(found)])
        for row, exact, node in zip(rows[len(found) :], found.verified.exact, found.verified.index, strict=True):
            assert row.patched == pytest.approx(found.corrupted[found.pair[node]] + exact)
            assert row.effect == pytest.approx(exact / found.gap[found.pair[node]])
        assert "-" not in found.summary(3).splitlines()[1].split()[-1]
        best = _top(found)[:3]
        assert [(one["latent"], one["position"]) for one in best] == [(describe(e), e.position) for e in found.top(3)]
        assert best[0]["effect"] == pytest.approx(means.max() / abs(found.gap.mean()))
    assert signs == {1, -1}


def test_what_a_screen_may_have_missed():
    """The bound is the largest number of large nodes with which so few would be drawn with a chance above 5 %."""
    exact = np.array([5.0, -4.0, 0.1, *([0.5] * 20)])
    verified = Verification(np.arange(23), exact, exact, 3, 1020)
    assert verified.threshold(2) == 4
    assert verified.threshold() == pytest.approx(0.1)
    found, share, most = verified.missed(2)
    assert found == 0
    assert hypergeom.cdf(0, 1020, most, 20) > 0.05 >= hypergeom.cdf(0, 1020, most + 1, 20)
    assert share == most / 1000
    assert verified.missed() == (20, 1.0, 1000.0)
    one = replace(verified, exact=np.array([5.0, -4.0, 3.0, 6.0, *([0.5] * 19)]))
    most = one.missed()[2]
    assert hypergeom.cdf(1, 1020, most + 1, 20) > 0.05 >= hypergeom.cdf(1, 1020, most + 2, 20)
    assert replace(verified, others=20).missed() == (20, 0.0, 0.0)
    text = one.summary()
    assert "3 nodes with the largest estimates, and 20 drawn at random from the other 1020" in text
    assert "1 of the 20 drawn" in text
    assert f"of the 1000 nodes that were not run, at most {int(most)} are ({most / 1000:.2%}, 95 % confidence)" in text
    for bad in (0, 4):
        with pytest.raises(UserError, match="k = "):
            verified.threshold(bad)
    with pytest.raises(UserError, match="random sample"):
        Verification(np.arange(3), exact[:3], exact[:3], 3, 0).missed()


def failures(parts, draws=2000):
    """How often the bound is below what was not drawn; `parts` say of each its nodes, the large ones, and draws."""
    rng, below = np.random.default_rng(0), 0
    sampled = tuple((drawn, others) for others, _, drawn in parts)
    found = np.stack([rng.hypergeometric(large, others - large, drawn, draws) for others, large, drawn in parts], 1)
    missed, total = {}, sum(large for _, large, _ in parts)
    for one in map(tuple, found.tolist()):
        if one not in missed:
            exact = np.concatenate([[1.0], *(np.arange(n) < k for k, (n, _) in zip(one, sampled, strict=True))])
            index, others = np.arange(len(exact)), sum(n for n, *_ in parts)
            missed[one] = Verification(index, exact, exact, 1, others, parts=sampled).missed()
        assert missed[one][0] == sum(one)
        below += missed[one][2] < total - sum(one)
    return below / draws


@pytest.mark.parametrize(
    "parts",
    [
        [(1000, 40, 100)],
        [(200, 3, 100)],  # many of few were drawn: the large ones left are not a share of all
        [(200, 3, 100), (60, 0, 60)],  # nothing is unknown of the second part
        [(50, 0, 50), (5000, 100, 50)],  # one part at 100 %, one at 1 %
        [(100, 2, 50), (2000, 100, 20), (30, 1, 10)],
    ],
    ids=str,
)
def test_bound_holds_as_often_as_it_says(parts):
    assert failures(parts) <= 0.05 + 2 * (0.05 * 0.95 / 2000) ** 0.5


def test_bound_of_several_parts_is_the_sum_of_theirs():
    exact = np.array([2.0, *([0.0] * 30)])
    verified = Verification(np.arange(31), exact, exact, 1, 700, parts=((20, 200), (10, 500)))
    apart = [Verification(np.arange(n + 1), exact[: n + 1], exact[: n + 1], 1, of) for n, of in verified.parts]
    assert verified.missed()[2] == sum(one.missed(level=0.975)[2] for one in apart)
    assert verified.missed()[1] == verified.missed()[2] / 670
    unseen = replace(verified, parts=((30, 200), (0, 500)))  # nothing was drawn there
    assert unseen.missed()[2] >= 500


def test_correlations_with_exact_effects():
    estimated = np.array([3.0, 2.0, 1.0, 0.0, 5.0])
    verified = Verification(np.arange(5), np.array([6.0, 4.0, 2.0, 0.0, 1.0]), estimated, 2, 3)
    assert verified.pearson() == pytest.approx(np.corrcoef(verified.exact, estimated)[0, 1])
    assert verified.spearman(sample_only=True) == pytest.approx(0.5)
    assert np.isnan(replace(verified, exact=np.zeros(5)).pearson())
    sizes = replace(verified, exact=np.array([6.0, -4.0, -2.0, 0.0, 1.0]), sizes=True)
    assert sizes.pearson() == pytest.approx(verified.pearson())
    assert "estimated sizes" in sizes.summary()
