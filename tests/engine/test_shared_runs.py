"""Sweeps that share their base runs give the numbers of sweeps that do not, also when the model changes in between."""

import numpy as np
import pytest
from tiny import random_dictionary, tiny_model

from saepatch.data.pairs import PromptPair
from saepatch.engine.passes import shared_runs as module
from saepatch.engine.passes.kept_run import KeptRun
from saepatch.engine.passes.shared_runs import shared_runs
from saepatch.measure.patching import patch_latents, patch_streams

DIRECTIONS = ("denoise", "noise")
PAIRS = [PromptPair("the cat sat on it", "the dog sat in it", "x", "y"), PromptPair("abcdef", "abcdxf", "x", "y")]


@pytest.fixture(scope="module")
def subject():
    model = tiny_model("gpt2")
    return model, random_dictionary("resid_post.0"), PAIRS


@pytest.fixture
def passes(monkeypatch):
    """The numbers of rows of all base runs."""
    rows, start = [], KeptRun.__init__

    def counted(self, model, tokens, *args, **kwargs):
        rows.append(len(tokens))
        start(self, model, tokens, *args, **kwargs)

    monkeypatch.setattr(KeptRun, "__init__", counted)
    return rows


def sweeps(model, dictionary, pairs):
    latents = [[0, 3], [5], [2, 7, 11]]
    by_latents = [patch_latents(model, dictionary, pairs, latents, direction=d).patched for d in DIRECTIONS]
    by_site = [patch_streams(model, pairs, direction=d, each_position=True).patched for d in DIRECTIONS]
    return [*by_latents, *by_site]


@pytest.mark.parametrize("small", [512, 1])
def test_sharing_changes_no_number_and_saves_runs(subject, passes, monkeypatch, small):
    monkeypatch.setattr("saepatch.engine.sweep.SMALL", small)
    alone = sweeps(*subject)
    each = len(passes)
    with shared_runs():
        for _ in range(2):
            for one, other in zip(alone, sweeps(*subject), strict=True):
                np.testing.assert_array_equal(one, other)
    assert len(passes) - each < each  # for two rounds
    inside = len(passes)
    sweeps(*subject)
    assert len(passes) - inside == each  # nothing is shared after the block


def test_a_change_of_the_model_is_noticed(subject):
    model, dictionary, pairs = subject
    with shared_runs():
        before = sweeps(model, dictionary, pairs)
        weight = model.layout.blocks[0].mlp.c_fc.weight
        weight.data[0] += 0.5  # the tensor's version does not count it
        try:
            after = sweeps(model, dictionary, pairs)
        finally:
            weight.data[0] -= 0.5
    weight.data[0] += 0.5
    try:
        expected = sweeps(model, dictionary, pairs)
    finally:
        weight.data[0] -= 0.5
    for one, other in zip(after, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.allclose(before[0], after[0])


def test_memory_is_bounded(subject, passes):
    model, dictionary, pairs = subject
    with shared_runs(memory=1):
        expected = patch_latents(model, dictionary, pairs, [[0, 3]]).patched
        first = len(passes)
        np.testing.assert_array_equal(patch_latents(model, dictionary, pairs, [[0, 3]]).patched, expected)
        assert len(passes) == 2 * first
        shared = module._CURRENT.get()
        assert shared is not None
        assert not shared._runs
    assert module._CURRENT.get() is None
