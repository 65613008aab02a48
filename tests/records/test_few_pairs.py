"""What so few pairs, skewed changes and five control sets cannot show is said, and what holds for them is there."""

import numpy as np
import pytest

from saepatch.engine.components import Edit
from saepatch.measure.results.effects import Effects
from saepatch.model.sites import Site
from saepatch.records.statistics import (
    about_sets,
    false_discovery,
    sign_flip_test,
    studentised_max_test,
    why_no_q,
)

SITE = Site(0, "resid_post")


def effects_on(pairs: int, edits: int = 40) -> Effects:
    """One edit with a large and even effect, many with next to none, and a random control set beside each."""
    rng = np.random.default_rng(pairs)
    change = rng.normal(0, 0.01, (pairs, edits))
    change[:, 0] = 0.159 + rng.normal(0, 0.004, pairs)
    names = [Edit(SITE, (i,), role="given") for i in range(edits)]
    drawn = [Edit(SITE, (100 + i,), role="random", beside=(0,)) for i in range(5)]
    change = np.concatenate([change, rng.normal(0, 0.01, (pairs, 5))], 1)
    examples = tuple(map(str, range(pairs)))
    ran = np.ones(change.shape, dtype=bool)
    return Effects("denoise", "m", "all", (*names, *drawn), examples, np.ones(pairs), np.zeros(pairs), change, ran)


def test_no_q_is_given_where_no_single_edit_could_be_flagged():
    six = effects_on(6)
    assert np.isnan(six.q_values()).all()
    assert "no q: 40 edits tested on 6 pairs" in six.summary(3)
    assert "p = 0.031" in six.summary(3)
    assert "nan" not in six.summary(3)
    twenty = effects_on(20)
    assert twenty.q_values()[0] < 1e-3
    assert "symmetric" in twenty.summary(3)
    assert why_no_q(6, 1) == ""  # equal signs have p = 0.031
    assert why_no_q(5, 1)
    change = np.tile(np.linspace(0.9, 1.1, 8)[:, None], (1, 30))  # many at the least p may be flagged together
    assert (false_discovery(change, np.ones(change.shape, dtype=bool)) < 0.05).all()


@pytest.mark.parametrize("pairs", [1, 2, 4])
def test_summaries_of_a_pair_or_two_say_that_they_allow_no_interval(pairs):
    text = effects_on(pairs).summary(3)
    assert f"too few for an interval: n = {pairs}" in text
    assert "no q" in text
    assert "nan" not in text


def test_five_sets_say_what_they_leave_open():
    assert "up to 45% of all such sets may have a larger effect" in about_sets(5)
    assert about_sets(1).startswith("Controls: means of 1 set.")
    assert about_sets(5) in effects_on(12).summary(3)


def skewed(n: int, columns: int, trial: int) -> np.ndarray:
    return np.random.default_rng(trial).lognormal(0, 1, (n, columns)) - np.exp(0.5)


def test_the_studentised_maximum_holds_where_changes_are_skewed():
    """Changes whose mean is 0: the tests that assume symmetry flag some in most runs, the studentised one keeps 5 %."""
    flagged = {false_discovery: 0, sign_flip_test: 0, studentised_max_test: 0}
    for trial in range(20):
        change = skewed(30, 60, trial)
        for test in flagged:
            settings = {} if test is false_discovery else {"draws": 200}
            flagged[test] += np.nanmin(test(change, np.ones(change.shape, dtype=bool), **settings)) < 0.05
    assert flagged[studentised_max_test] <= 2
    assert min(flagged[false_discovery], flagged[sign_flip_test]) > 10


def test_the_studentised_maximum_finds_what_is_there():
    change = np.random.default_rng(0).normal(0, 1, (40, 200))
    change[:, [3, 70]] += np.array([1.5, -1.5])
    tested = np.ones(change.shape, dtype=bool)
    tested[9:, 5] = False
    p = studentised_max_test(change, tested, draws=500)
    assert np.flatnonzero(p <= 0.05).tolist() == [3, 70]
    assert np.isnan(p[5])
    np.testing.assert_array_equal(p, studentised_max_test(change, tested, draws=500))
    change[:, 9] = 0.0
    assert studentised_max_test(change, tested, draws=50)[9] == 1.0


def test_the_studentised_maximum_by_definition(monkeypatch):
    """Draw by draw: rows drawn from the centred changes, |mean / standard error| of each column, the largest of all."""
    n, draws = 12, 500
    change = np.random.default_rng(8).lognormal(0, 1, (n, 5)) - [1.2, 1.3, 1.4, 1.5, 1.6]
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), draws)

    def size(rows):
        return np.abs(rows.mean(0)) / (rows.std(0) / np.sqrt(n))

    centred = change - change.mean(0)
    largest = np.array([size(np.repeat(centred, each, axis=0)).max() for each in counts])
    expected = [(1 + (largest >= own).sum()) / (1 + draws) for own in size(change)]
    assert len(set(expected)) > 3
    everything = np.ones(change.shape, dtype=bool)
    np.testing.assert_allclose(studentised_max_test(change, everything, draws), expected)
    monkeypatch.setattr("saepatch.records.statistics.CELLS", 2 * draws)  # two columns at a time
    np.testing.assert_allclose(studentised_max_test(change, everything, draws), expected)
