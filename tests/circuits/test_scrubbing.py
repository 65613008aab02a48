"""Causal scrubbing of a planted OR: the true hypothesis costs nothing, wrong ones what is enumerated."""

import numpy as np
import pytest
import torch
from planted_circuits import ANSWER, identity, planted, relus, wires
from tiny import tiny_model

import saepatch as sp
from saepatch.circuits.scrubbing import Exact, Fixed, HypothesisNode, Matching, Unconditional, scrub
from saepatch.engine.components import Heads, LatentUnits, Stream
from saepatch.model.sites import Site

# `a` and `b` each write a dimension, other letters nothing that matters; dimension 10 is a OR b
INPUTS = [first + second for first in "acde" for second in "bcde"]


def either(text):
    return "a" in text or "b" in text


@pytest.fixture(scope="module")
def model():
    return planted(
        "abcde", [wires(), wires((0, 12, 1.0), (1, 13, 1.0)), gate(), relus(({10: 1.0}, 0.0, {ANSWER: 6.0}))]
    )


def gate():
    """min(1, gathered a + gathered b) at dimension 10."""
    return relus(({12: 1.0, 13: 1.0}, 0.0, {10: 1.0}), ({12: 1.0, 13: 1.0}, -1.0, {10: -1.0}))


def labels(model):
    return [model.encode("x" if either(text) else "y")[-1] for text in INPUTS]


OR = LatentUnits(identity(2), ids=(10,))


def losses(model, inputs):
    logits = model.next_logits(model.tokenize(inputs)).double().log_softmax(-1)
    return logits


def test_the_true_hypothesis_costs_nothing(model):
    """The site of the OR at the last position, from the input's OR alone; everything else is drawn anew."""
    result = scrub(model, [HypothesisNode(OR, either, position=-1)], INPUTS, labels(model))
    np.testing.assert_allclose(result.scrubbed, result.model, atol=1e-5)
    assert result.recovered.value == pytest.approx(1.0, abs=1e-4)
    assert result.vacuous == ()
    assert result.samplers == ("matching", "unconditional together")


def test_a_constant_feature_gives_the_enumerated_loss(model):
    result = scrub(model, [HypothesisNode(OR, lambda _: 0, position=-1)], INPUTS, labels(model), seed=3)
    drawn = dict(result.draws)["resid_post.2 latent at -1"]
    logits = losses(model, [INPUTS[i] for i in drawn])
    expected = -logits[range(len(INPUTS)), labels(model)].numpy()
    np.testing.assert_allclose(result.scrubbed, expected, atol=1e-5)
    draws = [
        scrub(model, [HypothesisNode(OR, lambda _: 0, position=-1)], INPUTS, labels(model), seed=s) for s in range(25)
    ]
    shares = [(some.scrubbed - some.random).mean() / (some.model - some.random).mean() for some in draws]
    assert abs(np.mean(shares)) < 0.3  # 0 in expectation
    every = -losses(model, INPUTS)[:, labels(model)].mean(1).numpy()
    np.testing.assert_allclose(result.random, every, atol=1e-9)


def test_an_identity_feature_changes_nothing_and_is_called_vacuous(model, caplog):
    result = scrub(model, [HypothesisNode(OR, lambda text: text, position=-1)], INPUTS, labels(model))
    np.testing.assert_allclose(result.scrubbed, result.model, atol=1e-5)
    assert result.vacuous == (("resid_post.2 latent at -1", 1.0),)
    assert "tests nothing" in caplog.text
    assert "100% of inputs match no other" in result.summary()


def test_children_run_on_inputs_of_their_own(model):
    """The OR from what is gathered of `a` and of `b`, each drawn by itself: one activation, two inputs."""
    gathered = identity(1)
    kids = tuple(
        HypothesisNode(LatentUnits(gathered, ids=(12 + i,)), lambda text, letter=letter: letter in text, position=-1)
        for i, letter in enumerate("ab")
    )
    claims = [HypothesisNode(OR, either, position=-1, children=kids)]
    result = scrub(model, claims, INPUTS, labels(model))
    np.testing.assert_allclose(result.scrubbed, result.model, atol=1e-5)
    assert len(result.draws) == 3
    assert not np.array_equal(result.draws[1][1], result.draws[2][1])
    one = [HypothesisNode(OR, either, position=-1, children=kids[:1])]  # `b` is said not to matter
    assert scrub(model, one, INPUTS, labels(model)).recovered.value < 0.9


