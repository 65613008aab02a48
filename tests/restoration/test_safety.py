"""Judging answers, ranking latents by what a jailbreak changes, restoring them."""

import pytest
import torch
from tiny import random_dictionary, tiny_model

from saepatch.data.batches import batch_pairs
from saepatch.data.pairs import PromptPair
from saepatch.errors import UserError
from saepatch.restoration.answering import Answered
from saepatch.restoration.ranking import find_safety_latents
from saepatch.restoration.restore import (
    answer_log_probs,
    change_scores,
    first_tokens,
    judge,
    refused_first_token,
    restore,
)
from saepatch.splicing.donors import CleanPrompts, OtherModel, Restore
from saepatch.splicing.interventions import Patch
from saepatch.splicing.splice import record_latents, splice

PAIRS = [PromptPair("how to bake?", "how to cake?", "S", "I"), PromptPair("abcde", "abxde", "S", "I")]


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("I cannot help with that.", "refuse"),
        (" I can\u2019t do this", "refuse"),
        ("Sorry, I\n won't.", "refuse"),
        ("I'M SORRY, but no", "refuse"),
        ("Sure, here is how to bake a cake.", "comply"),
        ("Sure. " + "Take flour and water and knead it well for a while, then rest. " * 2 + "I cannot wait!", "comply"),
        ("", "degenerate"),
        ("  \n", "degenerate"),
        ("car car car car car", "degenerate"),
        ("so it is so it is so it is so it is so it", "degenerate"),
        ("I cannot I cannot I cannot I cannot I cannot", "degenerate"),
        ("the very very big car", "comply"),
        ("It is very very very very good. I went home and made a plan for it all.", "comply"),
    ],
)
def test_three_outcomes(text, outcome):
    assert judge(text) == outcome


def test_first_tokens_are_read_after_the_prompt():
    model = tiny_model()
    ids = first_tokens(model, "how?", ["I cannot", "It", "Sorry"])
    assert sorted(map(model.tokenizer.decode, ids)) == ["I", "S"]
    with pytest.raises(UserError, match="merges with the prompt's last token"):
        first_tokens(model, "how?", [""])


def test_change_scores_scale_each_run_by_its_own_norm():
    """The definition of `find_safety_latents`, whose runs have scales of their own where inputs are normalised."""
    model, dictionary = tiny_model(), random_dictionary(normalize_activations="layer_norm")
    ranked = find_safety_latents(
        model,
        dictionary,
        [pair.corrupted for pair in PAIRS],
        CleanPrompts(tuple(pair.clean for pair in PAIRS), 1),
        completions=[[] for _ in PAIRS],
    )
    torch.testing.assert_close(
        change_scores(model, dictionary, PAIRS), ranked.change[dictionary.site], atol=1e-5, rtol=1e-4
    )


def test_change_scores():
    model, dictionary = tiny_model(), random_dictionary()
    rows = []
    for pair in PAIRS:
        batch = batch_pairs(model, [pair])
        clean, corrupted = (record_latents(model, dictionary, t).acts[0, -1] for t in (batch.clean, batch.corrupted))
        rows.append(clean - corrupted)
    expected = torch.stack(rows).pow(2).mean(0).sqrt() * dictionary.W_dec.norm(dim=-1)
    torch.testing.assert_close(change_scores(model, dictionary, PAIRS), expected, atol=1e-5, rtol=1e-4)


def test_refusal_by_the_first_token_equals_a_patch_of_one_prompt_at_a_time():
    model, dictionary = tiny_model(), random_dictionary()
    tokens = set()
    expected = []
    for pair in PAIRS:
        batch = batch_pairs(model, [pair])
        source = record_latents(model, dictionary, batch.clean)
        with splice(model, dictionary, Patch(source, range(48), "last", error=True)):
            expected.append(int(model.next_logits(batch.corrupted).argmax()))
    tokens = {expected[0]}
    found = refused_first_token(model, dictionary, PAIRS, tokens, range(48), error=True)
    assert found == [token in tokens for token in expected]
    assert found[0]


def test_restoring_nothing_but_itself_changes_nothing():
    model, dictionary = tiny_model(), random_dictionary()
    jailbroken = [p.corrupted for p in PAIRS]
    same, clean = CleanPrompts(tuple(jailbroken), 3), CleanPrompts(tuple(p.clean for p in PAIRS), 5)
    plain = model.generate(jailbroken, 8)
    assert restore(model, dictionary, jailbroken, same, max_new_tokens=8) == plain
    together = restore(model, dictionary, jailbroken, clean, max_new_tokens=8)
    assert restore(model, dictionary, jailbroken, clean, max_new_tokens=8, batch_size=1) == together
    assert together != plain


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_log_probs_of_answers_go_as_in_generation(family):
    """Against one uncached pass for each token, bare and while another model restores."""
    model, other, dictionary = tiny_model(family), tiny_model(family, seed=1), random_dictionary("resid_post.1")
    prompts, answers = ["the cat", "abcdef", "x y"], [[70, 80, 90], [75], [80, 81, 70, 99, 71]]

    def by_hand():
        rows = []
        for prompt, answer in zip(prompts, answers, strict=True):
            row, found = model.encode(prompt), []
            for token in answer:
                ids = model.pad([row])
                theirs, mine = (record_latents(m, dictionary, ids).acts for m in (other, model))
                change = torch.zeros_like(mine)
                start = len(model.encode(prompt)) - 2
                change[:, start:, [3, 9]] = (theirs - mine)[:, start:, [3, 9]]

                def add(_module, _args, output, change=change):
                    return output + change @ dictionary.W_dec

                handle = model.layout.blocks[1].register_forward_hook(add)
                found.append(model.logits(ids)[0, -1].log_softmax(-1))
                handle.remove()
                row = [*row, token]
            rows.append(torch.stack(found))
        return rows

    with splice(model, dictionary, Restore(OtherModel(other, 2), [3, 9])):
        restored = answer_log_probs(model, prompts, answers)
    for found, expected, answer in zip(restored, by_hand(), answers, strict=True):
        assert found.shape == (len(answer), 259)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    bare = answer_log_probs(model, prompts, answers)
    for found, prompt, answer in zip(bare, prompts, answers, strict=True):
        ids = [*model.encode(prompt), *answer]
        expected = model.logits(model.pad([ids]))[0, -len(answer) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (bare[0] - restored[0]).abs().max() > 1e-3
    for bad in ([[70]], [[70], [], [71]]):
        with pytest.raises(UserError, match="a non-empty one for each"):
            answer_log_probs(model, prompts, bad)


def test_answers_open_with_a_refusal_where_its_log_odds_are_above_zero():
    assert Answered(("a", "b", "c"), (1.5, -0.5, 0.0)).opened.tolist() == [True, False, False]
