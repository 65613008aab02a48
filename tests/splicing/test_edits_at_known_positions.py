"""Edits and sweeps leave out tokens that a dictionary was not trained on, and say so; what names one is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import random_dictionary, tiny_model

from saepatch.data.pairs import PromptPair
from saepatch.dictionaries import dictionary as module
from saepatch.engine.components import Edit
from saepatch.errors import UserError
from saepatch.measure.attribution import attribute
from saepatch.measure.patching import patch_edits, patch_latents
from saepatch.model.positions import At
from saepatch.splicing.interventions import Steer
from saepatch.splicing.splice import record_latents, splice

PAIRS = [PromptPair("the hen, sat", "the cow, sat", "x", "y"), PromptPair("one dog, ran", "one cat, ran", "x", "y")]


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3", seed=4)


@pytest.fixture(scope="module")
def comma(model):
    return model.encode(",")[1]  # stands for a chat marker; at position 8, after the tokens that differ


@pytest.fixture
def dictionary(comma):
    dictionary = random_dictionary("resid_post.0", "standard")
    dictionary.sae.cfg.metadata.exclude_special_tokens = [comma]
    return dictionary


def test_a_steered_run_leaves_them_out(model, dictionary, comma, caplog):
    tokens = model.tokenize([pair.clean for pair in PAIRS])
    with splice(model, dictionary, Steer(3, 2.0)):
        ours = model.logits(tokens)
        again = model.logits(tokens)
    torch.testing.assert_close(ours, again)
    assert caplog.text.count("was not trained on (',')") == 1
    where = tokens.ordinary & (tokens.input_ids != comma)
    plain = random_dictionary("resid_post.0", "standard")
    with splice(model, plain, Steer(3, 2.0, positions=where)):
        torch.testing.assert_close(ours, model.logits(tokens))
    with splice(model, plain, Steer(3, 2.0)):
        everywhere = model.logits(tokens)
    with splice(model, replace(dictionary, every_position=True), Steer(3, 2.0)):
        torch.testing.assert_close(everywhere, model.logits(tokens))
    assert (everywhere - ours).abs().max() > 1e-3


@pytest.mark.parametrize("positions", [8, At(","), "last", slice(7, 9)])
def test_a_position_that_names_one_is_refused(model, dictionary, positions):
    tokens = model.tokenize(["the hen,"])
    with (
        pytest.raises(UserError, match="not trained on.*every_position=True"),
        splice(model, dictionary, Steer(3, 2.0, positions=positions)),
    ):
        model.logits(tokens)


def test_sweeps_and_screens_leave_them_out(model, dictionary, comma, caplog):
    plain = random_dictionary("resid_post.0", "standard")
    ours, all_of_them = (patch_latents(model, d, PAIRS, each_position=True) for d in (dictionary, plain))
    assert "2 of 24 positions hold tokens" in caplog.text
    assert 8 in {edit.position for edit in all_of_them.edits}
    kept = [number for number, edit in enumerate(all_of_them.edits) if edit.position != 8]
    assert ours.edits == tuple(all_of_them.edits[number] for number in kept)
    np.testing.assert_allclose(ours.patched, all_of_them.patched[:, kept], atol=1e-5)
    mine, theirs = (attribute(model, d, PAIRS) for d in (dictionary, plain))
    assert set(mine.position.tolist()) == set(theirs.position.tolist()) - {8}
    opened = patch_latents(model, replace(dictionary, every_position=True), PAIRS, each_position=True)
    assert opened.edits == all_of_them.edits
    for sweep in (patch_latents, attribute):
        with pytest.raises(UserError, match="positions 8 select tokens"):
            sweep(model, dictionary, PAIRS, positions=8)
    latent = int(record_latents(model, plain, model.tokenize([PAIRS[0].clean])).acts[0, 8].argmax())
    with pytest.raises(UserError, match="an edit at position 8 of pair"):
        patch_edits(model, dictionary, PAIRS, [(0, Edit(dictionary.site, (latent,), 8))])


def test_special_tokens_are_looked_up_once(model, dictionary, monkeypatch):
    dictionary.sae.cfg.metadata.exclude_special_tokens = True
    calls, plain = [], module._special_tokens.__wrapped__
    module._special_tokens.cache_clear()
    monkeypatch.setattr("sae_lens.util.get_special_token_ids", lambda tokenizer: calls.append(1) or [0, 1, 2])
    for _ in range(3):
        assert dictionary.excluded_tokens(model) == (0, 1, 2)
    assert len(calls) == 1
    module._special_tokens.cache_clear()
    assert plain(model.tokenizer) == (0, 1, 2)


def test_activations_that_are_not_finite_are_named(model):
    """In sweeps and splices as in statistics, with site, text and position."""
    broken, dictionary = (
        tiny_model("gpt2", seed=1, tie_word_embeddings=False),
        random_dictionary("resid_pre.0", "standard"),
    )
    with torch.no_grad():
        broken.hf.transformer.wte.weight[broken.encode("w")[1]] = float("inf")
    named = r"activations at resid_pre\.0 of tiny-gpt2 are NaN or infinite in '<bos>the cow.*at position 7 \('w'\)"
    for sweep in (patch_latents, attribute):
        with pytest.raises(UserError, match=named):
            sweep(broken, dictionary, PAIRS)
    with pytest.raises(UserError, match=named), splice(broken, dictionary, Steer(3, 1.0)):
        broken.logits(broken.tokenize(["the cow"]))
    tokens = broken.tokenize(["the cat"])
    with splice(broken, dictionary, Steer(3, 1.0)):
        cache = broken.new_cache()
        broken.call(tokens, cache=cache)
        with pytest.raises(UserError, match=r"at position 8 \('w'\)"):
            broken.call(broken.tokenize(["the catw"]), 8, cache=cache)
