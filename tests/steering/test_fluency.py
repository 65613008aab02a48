"""What an edit costs: log-probabilities, divergence, repetition."""

import math

import pytest
import torch
from tiny import random_dictionary, tiny_model

from saepatch.errors import UserError
from saepatch.splicing.interventions import Steer
from saepatch.splicing.splice import splice
from saepatch.steering.fluency import continuation_kl, continuation_nll, distinct, loops, perplexity, repetition

PROMPTS = ["the cat sat", "a dog", "birds"]


def continuations(model):
    return [model.encode(text)[1:] for text in ("on it", "x", "")]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_nll_of_padded_batches_is_that_of_each_text_alone(family):
    model = tiny_model(family)
    new = continuations(model)
    found = continuation_nll(model, PROMPTS, new, batch_size=2)
    for prompt, row, value in zip(PROMPTS, new, found, strict=True):
        before = model.encode(prompt)
        log_p = model.hf(input_ids=torch.tensor([[*before, *row]]), use_cache=False).logits[0].log_softmax(-1)
        places = range(len(before) - 1, len(before) - 1 + len(row))
        assert value == pytest.approx(-sum(float(log_p[at, t]) for at, t in zip(places, row, strict=True)), rel=1e-4)
    assert perplexity(model, PROMPTS, new) == pytest.approx(math.exp(sum(found) / 6))


@pytest.mark.parametrize("positions", ["all", "last", "generated"])
def test_divergence_has_the_positions_of_generation(positions):
    model, dictionary = tiny_model(), random_dictionary()
    new = continuations(model)
    found = continuation_kl(
        model, splice(model, dictionary, Steer(3, 2.0, positions=positions)), PROMPTS, new, batch_size=2
    )
    for prompt, row, value in zip(PROMPTS[:2], new, found, strict=False):
        n = len(model.encode(prompt))
        where = {"all": slice(1, None), "last": n - 1, "generated": slice(n, None)}[positions]
        ids = torch.tensor([[*model.encode(prompt), *row]])
        tokens = model.pad(ids.tolist())
        plain = model.logits(tokens)[0].log_softmax(-1)
        if positions == "generated" and len(row) == 1:
            continue  # nothing that is predicted has seen a generated token
        with splice(model, dictionary, Steer(3, 2.0, positions=where)):
            edited = model.logits(tokens)[0].log_softmax(-1)
        kl = (plain.exp() * (plain - edited)).sum(-1)[n - 1 : -1]
        assert value == pytest.approx(float(kl.mean()), rel=1e-3, abs=1e-6)
        assert value > 0
    assert math.isnan(found[2])


def test_no_edit_diverges_nowhere():
    model, dictionary = tiny_model(), random_dictionary()
    found = continuation_kl(model, splice(model, dictionary, Steer(3, 0.0)), PROMPTS[:2], continuations(model)[:2])
    assert found == pytest.approx([0, 0], abs=1e-6)
    with pytest.raises(UserError, match="all continuations are empty"):
        continuation_kl(model, splice(model, dictionary, Steer(3, 0.0)), ["a"], [[]])


def test_repetition():
    assert distinct([1, 2, 1, 2], 1) == 0.5
    assert distinct([1, 2, 1, 2], 2) == pytest.approx(2 / 3)
    assert math.isnan(distinct([1], 2))
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([1] * 7) == 0.75
    assert loops([5, 1, 2, 1, 2, 1, 2, 1, 2])
    assert not loops([5, 1, 2, 1, 2, 1, 2, 1])
    assert not loops([])
