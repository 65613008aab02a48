"""Concepts to steer other models towards than the embedded one: a character's gender, or those of a file."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.steering.degenerate import is_degenerate
from saepatch.steering.generate import Concept

from ..pronouns import BOYS, GIRLS, TEMPLATES

SHE = ("she", "her", "hers", "herself", "girl", "mom", "mommy")
HE = ("he", "him", "his", "himself", "boy", "dad", "daddy")
BEGINNINGS = {
    "tune": ("Once upon a time, there was a little {noun}.", "One day, a {noun} went to the park."),
    "report": (
        "There was once a {noun} who lived in a small house.",
        "A little {noun} liked to play outside.",
        "In a small town, there lived a happy {noun}.",
    ),
}
NEUTRAL = {
    "tune": ("child", "cat", "bear", "frog", "friend", "kid", "duck", "fox", "pig", "baby"),
    "report": ("person", "dog", "bird", "rabbit", "fish", "mouse", "bunny", "lion", "bee", "horse", "cow", "monkey"),
}


def words_judge(words: Sequence[str], against: Sequence[str] = ()) -> Callable[[str], bool]:
    """A judge of whether a text has some of the words, more than of the words `against`, and is not degenerate."""
    ours, theirs = ({word.lower() for word in each} for each in (words, against))

    def shown(text: str) -> bool:
        in_text = re.findall(r"\w+", text.lower())
        count = sum(word in ours for word in in_text)
        return count > sum(word in theirs for word in in_text) and not is_degenerate(text)

    return shown


def gender(model: LanguageModel, new_tokens: int) -> Concept:
    """The gender that is rarer in the model's own stories about a neutral character, on `tune`."""
    openings = {
        split: tuple(text.format(noun=noun) for noun in NEUTRAL[split] for text in BEGINNINGS[split])
        for split in NEUTRAL
    }
    prompts = {
        noun: tuple(text.format(noun=noun, name=name) for text in TEMPLATES["select"] for name in names[::2])
        for noun, names in (("girl", GIRLS), ("boy", BOYS))
    }
    judges = {"girl": words_judge(SHE, HE), "boy": words_judge(HE, SHE)}
    written = model.generate(openings["tune"], new_tokens)
    target = min(judges, key=lambda noun: sum(map(judges[noun], written)))
    return Concept(
        {"girl": "she", "boy": "he"}[target],
        present=prompts[target],
        absent=prompts["boy" if target == "girl" else "girl"],
        tune=openings["tune"],
        report=openings["report"],
        shown=judges[target],
        prefixes=tuple(f"{text.format(noun=target, name=name)} " for text, name in zip(
            TEMPLATES["select"], (GIRLS if target == "girl" else BOYS)[::2], strict=False))[:3],
    )  # fmt: skip


LISTS = ("present", "absent", "tune", "report", "words", "against", "prefixes")


def read_concepts(path: str) -> list[Concept]:
    """Concepts from a YAML or JSON file: mappings with name, present, absent, tune, report and words, and optional
    against, prefixes and positions.

    Raises:
        UserError: the file cannot be read, or a key is missing or unknown.
    """
    import yaml

    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot read concepts from {path!r} ({reason}): give a YAML file") from error
    return [_concept(each, path) for each in (given if isinstance(given, list) else [given])]


def _concept(given: Any, path: str) -> Concept:
    if not isinstance(given, dict) or not given.get("name"):
        raise UserError(f"{path!r}: a concept is a mapping with a name, lists {', '.join(LISTS)}, and positions")
    if unknown := sorted(map(str, set(given) - {*LISTS, "name", "positions"})):
        raise UserError(f"{path!r}, concept {given['name']!r}: unknown key {unknown[0]!r}")
    texts = {name: given.get(name) or [] for name in LISTS}
    for name, each in texts.items():
        if not isinstance(each, list) or not all(isinstance(text, str) for text in each):
            raise UserError(f"{path!r}, concept {given['name']!r}: {name} is not a list of texts")
        if not each and name not in ("against", "prefixes"):
            raise UserError(f"{path!r}, concept {given['name']!r}: {name} is missing or empty")
    words, against = texts.pop("words"), texts.pop("against")
    return Concept(
        str(given["name"]),
        shown=words_judge(words, against),
        positions=str(given.get("positions", "all")),
        **{name: tuple(each) for name, each in texts.items()},
    )
