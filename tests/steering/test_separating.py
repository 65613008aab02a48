"""Latents that separate prompts by every score, and generations side by side."""

from dataclasses import replace

import pytest
import torch
from tiny import random_dictionary, tiny_model

from saepatch.errors import UserError
from saepatch.splicing.interventions import Ablate, Steer
from saepatch.steering.contrasts import auroc_contrast, contrast, corpus_units, output_scores
from saepatch.steering.generate import compare_generations
from saepatch.steering.separating import separating_latents

WITH, WITHOUT = ["aaa bab", "baa aab", "aba aaa"], ["zzz yzy", "yzz zzy", "zyz zyy"]


def test_one_table_has_every_score_of_the_best_latents():
    model, dictionary = tiny_model(), random_dictionary()
    table = separating_latents(model, dictionary, WITH, WITHOUT, k=4)
    contrasts, aurocs = (score(model, dictionary, WITH, WITHOUT) for score in (contrast, auroc_contrast))
    ids = table.latents.tolist()
    assert set(ids) == {*contrasts.topk(4).indices.tolist(), *aurocs.topk(4).indices.tolist()}
    torch.testing.assert_close(table.contrast, contrasts[ids])
    torch.testing.assert_close(table.auroc, aurocs[ids])
    units = corpus_units(model, dictionary, [*WITH, *WITHOUT])
    torch.testing.assert_close((table.unit, table.maximum), (units.unit[ids], units.maximum[ids]))
    torch.testing.assert_close(table.output_score, output_scores(model, dictionary, ids, units.unit))
    assert table.best() == int(contrasts.argmax())
    assert table.best("output_score") in ids
    frame = table.to_pandas()
    assert frame["latent"].tolist() == ids
    assert str(frame.dtypes["promotes"]) == "string"
    assert len(repr(table).splitlines()) == 2
    assert "steers badly" in table._repr_html_()
    with pytest.raises(UserError, match="unknown score 'auc'"):
        table.best("auc")
    with pytest.raises(UserError, match="k = 0"):
        separating_latents(model, dictionary, WITH, WITHOUT, k=0)


def test_a_name_that_begins_like_the_embedded_models_is_another_model():
    model, dictionary = tiny_model(), random_dictionary()
    named = separating_latents(replace(model, name="organism-other"), dictionary, WITH, WITHOUT, k=4)
    torch.testing.assert_close(named.maximum, separating_latents(model, dictionary, WITH, WITHOUT, k=4).maximum)


def test_generations_are_compared():
    model, dictionary = tiny_model(), random_dictionary()
    both = compare_generations(model, dictionary, Steer(3, 40.0), ["the <b>cat", "a tree"], 5)
    assert list(both.unedited) == model.generate(["the <b>cat", "a tree"], 5)
    assert both.edit == "Steer 3 × 40 (all)"
    assert both.changed == sum(one != other for one, other in zip(both.unedited, both.edited))
    assert both.to_pandas()["changed"].sum() == both.changed
    assert "<b>cat" not in both._repr_html_()
    assert len(repr(both).splitlines()) <= 10
    several = compare_generations(model, dictionary, [Ablate((1, 2)), Ablate(3, positions="last")], ["the cat"], 3)
    assert several.edit == "Ablate 1,2 (all) and Ablate 3 (last)"
