"""Letters of multiple choice: pairs read back from their prompts, accuracy against chance, what is localised."""

import re
from collections import Counter
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from tiny import random_dictionary, tiny_model

from experiments import letters
from experiments.letters import CONTENTS, LABELS, LETTERS, Accuracy, Carried, LettersConfig, LettersResults
from experiments.real.stages.tasks import CAPITALS
from saepatch.data.pairs import PromptPair
from saepatch.errors import UserError
from saepatch.measure.patching import patch_heads
from saepatch.records.statistics import Interval

pytestmark = pytest.mark.whole


def read(prompt):
    """The last question of a prompt: the right option's place and label, and the options in order."""
    last = prompt[prompt.rindex("Question:") :]
    country = re.search(r"capital of (.*)[?]", last)[1]
    lines = re.findall(r"^(.)[.] (.*)$", last, re.MULTILINE)
    options = [option for _, option in lines]
    place = options.index(CAPITALS[country])
    return place, lines[place][0], options


@pytest.mark.parametrize("kind", [CONTENTS, LABELS])
def test_pairs_differ_in_what_they_say(kind):
    shown, asked = letters.choices(0)
    assert Counter(re.findall(r"Answer: (.)", shown)) == dict.fromkeys(LETTERS, 1)
    for some in asked.values():
        assert set(Counter(choice.right for choice in some).values()) == {len(some) // 4}
        once = letters.once(some)
        assert len({choice.question for choice in once}) == len(once) == len(some) // 4
        for pair in letters.pairs_of(shown, once, kind, 1):
            clean, corrupted = read(pair.clean), read(pair.corrupted)
            assert (pair.answer, pair.counter) == (f" {clean[1]}", f" {corrupted[1]}")
            assert pair.answer != pair.counter
            if kind == CONTENTS:
                assert clean[0] != corrupted[0]
                assert sum(a != b for a, b in zip(clean[2], corrupted[2], strict=True)) == 2
            else:
                assert clean[0] == corrupted[0]
                assert clean[2] == corrupted[2]
    first, second = ({choice.question for choice in some} for some in asked.values())
    assert not first & second


class Answering:
    """A model that gives a letter by a rule, as text to text."""

    def __init__(self, rule):
        self.rule = rule

    def encode(self, text):
        return [ord(letter) for letter in text]

    def next_logits(self, prompts):
        logits = torch.zeros(1, 128)
        logits[0, ord(self.rule(prompts[0]))] = 1
        return logits


def test_chance_is_told_from_knowledge():
    shown, asked = letters.choices(0)
    some = asked["report"]
    knows = letters.accuracy(Answering(lambda prompt: read(prompt)[1]), shown, some)
    assert knows.right.value == 1.0
    assert knows.above_chance
    assert knows.right.n == len(some) // 4  # questions, not places
    always = letters.accuracy(Answering(lambda prompt: "C"), shown, some)
    assert (always.right.value, always.letters) == (0.25, (0, 0, 1, 0))
    assert not always.above_chance
    assert "no label to localise" in letters.verdict(LettersResults(always, None, {}))


def test_what_matters_in_both_kinds_carries_the_letter():
    yes, no = Interval(0.5, 0.4, 0.6, 9), Interval(0.0, -0.1, 0.1, 9)
    heads = Carried({CONTENTS: {"1.0": yes, "2.3": yes, "0.1": no}, LABELS: {"1.0": yes, "2.3": no, "0.1": no}})
    text = letters.verdict(LettersResults(Accuracy(Interval(1, 0.9, 1, 9), (0.25,) * 4), heads, {}))
    assert "(they matter in both kinds of pairs): 1.0; the option's place (in the first kind alone): 2.3." in text


def test_effects_are_those_of_patching():
    model, dictionary = tiny_model("llama"), random_dictionary()
    words = ("cat", "dog", "hen", "cow", "pig", "fox", "ape", "bee")
    some = [PromptPair(f"the {a}", f"the {b}", "x", "y", f"{a}{b}") for a, b in permutations(words, 2)]
    pairs = {"select": {CONTENTS: some[:9], LABELS: some[9:18]}, "report": {CONTENTS: some[18:30], LABELS: some[30:]}}
    heads = letters.of_heads(model, pairs)
    truth = patch_heads(model, pairs["report"][LABELS])
    named = {f"{edit.site.layer}.{edit.units[0]}": i for i, edit in enumerate(truth.edits)}
    for name, effect in heads.effects[LABELS].items():
        assert effect.value == pytest.approx(truth.of(named[name]).value, nan_ok=True)
    mean = np.mean([patch_heads(model, some).ratios() for some in pairs["select"].values()], axis=0)
    first = truth.edits[int(mean.argmax())]
    assert next(iter(heads.effects[CONTENTS])) == f"{first.site.layer}.{first.units[0]}"
    latents = letters.of_latents(model, dictionary, pairs, 3, 0)
    for kind in (CONTENTS, LABELS):
        assert set(latents.effects[kind]) >= {f"ranked where {CONTENTS}"}
        assert all(np.isfinite(each.value) for each in latents.effects[kind].values())


def test_settings():
    with pytest.raises(UserError, match="no model"):
        LettersConfig()
    with pytest.raises(UserError, match="at least 1"):
        replace(LettersConfig("x"), latents=0)
