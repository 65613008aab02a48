"""Choosing latents, steering at equal norm, and the price in perplexity."""

import math

import pytest
import torch
from tiny import random_dictionary, tiny_model

from saepatch.errors import UserError
from saepatch.measure.baselines import difference_of_means
from saepatch.measure.quality import latent_statistics
from saepatch.model.hooks import capture
from saepatch.model.sites import Site
from saepatch.splicing.interventions import Clamp, Steer
from saepatch.splicing.splice import record_latents, splice
from saepatch.steering.contrasts import contrast, latent_means
from saepatch.steering.fluency import perplexity
from saepatch.steering.generate import direction_dictionary, equal_norm_steer, generate_steered, with_prefix

TEXTS = ["the cat sat", "a dog", "birds fly high up"]


def test_means_leave_bos_and_padding_out():
    model, dictionary = tiny_model(), random_dictionary()
    together = latent_means(model, dictionary, model.tokenize(TEXTS), batch_size=2)
    at_last = latent_means(model, dictionary, model.tokenize(TEXTS), "last")
    for row, text in zip(together, TEXTS, strict=True):
        acts = record_latents(model, dictionary, model.tokenize([text])).acts[0, 1:]
        torch.testing.assert_close(row, acts.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(at_last[TEXTS.index(text)], acts[-1], atol=1e-5, rtol=1e-4)


def test_contrast_is_a_difference_of_means_in_units_of_what_is_written():
    model, dictionary = tiny_model(), random_dictionary()
    means = latent_means(model, dictionary, model.tokenize(TEXTS))
    expected = (means[:2].mean(0) - means[2]) * dictionary.W_dec.norm(dim=-1)
    torch.testing.assert_close(contrast(model, dictionary, TEXTS[:2], TEXTS[2:]), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="a set of prompts is empty"):
        contrast(model, dictionary, TEXTS, [])


def test_one_and_ten_latents_move_the_stream_equally_far():
    dictionary = random_dictionary()
    maxima = torch.rand(48, generator=torch.Generator().manual_seed(0)) + 0.1
    for latents in ([3], list(range(10))):
        steer = equal_norm_steer(dictionary, latents, maxima, norm=2.5, strength=1.5)
        assert isinstance(steer.unit, tuple)
        moved = (torch.tensor(steer.unit)[:, None] * dictionary.W_dec[latents]).sum(0) * steer.strength
        assert float(moved.norm()) == pytest.approx(1.5 * 2.5, rel=1e-5)
    with pytest.raises(UserError, match="never fire"):
        equal_norm_steer(dictionary, [3], torch.zeros(48), 1.0)


@pytest.mark.parametrize("normalise", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_equal_norm_is_of_the_site_for_dictionaries_that_normalise(architecture, normalise):
    model, dictionary = tiny_model(), random_dictionary(architecture=architecture, normalize_activations=normalise)
    maxima = torch.rand(48, generator=torch.Generator().manual_seed(0)) + 0.1
    tokens, site = model.tokenize(TEXTS), dictionary.site
    bare = capture(model.hf, model.layout, [site], model.inputs(tokens))[site]
    steer = equal_norm_steer(dictionary, [3, 7], maxima, norm=2.5, strength=2.0)
    for interventions in (steer, [Clamp(40, 0.0), steer]):  # nothing has to be encoded for the first
        with splice(model, dictionary, interventions):
            moved = capture(model.hf, model.layout, [site], model.inputs(tokens), stop=False)[site]
        if interventions is not steer:
            with splice(model, dictionary, Clamp(40, 0.0)):
                bare = capture(model.hf, model.layout, [site], model.inputs(tokens), stop=False)[site]
        far = (moved - bare)[tokens.ordinary].norm(dim=-1)
        torch.testing.assert_close(far, torch.full_like(far, 5.0), atol=1e-3, rtol=1e-3)
    with splice(model, dictionary, Steer(3, 1.0)):  # a latent added by itself is written in the input's scale
        moved = capture(model.hf, model.layout, [site], model.inputs(tokens), stop=False)[site]
    scale = dictionary.activations(moved)[1]
    assert float(scale[tokens.ordinary].std()) > 0.01


@pytest.mark.parametrize("normalise", ["layer_norm", "constant_norm_rescale"])
def test_contrast_and_reach_are_of_what_is_written(normalise):
    model, dictionary = tiny_model(), random_dictionary(normalize_activations=normalise)
    written, furthest = [], torch.zeros(48)
    for text in TEXTS:
        x = capture(model.hf, model.layout, [dictionary.site], model.inputs(model.tokenize([text])))[dictionary.site]
        acts = dictionary.sae.encode(x)
        per_unit = []  # what the SAE's own decoder adds for one unit more of each latent
        for latent in range(48):
            more = acts.clone()
            more[..., latent] += 1
            dictionary.sae.encode(x)
            moved = dictionary.sae.decode(more)
            dictionary.sae.encode(x)
            per_unit.append((moved - dictionary.sae.decode(acts)).norm(dim=-1))
        each = (acts * torch.stack(per_unit, -1))[0, 1:]
        written.append(each.mean(0))
        furthest = torch.maximum(furthest, each.amax(0))
    expected = torch.stack(written[:2]).mean(0) - written[2]
    torch.testing.assert_close(contrast(model, dictionary, TEXTS[:2], TEXTS[2:]), expected, atol=1e-4, rtol=1e-3)
    reach = latent_statistics(model, dictionary, model.tokenize(TEXTS)).reach
    torch.testing.assert_close(reach, furthest, atol=1e-4, rtol=1e-3)


def test_perplexity_is_that_of_the_continuation_alone():
    model = tiny_model()
    ids = model.encode("abc" + "xyz")
    log_p = model.hf(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    expected = math.exp(-sum(float(log_p[i - 1, ids[i]]) for i in (4, 5, 6)) / 3)
    assert perplexity(model, ["abc"], [ids[4:]]) == pytest.approx(expected, rel=1e-5)
    assert math.isnan(perplexity(model, ["abc"], [[]]))


def test_generating_under_steering_judges_and_prices_the_steered_text():
    model, dictionary = tiny_model(), random_dictionary()
    bare = generate_steered(model, dictionary, TEXTS, None, lambda text: True, 8)
    assert list(bare.texts) == model.generate(TEXTS, 8)
    assert bare.success == 1.0
    steered = generate_steered(model, dictionary, TEXTS, Steer(3, 20.0), lambda text: text in bare.texts, 8)
    assert steered.texts != bare.texts
    assert steered.success < 1.0
    with splice(model, dictionary, Steer(3, 20.0)):
        ids = model.continue_ids(TEXTS, 8)
    assert steered.perplexity == pytest.approx(perplexity(model, TEXTS, ids))


def test_a_prefix_asks_in_words_and_is_not_priced():
    model, dictionary = tiny_model(), random_dictionary()
    asked = generate_steered(model, dictionary, TEXTS, None, bool, 8, prefix="xy ")
    assert list(asked.texts) == model.generate([f"xy {text}" for text in TEXTS], 8)
    assert asked.perplexity == pytest.approx(perplexity(model, TEXTS, asked.ids))
    assert with_prefix(model, "xy ", "<bos>the cat") == "<bos>xy the cat"


def test_a_direction_steers_like_a_latent():
    model, site = tiny_model(), Site.parse("resid_post.1")
    tokens = model.tokenize(["the cat"])
    x = capture(model.hf, model.layout, [site], model.inputs(tokens))[site]
    dense = difference_of_means(x[0, 1:4], x[0, 4:], site)
    with splice(model, direction_dictionary(dense), Steer(0, 3.0)):
        moved = capture(model.hf, model.layout, [site], model.inputs(tokens), stop=False)[site]
    expected = x + 3 * dense.rows[0] * tokens.ordinary[..., None]
    # the splice's own edit runs first, so that what is captured after it is edited already
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=1e-5)
