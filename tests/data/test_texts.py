"""Texts of any length, in rows and batches that do not matter to what is measured."""

import numpy as np
import pytest
import torch
from tiny import random_dictionary, tiny_model

from saepatch.data import texts as data
from saepatch.data.texts import text_rows, token_batches
from saepatch.errors import UserError
from saepatch.measure.quality import latent_statistics, splice_quality
from saepatch.reading.cards import read_latents
from saepatch.steering.contrasts import auroc_contrast, contrast, corpus_maxima, latent_means

LONG = "the quick brown fox jumps over the lazy dog, " * 5  # 225 tokens and BOS; the model has 64 positions
TEXTS = ["a cat", LONG, "", "one more short text", LONG[7:150]]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_rows_hold_every_token_once_and_begin_with_the_bos(model):
    rows = list(text_rows(model, TEXTS))
    assert max(map(len, rows)) == 64
    assert all(row[0] == model.bos_id for row in rows)
    assert [t for row in rows for t in row[1:]] == [t for text in TEXTS for t in model.encode(text)[1:]]
    assert [len(row) for row in text_rows(model, [LONG], 100)] == [64, 64, 64, 37]
    assert [len(row) for row in text_rows(model, [LONG], 50)] == [50] * 4 + [30]
    with pytest.raises(UserError, match="a context of 1 tokens"):
        list(text_rows(model, TEXTS, 1))


def test_batches_are_bounded_in_rows_and_memory(model, monkeypatch):
    monkeypatch.setattr(data, "CELLS", 1000)
    for texts in (TEXTS, model.pad(list(text_rows(model, TEXTS)))):
        sizes = [(len(batch), batch.width) for batch in token_batches(model, texts, 3, 5)]
        assert sum(rows for rows, _ in sizes) == len(list(text_rows(model, TEXTS)))
        assert all(rows <= 3 and (rows == 1 or rows * width <= 200) for rows, width in sizes)
        assert max(rows for rows, _ in sizes) == 3
    assert {len(batch) for batch in token_batches(model, TEXTS, 3, 10**9)} == {1}
    with pytest.raises(UserError, match="batch size 0"):
        list(token_batches(model, TEXTS, 0))
    with pytest.raises(UserError, match="one string"):
        list(token_batches(model, LONG))


@pytest.mark.parametrize("cells", [1, 50_000])
def test_every_reader_takes_long_texts_and_batches_do_not_matter(model, monkeypatch, cells):
    dictionary = random_dictionary()
    rows = model.pad(list(text_rows(model, TEXTS)))
    cards = read_latents(model, dictionary, [3, 7], rows, batch_size=100)
    quality, statistics = splice_quality(model, dictionary, rows), latent_statistics(model, dictionary, rows)
    monkeypatch.setattr(data, "CELLS", cells)
    for mine, card in zip(read_latents(model, dictionary, [3, 7], iter(TEXTS), batch_size=2), cards, strict=True):
        assert (mine.tokens, mine.texts, mine.frequency) == (card.tokens, card.texts, card.frequency)
        assert mine.maximum == pytest.approx(card.maximum, rel=1e-5)
        assert mine.maximum > 0
    measured = splice_quality(model, dictionary, TEXTS, 5)
    assert measured.tokens == quality.tokens == sum(len(model.encode(text)) - 1 for text in TEXTS)
    for name in ("ce_model", "ce_spliced", "ce_zero", "ce_mean", "kl", "fvu", "l0"):
        assert getattr(measured, name) == pytest.approx(getattr(quality, name), rel=1e-4), name
    again = latent_statistics(model, dictionary, TEXTS, 5)
    torch.testing.assert_close(again.maximum, statistics.maximum)
    torch.testing.assert_close(again.frequency, statistics.frequency)
    torch.testing.assert_close(corpus_maxima(model, dictionary, TEXTS), statistics.maximum)
    np.testing.assert_allclose(
        corpus_maxima(model, dictionary, TEXTS, [5], max_tokens=64), statistics.maximum[[5]], rtol=1e-5
    )


@pytest.mark.parametrize("cells", [1, 5_000, 2**27])
def test_contrasts_read_long_texts_in_rows_and_batches_do_not_matter(model, monkeypatch, cells):
    """A text's mean and maximum are those over all of its rows, each run alone."""
    dictionary, texts = random_dictionary(), [LONG, "a cat", LONG[7:150], "one more"]
    means, largest = [], []
    for text in texts:
        acts = []
        for row in text_rows(model, [text]):
            tokens = model.pad([row])
            acts.append(dictionary.activations(model.capture(tokens, [dictionary.site])[dictionary.site])[0][0, 1:])
        whole = torch.cat(acts)
        assert len(whole) == len(model.encode(text)) - 1
        means.append(whole.mean(0))
        largest.append(whole.amax(0))
    monkeypatch.setattr(data, "CELLS", cells)
    torch.testing.assert_close(latent_means(model, dictionary, texts), torch.stack(means), rtol=1e-4, atol=1e-5)
    found = contrast(model, dictionary, texts[:2], texts[2:])
    expected = (means[0] + means[1] - means[2] - means[3]) / 2 * dictionary.rows.norm(dim=-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    wins = sum((a > b).float() + (a == b).float() / 2 for a in largest[:2] for b in largest[2:]) / 4
    torch.testing.assert_close(auroc_contrast(model, dictionary, texts[:2], texts[2:]), wins)
    with pytest.raises(UserError, match="longer than the context of 64"):
        contrast(model, dictionary, texts[:2], texts[2:], positions="last")
    with pytest.raises(UserError, match="empty prompt ''"):
        contrast(model, dictionary, ["a", ""], ["b"])
