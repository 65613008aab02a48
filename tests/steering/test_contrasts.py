"""Choosing latents by contrast, by what they write, and the units that strengths are measured in."""

import pytest
import torch
from tiny import random_dictionary, tiny_model

from saepatch.errors import UserError
from saepatch.measure.quality import latent_statistics
from saepatch.splicing.interventions import Steer
from saepatch.splicing.splice import record_latents, splice
from saepatch.steering import contrasts
from saepatch.steering.contrasts import (
    attribution_contrast,
    auroc_contrast,
    corpus_maxima,
    corpus_units,
    first_alive,
    latent_means,
    lens_tokens,
    output_scores,
    refine,
)

WITH, WITHOUT = ["the cat sat", "a dog", "the end"], ["birds fly high up", "x", "no way"]


def test_auroc_counts_pairs_with_ties_as_a_half():
    model, dictionary = tiny_model(), random_dictionary()
    maxima = [
        [record_latents(model, dictionary, model.tokenize([text])).acts[0, 1:].amax(0) for text in texts]
        for texts in (WITH, WITHOUT)
    ]
    wins = sum((a > b).float() + 0.5 * (a == b).float() for a in maxima[0] for b in maxima[1])
    found = auroc_contrast(model, dictionary, WITH, WITHOUT, batch_size=2)
    torch.testing.assert_close(found, wins / 9)
    assert float(found.min()) < 0.3
    assert float(found.max()) > 0.7
    with pytest.raises(UserError, match="a set of prompts is empty"):
        auroc_contrast(model, dictionary, WITH, [])


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("normalise", ["none", "layer_norm"])
def test_attribution_is_the_slope_of_the_gap_between_predictions(family, positions, normalise):
    model, dictionary = tiny_model(family), random_dictionary(normalize_activations=normalise)
    p = [
        torch.stack([model.next_logits(model.tokenize([t]))[0].softmax(-1) for t in texts]) for texts in (WITH, WITHOUT)
    ]
    toward = (p[0].mean(0) - p[1].mean(0)).double()
    means = [
        latent_means(model, dictionary, model.tokenize(t), positions, written=True).mean(0) for t in (WITH, WITHOUT)
    ]
    found = attribution_contrast(model, dictionary, WITH, WITHOUT, positions, batch_size=2)
    assert int((found != 0).sum()) > 4
    for latent in found.abs().argsort(descending=True)[:4].tolist():
        values = []
        for step in (-0.02, 0.02):
            with splice(model, dictionary, Steer(latent, step, positions=positions, scaled=False)):
                logits = [model.next_logits(model.tokenize([text]))[0].double() for text in WITHOUT]
            values.append(sum(float(row @ toward) for row in logits) / 3)
        slope = (values[1] - values[0]) / 0.04
        assert float(found[latent]) == pytest.approx(float(means[0][latent] - means[1][latent]) * slope, rel=0.03)


def test_attribution_needs_predictions_that_differ():
    with pytest.raises(UserError, match="predicts the same"):
        attribution_contrast(tiny_model(), random_dictionary(), WITH, WITH)


def test_the_lens_is_norm_and_unembedding(monkeypatch):
    monkeypatch.setattr(contrasts, "AT_ONCE", 2)
    model, dictionary = tiny_model(), random_dictionary()
    rows = dictionary.rows[:5]
    by_hand = model.hf.lm_head(model.hf.model.norm(rows))
    assert torch.equal(lens_tokens(model, rows, 3), by_hand.topk(3).indices)
    with pytest.raises(UserError, match="but the residual stream has"):
        lens_tokens(model, rows[:, :4])


@pytest.mark.parametrize("positions", ["all", "last"])
def test_output_scores_are_those_of_steered_runs(positions, monkeypatch):
    monkeypatch.setattr(contrasts, "AT_ONCE", 2)
    model, dictionary = tiny_model(), random_dictionary()
    maxima = torch.rand(48, generator=torch.Generator().manual_seed(0)) + 0.5
    ids = [7, 3, 20]
    found = output_scores(model, dictionary, ids, maxima, ["a b", "no"], 2.0, positions, top=4)
    words = lens_tokens(model, dictionary.rows[ids], 4)
    for place, latent in enumerate(ids):
        scores = []
        for prompt in ("a b", "no"):
            with splice(model, dictionary, Steer(latent, 2.0, float(maxima[latent]), positions)):
                p = model.next_logits(model.tokenize([prompt]))[0].softmax(-1)
            order = p.argsort(descending=True).tolist()
            rank = min(order.index(word) for word in words[place].tolist())
            scores.append((1 - rank / 259) * float(p[words[place]].max()))
        assert float(found[place]) == pytest.approx(sum(scores) / 2, rel=1e-4)


def test_ranking_leaves_dead_latents_out_and_refining_keeps_the_order():
    model, dictionary = tiny_model(), random_dictionary()
    statistics = latent_statistics(model, dictionary, model.tokenize(["ab"]))
    scores = torch.arange(48.0)
    alive = [latent for latent in reversed(range(48)) if statistics.frequency[latent] > 0]
    assert first_alive(scores, statistics, 3) == alive[:3]
    with pytest.raises(UserError, match="only"):
        first_alive(scores, statistics, 48)
    assert refine([9, 4, 7], torch.tensor([0.1, 0.9, 0.5]), 2) == [4, 7]
    with pytest.raises(UserError, match="cannot be kept"):
        refine([9, 4], torch.tensor([0.1, 0.9]), 3)


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_corpus_maxima_in_one_stream(architecture):
    model, dictionary = tiny_model(), random_dictionary(architecture=architecture)
    statistics = latent_statistics(model, dictionary, model.tokenize([*WITH, *WITHOUT]))
    texts = iter([*WITH, *WITHOUT])
    torch.testing.assert_close(corpus_maxima(model, dictionary, texts, batch_size=4), statistics.maximum)
    some = corpus_maxima(model, dictionary, [*WITH, *WITHOUT], [5, 40])
    torch.testing.assert_close(some, statistics.maximum[[5, 40]])
    units = corpus_units(model, dictionary, [*WITH, *WITHOUT], batch_size=1)
    torch.testing.assert_close((units.unit, units.maximum), (statistics.unit, statistics.maximum))
    assert torch.equal(corpus_units(model, dictionary, WITH, quantile=1.0).unit, corpus_maxima(model, dictionary, WITH))
    with pytest.raises(UserError, match="contains no text"):
        corpus_maxima(model, dictionary, [])
