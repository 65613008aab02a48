"""Answers of several tokens, against a loop that appends their tokens and sums log-probabilities."""

import numpy as np
import pytest
import torch
from bare_hooks import hooked
from tiny import random_dictionary, tiny_model

from saepatch.data.pairs import PromptPair
from saepatch.engine.components import Stream
from saepatch.engine.corruptions import Zero
from saepatch.engine.metrics import kl_divergence
from saepatch.errors import UserError
from saepatch.measure.attribution import GradDrop, attribute, integrated_gradients
from saepatch.measure.patching import patch_components, patch_latents
from saepatch.splicing.splice import record_latents

# several tokens against one, one against several, a common beginning, one that begins the other, and one each
PAIRS = [
    PromptPair("the cat sat", "the dog sat", "xyz", "q", "a"),
    PromptPair("one big tree", "one red tree", "p", "qr", "b"),
    PromptPair("abc", "abd", "rst", "ruv", "c"),
    PromptPair("the cow ran", "the pig ran", "mno", "mn", "d"),
    PromptPair("cde", "cdf", "k", "l", "e"),
]
METRICS = {"logit_difference": (1, -1), "log_probability": (1, 0), "cross_entropy": (-1, 0)}


def spelled(model, prompt, answer, edit=None, site=None):
    """The summed log-probability of an answer after a prompt, token by token; `edit` acts on the prompt's columns."""
    ids, total = model.encode(prompt), 0.0
    for token in model.encode(prompt + answer)[len(ids) :]:
        handle = None if edit is None else hooked(model, site, edit)
        total = total + model.hf(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)[token]
        if handle is not None:
            handle.remove()
        ids = [*ids, token]
    return total


def measured(model, pair, prompt, sums, edit=None, site=None):
    both = zip(sums, (pair.answer, pair.counter), strict=True)
    return sum(weight * spelled(model, prompt, text, edit, site) for weight, text in both if weight)


def adding(change):
    def edit(x):
        return torch.cat([x[:, : change.shape[1]] + change, x[:, change.shape[1] :]], 1)

    return edit


@pytest.mark.parametrize(
    ("metric", "direction"),
    [("logit_difference", "denoise"), ("log_probability", "noise"), ("cross_entropy", "denoise")],
)
@torch.no_grad()
def test_exact_effects_are_those_of_the_loop(metric, direction):
    model, dictionary, sums = tiny_model(), random_dictionary(), METRICS[metric]
    groups = [(3,), tuple(range(48))]
    effects = patch_latents(model, dictionary, PAIRS, groups, controls=0, metric=metric, direction=direction)
    assert effects.metric == metric
    for row, pair in enumerate(PAIRS):
        assert abs(effects.clean[row] - float(measured(model, pair, pair.clean, sums))) < 2e-5
        assert abs(effects.corrupted[row] - float(measured(model, pair, pair.corrupted, sums))) < 2e-5
        texts = (pair.corrupted, pair.clean) if direction == "denoise" else (pair.clean, pair.corrupted)
        base, source = (record_latents(model, dictionary, [text]).acts for text in texts)
        change = source - base
        change[:, 0] = 0  # BOS
        for column, group in enumerate(groups):
            moved = change[..., list(group)] @ dictionary.W_dec[list(group)]
            expected = measured(model, pair, texts[0], sums, adding(moved), dictionary.site)
            assert abs(effects.patched[row, column] - float(expected)) < 5e-5, (pair.example, group)


@torch.no_grad()
def test_each_position_is_that_of_the_loop():
    model, dictionary, pair = tiny_model(), random_dictionary(), PAIRS[2]
    effects = patch_latents(model, dictionary, [pair], [tuple(range(48))], controls=0, each_position=True)
    base, source = (record_latents(model, dictionary, [text]).acts for text in (pair.corrupted, pair.clean))
    assert [edit.position for edit in effects.edits] == [3]  # where the prompts differ
    moved = torch.cat([torch.zeros_like(base[:, :3]), (source - base)[:, 3:]], 1) @ dictionary.W_dec
    expected = measured(model, pair, pair.corrupted, (1, -1), adding(moved), dictionary.site)
    assert abs(effects.patched[0, 0] - float(expected)) < 5e-5


def test_estimates_are_the_gradient_of_the_loop():
    model, dictionary = tiny_model(), random_dictionary()
    found = attribute(model, dictionary, PAIRS, verify=3)
    score = {(p, u, t): s for p, u, t, s in zip(found.pair, found.unit, found.position, found.score, strict=True)}
    assert len(score) == len(found.score)
    for row, pair in enumerate(PAIRS):
        base, source = (record_latents(model, dictionary, [text]).acts for text in (pair.corrupted, pair.clean))
        leaf = torch.zeros(1, base.shape[1], model.d_model, requires_grad=True)
        measured(model, pair, pair.corrupted, (1, -1), adding(leaf), dictionary.site).backward()
        expected = (source - base)[0] * (leaf.grad[0] @ dictionary.W_dec.T)
        for place, unit in expected[1:].nonzero().tolist():
            assert abs(score.get((row, unit, place + 1), 0.0) - float(expected[place + 1, unit])) < 1e-4


def test_integrated_gradients_are_complete_over_all_tokens():
    model, dictionary = tiny_model(), random_dictionary()
    latents, rest = integrated_gradients(model, dictionary, PAIRS, steps=20)
    whole = patch_components(model, Stream(dictionary.site), PAIRS)
    expected = whole.patched[:, 0] - whole.corrupted
    np.testing.assert_allclose((latents.sum(-1) + rest).numpy(), expected, atol=0.02 * abs(expected).max())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"metric": kl_divergence()},
            "answer 'xyz' of pair a has 3 tokens, and kl_divergence.* takes one: use logit_d",
        ),
        ({"metric": "probability"}, "and probability takes one"),
        ({"metric": "answer_rank"}, "and answer_rank takes one"),
        ({"metric": lambda logits, batch: logits[:, 0]}, "takes one"),
        ({"align": "right"}, "aligned from the right take one"),
        ({"corruption": Zero()}, "takes one: give corrupted prompts"),
        ({"method": GradDrop()}, "graddrop takes answers of one token"),
    ],
)
def test_what_takes_one_token_says_so(options, message):
    with pytest.raises(UserError, match=message):
        attribute(tiny_model(), random_dictionary(), PAIRS, **options)


def test_an_answer_must_add_tokens_of_its_own():
    with pytest.raises(UserError, match="answer '' does not follow"):
        patch_latents(tiny_model(), random_dictionary(), [PromptPair("abc", "abd", "", "x")], [1])
