"""Tokens that a dictionary was not trained on: a bottleneck passes them by, figures leave them out."""

from dataclasses import replace

import pytest
import torch
from sae_lens.util import get_special_token_ids
from tiny import byte_tokenizer, random_dictionary, tiny_model

from saepatch.errors import UserError
from saepatch.measure.quality import latent_statistics, splice_quality
from saepatch.model.hooks import edit_sites
from saepatch.model.sites import Site
from saepatch.reading.cards import read_latents
from saepatch.splicing.interventions import Ablate
from saepatch.splicing.splice import splice

SITE = Site(1)
TEXTS = ["the cat sat on the mat", "a dog ran to it", "the tent"]


@pytest.fixture(scope="module")
def model():
    return tiny_model("gpt2")


@pytest.fixture(scope="module")
def excluded(model):
    return model.encode(" t")[1:]  # a space and a letter stand for chat markers


def dictionary_of(stated):
    dictionary = random_dictionary("resid_post.1")
    dictionary.sae.cfg.metadata.exclude_special_tokens = stated
    return dictionary


def test_a_bottleneck_passes_by_what_was_not_trained_on(model, excluded):
    dictionary, tokens = dictionary_of(excluded), model.tokenize(TEXTS)
    known = tokens.ordinary & ~torch.isin(tokens.input_ids, torch.tensor(excluded))
    assert 0 < int(known.sum()) < int(tokens.ordinary.sum())

    def write(x):
        return torch.where(known[..., None], dictionary.sae.decode(dictionary.sae.encode(x)), x)

    with torch.no_grad(), edit_sites(model.layout, {SITE: write}):
        by_hand = model.next_logits(tokens)
    with splice(model, dictionary, error="drop"):
        torch.testing.assert_close(model.next_logits(tokens), by_hand)
    with splice(model, replace(dictionary, every_position=True), error="drop"):
        everywhere = model.next_logits(tokens)
    with splice(model, random_dictionary("resid_post.1"), error="drop"):  # says nothing
        torch.testing.assert_close(model.next_logits(tokens), everywhere)
    assert (by_hand - everywhere).abs().max() > 1e-3
    with splice(model, dictionary, Ablate(), error="keep"), splice(model, random_dictionary("resid_post.2"), Ablate()):
        edited = model.next_logits(tokens)  # edits act where their positions say
    assert (edited - model.next_logits(tokens)).abs().max() > 1e-3


def test_figures_statistics_and_cards_leave_them_out(model, excluded):
    dictionary, tokens = dictionary_of(excluded), model.tokenize(TEXTS)
    plain, known = random_dictionary("resid_post.1"), tokens.without(excluded)
    restricted, whole = latent_statistics(model, plain, known), latent_statistics(model, plain, tokens)
    mine = latent_statistics(model, dictionary, tokens)
    assert mine.tokens == restricted.tokens < whole.tokens
    torch.testing.assert_close(mine.frequency, restricted.frequency)
    torch.testing.assert_close(mine.maximum, restricted.maximum)
    quality, expected = splice_quality(model, dictionary, tokens), splice_quality(model, plain, known)
    assert quality.fvu == pytest.approx(expected.fvu)
    assert quality.l0 == pytest.approx(expected.l0)
    assert quality.tokens == expected.tokens
    (card,) = read_latents(model, dictionary, [3], TEXTS)
    assert card.tokens == expected.tokens
    assert splice_quality(model, replace(dictionary, every_position=True), tokens).tokens == whole.tokens


def test_what_sae_lens_says_is_read_as_sae_lens_means_it(model):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>"]})
    chat = replace(model, tokenizer=tokenizer)
    dictionary = dictionary_of(True)
    assert dictionary.excluded_tokens(chat) == tuple(sorted(get_special_token_ids(tokenizer))) == (0, 1, 2)
    assert dictionary_of(False).excluded_tokens(chat) == dictionary_of(None).excluded_tokens(chat) == ()
    with pytest.raises(UserError, match="exclude_special_tokens = 'yes', which is not a list of token ids"):
        dictionary_of("yes").excluded_tokens(chat)