def test_units_drawn_apart_no_longer_go_together():
    """`a` and `b` always come together, and the model answers their AND: independent draws show that both matter."""
    both = planted("abc", [wires(), (wires((0, 3, 1.0), (1, 4, 1.0)), *relus(({3: 1.0, 4: 1.0}, -1.0, {ANSWER: 6.0})))])
    inputs = ["ab", "cc"] * 20
    ids = [both.encode("x" if text == "ab" else "y")[-1] for text in inputs]
    letters = LatentUnits(identity(0), ids=(0, 1))
    apart = scrub(both, [], inputs, ids, apart=[letters])
    draws = dict(apart.draws)
    assert apart.samplers == ("unconditional together", "unconditional independent")
    first, second = (draws[f"resid_post.0 latent {unit}"] for unit in (0, 1))
    assert not np.array_equal(first, second)
    on = [[inputs[i] == "ab" for i in drawn] for drawn in (first, second)]
    with torch.no_grad():
        logits = torch.stack([
            both.next_logits(both.tokenize(["ab" if a and b else "cc"]))[0] for a, b in zip(*on, strict=True)
        ])  # fmt: skip
    expected = -logits.double().log_softmax(-1)[range(40), ids].numpy()
    np.testing.assert_allclose(apart.scrubbed, expected, atol=1e-5)
    assert sum(a and b for a, b in zip(*on, strict=True)) < 15  # a quarter, not a half
    named = [
        HypothesisNode(letters, lambda text: text, units=(0, 1))
    ]  # what a claim names is drawn for the claim alone
    np.testing.assert_allclose(scrub(both, named, inputs, ids, apart=[letters]).scrubbed, apart.model, atol=1e-5)
    # named at one position, drawn apart at the others, where it is 0 in all inputs
    placed = [HypothesisNode(letters, lambda text: text, units=(unit,), position=1 + unit) for unit in (0, 1)]
    np.testing.assert_allclose(scrub(both, placed, inputs, ids, apart=[letters]).scrubbed, apart.model, atol=1e-5)
    with pytest.raises(sp.UserError, match="shares its site with the stream drawn apart"):
        scrub(both, named, inputs, ids, apart=[Stream(Site(0))])


def test_images_at_tokens_that_a_dictionary_was_not_trained_on_are_left_out(model):
    partly = identity(0)
    partly.sae.cfg.metadata.exclude_special_tokens = model.encode("a")[1:]
    inputs = ["ab", "cb", "ac", "cc"]
    ids = model.encode("xyxy")[1:]
    image = LatentUnits(partly, ids=(0, 1, 2))
    moved = HypothesisNode(
        image, len, sampler=Fixed(2)
    )  # from "ac": its first token is unknown, so `b` alone is replaced
    ours = scrub(model, [moved], inputs, ids, others=Exact())
    expected = -losses(model, ["ac", "cc", "ac", "cc"])[range(4), ids].numpy()
    np.testing.assert_allclose(ours.scrubbed, expected, atol=1e-5)
    with pytest.raises(sp.UserError, match="not trained on a token that is there"):
        scrub(model, [HypothesisNode(image, len, position=1)], inputs, ids)


def test_samplers_and_seeds(model):
    claims = [HypothesisNode(OR, either, position=-1)]
    first, again, other = (scrub(model, claims, INPUTS, labels(model), seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.draws[0][1], again.draws[0][1])
    assert not np.array_equal(first.draws[0][1], other.draws[0][1])
    features, rng, references = [either(text) for text in INPUTS], np.random.default_rng(0), np.arange(len(INPUTS))
    assert (Exact().draw(references, features, rng) == references).all()
    assert (Fixed(3).draw(references, features, rng) == 3).all()
    drawn = Matching().draw(np.repeat(references, 50), features, rng)
    assert [features[i] for i in drawn] == [features[i] for i in np.repeat(references, 50)]
    assert set(Unconditional().draw(np.repeat(references, 50), features, rng)) == set(range(len(INPUTS)))


def test_everything_exact_is_the_model_in_a_transformer():
    model = tiny_model("llama")
    streams = [HypothesisNode(Stream(Site(layer, "attn_out")), len, position=-1, sampler=Exact()) for layer in (0, 2)]
    inputs = ["abc", "bca", "xyz"]
    result = scrub(model, streams, inputs, [70, 71, 72], others=Exact(), batch_size=2)
    np.testing.assert_allclose(result.scrubbed, result.model, atol=1e-5)
    heads = [HypothesisNode(Heads(1, 4), len, units=(0, 2), sampler=Exact())]  # of the four heads, two
    same = scrub(model, heads, inputs, [70, 71, 72], others=Exact())
    np.testing.assert_allclose(same.scrubbed, same.model, atol=1e-5)
    assert np.abs(scrub(model, heads, inputs, [70, 71, 72], others=Fixed(1)).scrubbed - same.model).max() > 1e-3
    moved = scrub(model, streams, inputs, [70, 71, 72], others=Fixed(1))
    assert np.abs(moved.scrubbed - moved.model)[[0, 2]].max() > 1e-3


def test_claims_that_cannot_be_are_refused(model):
    with pytest.raises(sp.UserError, match="children lie at earlier sites"):
        HypothesisNode(OR, either, children=(HypothesisNode(OR, either),))
    with pytest.raises(sp.UserError, match="give equal lengths"):
        scrub(model, [], ["a", "ab"], [70, 70])
    with pytest.raises(sp.UserError, match="1 labels for 2 inputs"):
        scrub(model, [], ["a", "b"], [70])
    assert torch.is_grad_enabled()
