"""What `inspect` and cards show of themselves."""

import pytest
from tiny import random_dictionary, tiny_model

from saepatch.errors import UserError
from saepatch.reading.cards import read_latents
from saepatch.reading.inspection import inspect


def test_a_model_and_its_dictionaries_are_inspected():
    model, dictionary = tiny_model(), random_dictionary()
    for given in (dictionary, [dictionary], {dictionary.site: dictionary}):
        inspected = inspect(model, given)
        assert repr(inspected).splitlines()[0].startswith("model        tiny-llama (llama, ")
        assert repr(inspected).splitlines()[-1] == "dictionaries resid_post.1"
        assert len(repr(inspected).splitlines()) <= 12
        assert "resid_post.1  topk, 48 latents" in inspected.text()
        assert inspected.facts()["dictionaries"]["resid_post.1"]["latents"] == 48
        assert "random topk" in inspected._repr_html_()
    with pytest.raises(UserError, match="width"):
        inspect(model, random_dictionary(d_in=8))


def test_a_card_shows_itself(tmp_path):
    (card,) = read_latents(tiny_model(), random_dictionary(), [3], ["<b>the cat</b> sat", "one big tree"])
    assert repr(card).startswith("Latent 3 at resid_post.1: ")
    assert len(repr(card).splitlines()) <= 2
    html = card._repr_html_()
    assert "<b>the" not in html
    assert len(html) < 30_000
    assert "Latent 3" in card.report(tmp_path / "card.html").read_text(encoding="utf-8")
