"""A model that is known to hold an AND and an OR: each direction of patching finds what it can find, and no more."""

import numpy as np
import pytest
from and_or import AND, D_SAE, LATENTS, OR, OTHERS, SCALE, SITE, and_or_dictionary, and_or_model, and_or_pairs

from saepatch.engine.components import Edit
from saepatch.engine.corruptions import Zero
from saepatch.measure.patching import patch_latents

FOUND_BY = {"noise": AND, "denoise": OR}  # necessary: any member of the AND; sufficient: any member of the OR


def ids(letters):
    return tuple(LATENTS[letter] for letter in letters)


def sweep(direction, latents=None, n=60, **options):
    return patch_latents(and_or_model(), and_or_dictionary(), and_or_pairs(n), latents, direction=direction, **options)


def test_the_model_computes_what_it_was_made_for():
    model, dictionary = and_or_model(), and_or_dictionary()

    def answer(text):
        return float(model.next_logits(model.tokenize([text]))[0, model.encode("x")[-1]])

    for text, expected in [
        ("PQRS", 2.0), ("PQ", 1.0), ("SR", 1.0), ("R", 1.0), ("s", 1.0), ("P", 0.0), ("Q..", 0.0), ("pq", 0.5),
        ("Pq", 0.75), ("P.RQ", 2.0), ("....", 0.0),
    ]:  # fmt: skip
        assert answer(text) == pytest.approx(SCALE * expected, abs=1e-5), text
    assert 0 < abs(answer(OTHERS)) < 1
    pairs = and_or_pairs(20)
    assert pairs == and_or_pairs(20) != and_or_pairs(20, seed=1)
    assert all(sorted(AND + OR) == sorted(c.upper() for c in p.clean if c.upper() in AND + OR) for p in pairs)
    assert not any(c.upper() in AND + OR for p in pairs for c in p.corrupted)
    held = dictionary.encode(model.hf.embed(model.tokenize([AND + OR + OTHERS + "."]).input_ids)).acts[0, 1:]
    assert held.argmax(-1).tolist() == [LATENTS[c] for c in AND + OR + OTHERS + "."]
    assert (held > 0).sum().item() == 13


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_single_latents(direction):
    """Noising finds both members of the AND, each alone, and none of the OR; denoising the other way round."""
    effects = sweep(direction)
    found, others = FOUND_BY[direction], AND + OR
    others = others.replace(found, "")
    assert {edit.units[0] for edit in effects.top(2)} == set(ids(found))
    normalised = effects.normalised
    for letter in found:
        assert effects.of(LATENTS[letter]).low > 0.35
        assert normalised[:, LATENTS[letter]].min() > 0.15  # in every pair
    for letter in others:
        assert np.abs(normalised[:, LATENTS[letter]]).max() < 1e-5
    for letter in OTHERS:
        assert abs(effects.of(LATENTS[letter]).value) < 0.05
    never = sorted(set(range(D_SAE)) - set(LATENTS.values()))
    assert not effects.ran[:, never].any()


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_groups_are_found_both_ways(direction):
    """Together the members of either are both necessary and sufficient; their effects add up."""
    effects = sweep(direction, [ids(AND), ids(OR), ids(AND + OR)], controls=0)
    by_and, by_or, together = effects.ratios()
    assert by_and > 0.35
    assert by_or > 0.5
    assert together == pytest.approx(by_and + by_or, abs=0.01)
    assert together == pytest.approx(1.0, abs=0.1)  # the other letters have the rest
    np.testing.assert_allclose(effects.change[:, 1], SCALE, atol=0.02)  # the encoder keeps a thousandth
    assert effects.top(1) == [Edit(SITE, ids(AND + OR), role="given")]


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_tests_flag_the_planted_latents_and_no_others(direction):
    """The other letters differ within pairs and move the answer, but not one way; rounding always goes one way."""
    effects = sweep(direction)
    others = [LATENTS[letter] for letter in OTHERS]
    assert effects.ran[:, others].sum(0).min() > 30
    assert np.abs(effects.change[:, others]).max(0).min() > 0.3
    for flagged in (effects.q_values() <= 0.05, effects.p_max(draws=1000) <= 0.05):
        assert set(np.flatnonzero(flagged).tolist()) == set(ids(FOUND_BY[direction]))
    never = sorted(set(range(D_SAE)) - set(LATENTS.values()))
    assert np.isnan(effects.q_values()[never]).all()


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_controls_of_the_planted_group_do_next_to_nothing(direction):
    effects = sweep(direction, [ids(AND + OR)])
    assert effects.of(0).low > 0.9
    for role in ("random", "matched"):
        drawn = [effects.edits[i].units for i in effects.where(role)]
        assert len(drawn) == 5
        assert not any(set(units) & set(ids(AND + OR)) for units in drawn)
        control = effects.controls(0, role)
        assert abs(control.value) < 0.05
        assert control.high < 0.1 < effects.of(0).low


def test_each_position_names_the_letters_places():
    effects = sweep("noise", n=12, each_position=True)
    pairs = and_or_pairs(12)
    for pair, prompt in enumerate(pairs):
        best = sorted(np.argsort(-effects.change[pair])[:2], key=lambda i: effects.edits[i].position)
        places = sorted((prompt.clean.upper().index(letter), LATENTS[letter]) for letter in AND)
        assert [(effects.edits[i].position - 1, effects.edits[i].units[0]) for i in best] == places


def test_ablation_tells_and_from_or_as_noising_does():
    """With what is patched set to 0, no corrupted prompt is needed."""
    effects = sweep("noise", corruption=Zero())
    assert {edit.units[0] for edit in effects.top(2)} == set(ids(AND))
    assert abs(effects.of(LATENTS["R"]).value) < 1e-5
    assert {edit.units[0] for edit in sweep("denoise", corruption=Zero()).top(2)} == set(ids(OR))
