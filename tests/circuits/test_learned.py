"""Learned alignments: a planted variable is found, and nothing is found where there is none."""

from dataclasses import replace
from random import Random

import pytest
import torch
from planted_circuits import ANSWER, WIDTH, identity, pair, planted, wires
from tiny import tiny_model

import saepatch as sp
from saepatch.circuits.learned import (
    LearningOptions,
    alignment_controls,
    both_ways,
    fit_das,
    fit_dbm,
    reinitialised,
    with_random_labels,
)
from saepatch.engine.components import Directions, Heads, LatentUnits, Stream
from saepatch.errors import UserError
from saepatch.model.sites import Site

SITE = Site(0)
HOW = LearningOptions("all", steps=80, rate=0.1, sparsity=0.05)


def words(n, seed):
    """a in one prompt and b in the other, at one place, among letters that differ as well."""
    draw, pairs = Random(seed), []
    for number in range(n):
        one, other = ([draw.choice("cde") for _ in range(4)] for _ in range(2))
        one[(at := draw.randrange(4))], other[at] = "a", "b"
        pairs.append(pair("".join(one), "".join(other), str(number)))
    return pairs


TRAIN, REPORT = words(24, 0), words(40, 1)


@pytest.fixture(scope="module")
def model():
    """x is preferred to y where a rather than b stands: one direction, of two letters; three letters only distract."""
    return planted("abcde", [wires(), wires((0, ANSWER, 4.0), (1, ANSWER, -4.0))])


def test_das_finds_a_planted_direction(model):
    found = fit_das(model, SITE, TRAIN, 1, replace(HOW, steps=300))
    planted_direction = torch.zeros(WIDTH)
    planted_direction[[0, 1]] = torch.tensor([1.0, -1.0]) / 2**0.5
    assert abs(float(found.component.rows[0] @ planted_direction)) > 0.99
    assert found.accuracy(model, REPORT).value == 1.0
    assert found.loss[-1] < found.loss[0]


@pytest.mark.parametrize(
    "component", [LatentUnits(identity(0)), Stream(SITE), Directions(SITE, torch.eye(WIDTH), "dimensions")]
)
def test_dbm_finds_the_planted_units_and_no_others(model, component):
    """The exchanged units are exchanged wholly: the mask is 1, and the run is that of the patched units."""
    found = fit_dbm(model, component, TRAIN, HOW)
    assert found.units == [0, 1]
    assert found.mask[[0, 1]].tolist() == [1.0, 1.0]
    assert found.accuracy(model, REPORT).value == 1.0


def test_controls_are_at_chance(model):
    controls = alignment_controls(lambda m, pairs: fit_das(m, SITE, pairs, 1, HOW), model, TRAIN, REPORT)
    assert controls["learned"].value == 1.0
    assert controls["whole site"].value == 1.0
    assert controls["none"].value == 0.0
    for name in ("random labels", "random model"):
        assert controls[name].value <= 0.75, (name, str(controls[name]))
    assert controls["random labels"].value >= 0.25
    assert controls["random directions"].value < 0.5


def test_an_interchange_is_that_of_an_exact_patch():
    """All dimensions exchanged at one position of a random model: the patched stream."""
    model, one = tiny_model("llama"), sp.PromptPair("cat", "dot", "x", "y")
    found = fit_das(model, "resid_post.1", [one], 16, LearningOptions(2, steps=1))
    x = model.capture(model.tokenize(["dot"]), [Site(1)])[Site(1)]
    other = model.capture(model.tokenize(["cat"]), [Site(1)])[Site(1)]
    torch.testing.assert_close(found.exchanged(x, other), other, rtol=1e-4, atol=1e-4)
    exact = sp.patch_components(model, Stream(Site(1)), both_ways([one]), positions=2)
    wins = ((exact.corrupted + exact.change[:, 0]) > 0).mean()
    assert found.accuracy(model, [one]).value == wins


def test_labels_and_weights_of_the_controls(model):
    flipped = with_random_labels(TRAIN, 0)
    assert sum(a.answer != b.answer for a, b in zip(flipped, TRAIN, strict=True)) == 12
    other = reinitialised(model)
    for ours, theirs in zip(model.hf.parameters(), other.hf.parameters(), strict=True):
        torch.testing.assert_close(ours.flatten().sort().values, theirs.flatten().sort().values)


def test_what_has_no_units_is_refused(model):
    with pytest.raises(UserError, match="rank = 99"):
        fit_das(model, SITE, TRAIN, 99)
    with pytest.raises(UserError, match="Heads has no units"):
        fit_dbm(tiny_model("llama"), Heads(0, 4), [sp.PromptPair("cat", "dot", "x", "y")], LearningOptions(steps=1))
