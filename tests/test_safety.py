"""Judging answers, ranking latents by what a jailbreak changes, restoring them."""

import pytest
import torch
from tiny import random_dictionary, tiny_model

from saepatch.errors import UserError
from saepatch.interventions import Patch
from saepatch.prompts import PromptPair, batch_pairs
from saepatch.restoring import CleanPrompts
from saepatch.safety import change_scores, first_tokens, judge, refused_first_token, restore
from saepatch.splicing import record_latents, splice

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
    with pytest.raises(UserError, match="does not start on a token of its own"):
        first_tokens(model, "how?", [""])


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
