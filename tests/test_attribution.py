"""Integrated gradients against what they approximate: exact patches of whole sites and of single latents."""

import numpy as np
import pytest
import torch
from tiny import random_dictionary, tiny_model

from saepatch.attribution import integrated_gradients
from saepatch.errors import UserError
from saepatch.interventions import Patch
from saepatch.metrics import logit_difference
from saepatch.patching import patch_latents
from saepatch.prompts import PromptPair, batch_pairs
from saepatch.splicing import record_latents, splice

PAIRS = [
    PromptPair("the cat sat", "the dog sat", "x", "y"),
    PromptPair("one big tree", "one red tree", "p", "q"),
    PromptPair("abc", "abd", "r", "s"),
]


def site_effect(model, dictionary, pair, positions="all"):
    """m(site patched) − m(corrupted): every latent and the error term."""
    batch = batch_pairs(model, [pair])
    with splice(model, dictionary, Patch(record_latents(model, dictionary, batch.clean), None, positions, error=True)):
        patched = logit_difference(model.next_logits(batch.corrupted), batch)
    return float(patched - logit_difference(model.next_logits(batch.corrupted), batch))


@pytest.mark.parametrize("site", ["resid_pre.1", "resid_post.0", "resid_post.2", "mlp_out.1"])
@pytest.mark.parametrize("positions", ["all", "last"])
def test_completeness(site, positions):
    model, dictionary = tiny_model(), random_dictionary(site)
    latents, errors = integrated_gradients(model, dictionary, PAIRS, positions, steps=200)
    for row, pair in enumerate(PAIRS):
        effect = site_effect(model, dictionary, pair, positions)
        assert float(latents[row].sum() + errors[row]) == pytest.approx(effect, abs=0.02 * max(1.0, abs(effect)))


def test_more_steps_come_closer():
    model, dictionary = tiny_model(), random_dictionary("resid_post.0")
    truth = np.array([site_effect(model, dictionary, pair) for pair in PAIRS])
    gaps = []
    for steps in (1, 10, 100):
        latents, errors = integrated_gradients(model, dictionary, PAIRS, steps=steps)
        gaps.append(np.abs((latents.sum(1) + errors).numpy() - truth).max())
    assert gaps[2] < gaps[1] < gaps[0]


@pytest.mark.parametrize("normalisation", ["none", "layer_norm"])
def test_one_small_change_is_the_exact_effect(normalisation):
    """Where the way is short the metric is linear along it, and each latent's share is its own exact effect."""
    model = tiny_model()
    dictionary = random_dictionary(architecture="standard", normalize_activations=normalisation)
    pairs = [PromptPair("abcdef", "abcdeg", "x", "y")]
    with torch.no_grad():  # two letters that are nearly the same to the model
        table = model.hf.get_input_embeddings().weight
        g, f = model.encode("g")[1], model.encode("f")[1]
        table[f] = table[g] + 1e-2 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    latents, _ = integrated_gradients(model, dictionary, pairs)
    exact = patch_latents(model, dictionary, pairs)
    assert np.abs(exact.change).max() > 1e-3
    np.testing.assert_allclose(latents.numpy(), exact.change, atol=0.05 * np.abs(exact.change).max())


def test_latents_that_do_not_differ_get_nothing_and_batches_do_not_matter():
    model, dictionary = tiny_model(), random_dictionary()
    latents, errors = integrated_gradients(model, dictionary, PAIRS)
    ran = patch_latents(model, dictionary, PAIRS).ran
    assert (latents.numpy()[~ran] == 0).all()
    alone = [integrated_gradients(model, dictionary, [pair], batch_size=1) for pair in PAIRS]
    torch.testing.assert_close(torch.cat([a for a, _ in alone]), latents, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.cat([e for _, e in alone]), errors, atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="0 steps"):
        integrated_gradients(model, dictionary, PAIRS, steps=0)
