"""Rankings, means and moves leave out tokens a dictionary was not trained on, or refuse positions that name one."""

from dataclasses import replace

import pytest
import torch
from tiny import random_dictionary, tiny_model

from saepatch.circuits.residual.self_repair import self_repair
from saepatch.data.pairs import PromptPair
from saepatch.engine.components import LatentUnits
from saepatch.engine.corruptions import Mean, Zero
from saepatch.errors import UserError
from saepatch.measure.patching import patch_latents
from saepatch.model.hooks import edit_sites
from saepatch.model.sites import Site
from saepatch.reading.cross_patch import CrossQuery, Move, cross_patch
from saepatch.restoration.context_shift import find_context_shift
from saepatch.restoration.ranking import clean_means, find_safety_latents
from saepatch.restoration.restore import change_scores
from saepatch.splicing.donors import CleanPrompts
from saepatch.splicing.splice import record_latents
from saepatch.steering.contrasts import attribution_contrast, auroc_contrast, contrast, output_scores

SITE = Site(1)
WITH, WITHOUT = ["my hen ran!", "a hen! sat"], ["my cow ran!", "a cow! sat"]


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3", seed=2)


@pytest.fixture(scope="module")
def mark(model):
    return model.encode("!")[1]  # stands for a chat marker


@pytest.fixture
def dictionary(mark):
    made = random_dictionary("resid_post.1", "standard")
    made.sae.cfg.metadata.exclude_special_tokens = [mark]
    return made


def open_to_all(dictionary):
    return replace(dictionary, every_position=True)


def means(model, dictionary, texts, mark):
    """Each text alone, over its tokens without BOS and the mark."""
    rows = []
    for text in texts:
        tokens = model.tokenize([text])
        kept = tokens.ordinary[0] & (tokens.input_ids[0] != mark)
        rows.append(record_latents(model, open_to_all(dictionary), tokens).acts[0, kept])
    return rows


def test_contrasts(model, dictionary, mark):
    ours, theirs = (means(model, dictionary, texts, mark) for texts in (WITH, WITHOUT))
    size = dictionary.rows.norm(dim=-1)
    gap = torch.stack([row.mean(0) for row in ours]).mean(0) - torch.stack([row.mean(0) for row in theirs]).mean(0)
    torch.testing.assert_close(contrast(model, dictionary, WITH, WITHOUT), gap * size)
    most = [torch.stack([row.amax(0) for row in rows]) for rows in (ours, theirs)]
    wins = (most[0][:, None] > most[1]).float() + 0.5 * (most[0][:, None] == most[1])
    torch.testing.assert_close(auroc_contrast(model, dictionary, WITH, WITHOUT), wins.mean((0, 1)))
    for score in (contrast, auroc_contrast, attribution_contrast):
        everywhere = score(model, open_to_all(dictionary), WITH, WITHOUT)
        assert not torch.allclose(score(model, dictionary, WITH, WITHOUT), everywhere)
        with pytest.raises(UserError, match=r"positions -1 select tokens .* was not trained on \('!'\)"):
            score(model, dictionary, [WITH[0]], WITHOUT, positions=-1)
        with pytest.raises(UserError, match="select only tokens that dictionary"):
            score(model, dictionary, ["!!!"], WITHOUT)
    units = torch.ones(dictionary.d_sae)
    scores = [output_scores(model, d, [3, 5], units, ["a hen!"]) for d in (dictionary, open_to_all(dictionary))]
    assert not torch.allclose(*scores)


