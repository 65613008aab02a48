"""Causal tracing: what is restored, by hand."""

import numpy as np
import pytest
from tiny import random_dictionary, tiny_model

import saepatch as sp

FACTS = [sp.PromptPair(f"the {a}{b} is in", f"the {b}{a} is in", "x", "y") for a, b in zip("abcdfg", "jklmop")]


def test_states_windows_and_latents_are_those_of_patches_by_hand():
    model, sae = tiny_model("llama", seed=2), random_dictionary("resid_post.1")
    trace = sp.trace_fact(model, FACTS, [sae], window=2)
    assert trace.subject == (5, 6)
    assert trace.columns[5] == "5 [a/j]"
    by_hand = sp.patch_streams(model, FACTS, each_position=True)
    layers, table = trace.values("states")
    assert layers == [0, 1, 2]
    assert np.isnan(table[:, :5]).all()
    for number, edit in enumerate(by_hand.edits):
        if edit.position >= 5:  # before the subject, both runs are equal
            assert table[edit.site.layer, edit.position] == pytest.approx(by_hand.of(number).value, abs=1e-4)
    assert trace.by_layer("states", -1)[2] == pytest.approx(1, abs=1e-4)
    pair = sp.patch_components(
        model,
        [_stream(0), _stream(1)],
        FACTS,
        [sp.Edit.of([sp.EditPart(sp.Site(layer, "mlp_out"), (0,), 6, "stream") for layer in (0, 1)], "single")],
    )
    assert trace.values("MLP outputs")[0] == [1, 2]  # windows of two layers, named by the later one
    assert trace.by_layer("MLP outputs", 6)[1] == pytest.approx(pair.of(0).value, abs=1e-4)
    every = [sp.EditPart(sae.site, tuple(range(sae.d_sae)), 6, "latent")]
    latents = sp.patch_components(model, [sae], FACTS, [sp.Edit.of(every, "every")])
    assert trace.by_layer("latents", 6)[1] == pytest.approx(latents.of(0).value, abs=1e-4)
    assert set(trace.effects) == {"states", "MLP outputs", "latents", "error terms"}
    heat = trace.heat_map("MLP outputs")
    assert (list(heat.rows), list(heat.columns)) == (["1", "2"], list(trace.columns[5:]))
    assert "2 layers together" in heat.caption


def _stream(layer):
    from saepatch.engine.components import Stream

    return Stream(sp.Site(layer, "mlp_out"))


def test_noise_on_the_subject_and_one_fact():
    model = tiny_model("gpt2")
    noise = sp.GaussianNoise((5, 6), samples=2)
    trace = sp.trace_fact(model, FACTS[0], corruption=noise)
    assert trace.pairs == 1
    assert trace.effects["states"].corruption
    by_hand = sp.patch_streams(model, FACTS[:1], each_position=True, corruption=noise)
    assert trace.by_layer("states", 6)[1] == pytest.approx(
        by_hand.of(sp.Edit(sp.Site(1), (0,), 6, "stream")).value, abs=1e-4
    )


def test_facts_of_other_forms_are_refused():
    model = tiny_model("llama")
    with pytest.raises(sp.UserError, match="prompts of one length"):
        sp.trace_fact(model, [FACTS[0], sp.PromptPair("the abc is in", "the bac is in", "x", "y")])
    with pytest.raises(sp.UserError, match="are equal"):
        sp.trace_fact(model, sp.PromptPair("the a is", "the a is", "x", "y"))
    with pytest.raises(sp.UserError, match="different positions"):
        pairs = [sp.PromptPair(text, text, "x", "y") for text in ("of ox in", "in ox of")]
        sp.trace_fact(model, pairs, corruption=sp.GaussianNoise(sp.At("of")))
    with pytest.raises(sp.UserError, match="window of 9"):
        sp.trace_fact(model, FACTS, window=9)
