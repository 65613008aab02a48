"""Figures of a dictionary: against plain arithmetic on a tiny model, and dictionaries whose figures are known."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from tiny import random_dictionary, random_sae, tiny_model

from saepatch.dictionaries.loading import adopt
from saepatch.errors import UserError
from saepatch.measure.quality import latent_statistics, splice_quality
from saepatch.model.hooks import capture
from saepatch.model.sites import Site
from training.loop import evaluate as evaluation
from training.loop.evaluate import DENSITY_EDGES, density, evaluate_all, geometry, held_out_tokens

TEXTS = ["the cat sat on the mat", "a dog", "birds fly high up in the sky", "two of them"]
NAMED = {"fvu", "l0", "alive_share", "dense_share", "ce_model", "ce_spliced", "ce_ablated", "ce_recovered", "kl"}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokens(model):
    return model.tokenize(TEXTS)


def evaluate(model, dictionary, tokens, batch_size=None):
    return evaluate_all(model, [dictionary], tokens, batch_size)[0]


def test_every_figure_is_there(model, tokens):
    found = evaluate(model, random_dictionary("resid_post.1"), tokens)
    assert found.figures.keys() >= NAMED
    assert all(isinstance(value, (int, float)) for value in found.figures.values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.figures = {}


def test_figures_against_plain_arithmetic(model, tokens):
    dictionary = random_dictionary("resid_post.1")
    found = evaluate(model, dictionary, tokens, batch_size=2)
    quality = splice_quality(model, dictionary, tokens)
    for name in ("ce_model", "ce_spliced", "ce_recovered", "kl", "fvu", "l0", "alive_share"):
        assert found.figures[name] == pytest.approx(getattr(quality, name), rel=1e-5, abs=1e-6), name
    x = capture(model.hf, model.layout, [Site(1)], model.inputs(tokens))[Site(1)][tokens.ordinary]
    frequency = (dictionary.sae.encode(x) > 0).double().mean(0)
    assert found.figures["explained_variance"] == pytest.approx(1 - found.figures["fvu"])
    assert found.figures["ce_ablated"] == found.figures["ce_zero"]
    assert found.figures["dead_share"] == pytest.approx(float((frequency == 0).double().mean()))
    assert found.figures["dense_share"] == pytest.approx(float((frequency > 0.1).double().mean()))
    assert found.figures["max_frequency"] == pytest.approx(float(frequency.max()))
    assert found.figures["eval_tokens"] == len(x)
    edges = found.density.edges
    counts = [int(((frequency.log10() >= low) & (frequency.log10() < high)).sum()) for low, high in pairwise(edges)]
    counts[-1] += int((frequency == 1).sum())
    assert list(found.density.counts) == counts


def test_several_at_once_are_as_each_alone(model, tokens):
    sites = ["resid_post.0", "resid_pre.0", "attn_out.1", "mlp_out.2", "resid_post.2", "z.1"]
    dictionaries = [random_dictionary(site, seed=i) for i, site in enumerate(sites)]
    for dictionary, found in zip(dictionaries, evaluate_all(model, dictionaries, tokens)):
        alone = evaluate(model, dictionary, tokens)
        assert found.density == alone.density
        assert found.figures == pytest.approx(alone.figures, rel=1e-5, abs=1e-6)


def test_most_blocks_are_run_once_for_all(model, tokens):
    """The last site's edited passes need no block, so one site more costs none."""
    calls = []
    handles = [block.self_attn.register_forward_hook(lambda *_: calls.append(1)) for block in model.layout.blocks]
    try:
        evaluate_all(model, [random_dictionary("resid_post.2")], tokens)
        alone = len(calls)
        evaluate_all(model, [random_dictionary("resid_post.2"), random_dictionary("resid_post.2", seed=1)], tokens)
    finally:
        for handle in handles:
            handle.remove()
    assert len(calls) == 2 * alone == 4 * len(model.layout.blocks)


def test_density_bins():
    found = density(torch.tensor([0.0, 0.0, 1.0, 0.5, 1e-3, 1e-9]))
    assert sum(found.counts) == 4
    assert found.edges == DENSITY_EDGES
    assert found.counts[0] == 1  # rarer than the first edge
    assert found.counts[-1] == 1  # always active
    assert found.counts[-2] == 1  # log10(0.5) = -0.30
    assert found.counts[12] == 1  # 10^-3 is the lower edge of its bin


def test_geometry_of_known_weights():
    sae = random_sae("standard", d_in=4, d_sae=4)
    W_dec = torch.tensor([[1.0, 0, 0, 0], [2, 0, 0, 0], [0, 3, 4, 0], [0, 0, 1, 0]])
    W_enc = torch.stack([W_dec[0], -W_dec[1], W_dec[2], torch.tensor([0, 0, 0, 1.0])], 1)
    sae.load_state_dict({"W_enc": W_enc, "b_enc": torch.zeros(4), "W_dec": W_dec, "b_dec": torch.zeros(4)})
    found = geometry(adopt(sae, Site(1), "by hand"))
    assert found["decoder_norm_mean"] == pytest.approx((1 + 2 + 5 + 1) / 4)
    assert (found["decoder_norm_min"], found["decoder_norm_max"]) == (1, 5)
    assert found["max_cosine_mean"] == pytest.approx((1 + 1 + 0.8 + 0.8) / 4)
    assert found["max_cosine_share"] == 0.5
    assert found["encoder_decoder_cosine"] == pytest.approx((1 - 1 + 1 + 0) / 4)


def test_neighbours_are_found_in_chunks_and_samples(monkeypatch):
    dictionary = random_dictionary("resid_post.1", d_sae=48)
    whole = geometry(dictionary)
    monkeypatch.setattr(evaluation, "ELEMENTS", 4 * 5 * 48)  # five rows at a time
    assert geometry(dictionary) == pytest.approx(whole)
    rows = torch.nn.functional.normalize(dictionary.W_dec, dim=-1)
    cosines = (rows @ rows.T).fill_diagonal_(-1).amax(-1)
    assert whole["max_cosine_mean"] == pytest.approx(float(cosines.mean()))
    monkeypatch.setattr(evaluation, "_COMPARED", 2)
    assert geometry(dictionary)["max_cosine_mean"] == pytest.approx(float(cosines[[0, 47]].mean()))


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "standard", "gated"])
def test_every_architecture(model, tokens, architecture):
    found = evaluate(model, random_dictionary("resid_post.1", architecture), tokens)
    assert -1 <= found.figures["encoder_decoder_cosine"] <= 1
    assert found.figures["l0"] > 0


def test_held_out_tokens(model):
    found = held_out_tokens(model, ["a longer document", "short", "never reached"], context=8, eval_tokens=10)
    assert found.lengths.tolist() == [6, 8]
    with pytest.raises(UserError, match="too short"):
        held_out_tokens(model, ["a"], context=8, eval_tokens=10)


def test_nothing_to_evaluate(model):
    with pytest.raises(UserError, match="no ordinary token is followed"):
        evaluate(model, random_dictionary("resid_post.1"), model.tokenize(["a", "b"]))


def test_latents_are_those_of_the_library(model, tokens):
    dictionary = random_dictionary("resid_post.1")
    frequency = latent_statistics(model, dictionary, tokens).frequency
    assert evaluate(model, dictionary, tokens).density == density(frequency)