def test_change_scores_and_safety_latents(model, dictionary, mark):
    pairs = [PromptPair(a, b, "x", "y") for a, b in zip(WITH, WITHOUT)]
    rows = [means(model, dictionary, texts, mark) for texts in (WITH, WITHOUT)]
    gaps = torch.cat([a - b for a, b in zip(*rows)])
    size = dictionary.rows.norm(dim=-1)
    torch.testing.assert_close(change_scores(model, dictionary, pairs, "all"), gaps.pow(2).mean(0).sqrt() * size)
    donor = CleanPrompts(tuple(WITH), None)
    found = find_safety_latents(model, dictionary, WITHOUT, donor, completions=[[], []])
    torch.testing.assert_close(found.change[SITE], gaps.pow(2).mean(0).sqrt() * size)
    torch.testing.assert_close(found.signed[SITE], gaps.mean(0) * size)
    assert found.positions == len(gaps)
    apart = find_safety_latents(model, dictionary, ["my!cow"], CleanPrompts(("my hen!",), 6), completions=[[]])
    assert apart.positions == 4  # the mark stands at another position in each
    taken = clean_means(model, dictionary, WITH, None, completions=[[], []]).means[SITE]
    torch.testing.assert_close(taken, torch.cat(rows[0]).mean(0))
    with pytest.raises(UserError, match="the compared positions hold only tokens that dictionary"):
        find_safety_latents(model, dictionary, [WITHOUT[0]], CleanPrompts((WITH[0],), 1), completions=[[]])
    with pytest.raises(UserError, match="was not trained on"):
        clean_means(model, dictionary, [WITH[0]], 1, completions=[[]])
    with pytest.raises(UserError, match="was not trained on"):
        find_context_shift(model, dictionary, WITHOUT, WITH, template=5)


def test_ablations(model, dictionary, mark):
    """Means are over known tokens, and what is ablated are known tokens."""
    tokens = model.tokenize(WITH)
    mean = Mean.over(model, dictionary, tokens, by_position=False)
    torch.testing.assert_close(mean.values, torch.cat(means(model, dictionary, WITH, mark)).mean(0))
    pairs = [PromptPair("a hen! sat", "a hen! sat", "x", "y")]
    zeroed = patch_latents(model, dictionary, pairs, [3], controls=0, corruption=Zero())
    tokens = model.tokenize(["a hen! sat"])
    units = LatentUnits(dictionary)
    known = tokens.ordinary & (tokens.input_ids != mark)

    def write(x):
        values = units.read(x)
        return units.write(x, torch.where(known[..., None], torch.zeros_like(values), values), known).applied(x)

    with torch.no_grad(), edit_sites(model.layout, {SITE: write}):
        logits = model.next_logits(tokens)[0]
    expected = float(logits[model.encode("x")[1]] - logits[model.encode("y")[1]])
    assert zeroed.corrupted[0] == pytest.approx(expected, abs=1e-4)


def test_cross_patches(model, dictionary):
    move = [Move(SITE, SITE)]
    every = CrossQuery("my hen!", "my cow!", "x", "y", "all", "all")
    marks = CrossQuery("my hen", "my cow", "x", "y", "all", "all")
    for other in (dictionary, open_to_all(dictionary)):
        cross_patch(model, [marks], move, dictionary=other)
    ours, all_of_them = (cross_patch(model, [every], move, dictionary=d) for d in (dictionary, open_to_all(dictionary)))
    assert abs(ours.log_p - all_of_them.log_p).max() > 1e-5
    with pytest.raises(UserError, match="positions 'last' select tokens"):
        cross_patch(model, [CrossQuery("my hen!", "my cow!", "x", "y")], move, dictionary=dictionary)
    cross_patch(model, [CrossQuery("my hen!", "my cow!", "x", "y")], move)  # whole states are no dictionary's


def test_self_repair(model, dictionary):
    pairs = [PromptPair(a, b, "x", "y") for a, b in (("my hen!", "my cow!"), ("my dog!", "my pig!"))]
    with pytest.raises(UserError, match="positions 'last' select tokens that dictionary"):
        self_repair(model, dictionary, 3, pairs)
    known = [PromptPair(p.clean[:-1], p.corrupted[:-1], "x", "y") for p in pairs]
    with pytest.raises(UserError, match="positions 'last' select tokens that dictionary"):
        self_repair(model, dictionary, 3, known, mean_over=["a hen!"])
    active = record_latents(model, dictionary, model.tokenize([known[0].clean])).acts[0, -1].argmax()
    self_repair(model, dictionary, int(active), known)
