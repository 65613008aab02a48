"""Which latents carry the gender of a character?

    python -m experiments.pronouns --model organism --sae organism --out runs/pronouns
    python -m experiments.pronouns --model MODEL --sae FOLDER_OR_RELEASE --out runs/pronouns

One prompt of a pair says "girl named Lily", the other "boy named Tim"; the answer is " She" or " He". The embedded
model is given the pairs of its own `pronoun` task.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from random import Random

from saepatch.cli.parser import run_config
from saepatch.data.pairs import PromptPair

from .pairs.question import FramedPair, Question, StudyConfig, half_of
from .pairs.study import run

# The report split has every other name. In many small tokenizers each half has names of one token and names of two, so
# that enough pairs of a girl and a boy make prompts of equal length.
GIRLS = ("Lily", "Mia", "Sue", "Amy", "Mary", "Sally", "Lucy", "Jane", "Molly", "Ella", "Sarah", "Lola")
BOYS = ("Tim", "Max", "Bob", "Leo", "Mike", "Tommy", "Jack", "Joe", "Billy", "Andy", "Pete", "Fred")
TEMPLATES = {
    "select": (
        "Once upon a time, there was a little {noun} named {name}.",
        "One day, a {noun} named {name} went to the park.",
        "There was a {noun} called {name} who had a big red ball.",
    ),
    "report": (
        "Once there was a {noun} named {name} who lived in a small house.",
        "In a small town, there lived a happy {noun} named {name}.",
        "A little {noun} named {name} liked to play outside.",
    ),
}


@dataclass(frozen=True)
class PronounsConfig(StudyConfig):
    """Find the latents that carry a character's gender, by patching, and compare them with other directions."""

    out: str = "runs/pronouns"
    """Folder for summary.json, report.html, results.parquet, config.yaml and the figures."""


def story_pairs(split: str, seed: int) -> Iterator[FramedPair]:
    """Pairs of a girl and a boy, the girl clean in half of them; splits share no name or template."""
    half = half_of(split)
    cells = list(product(enumerate(TEMPLATES[split]), enumerate(GIRLS[half]), enumerate(BOYS[half])))
    Random(f"{split}/{seed}").shuffle(cells)
    for (i, template), (j, girl), (k, boy) in cells:
        texts = [template.format(noun=noun, name=name) for noun, name in (("girl", girl), ("boy", boy))]
        she_first = (i + j + k) % 2 == 0  # no name or template is always on the clean side
        clean, corrupted = texts if she_first else texts[::-1]
        answer, counter = (" She", " He") if she_first else (" He", " She")
        yield FramedPair(PromptPair(clean, corrupted, answer, counter, f"{split}-{girl}-{boy}-{i}"), template)


QUESTION = Question(
    task="pronoun",
    title="She or he? Latents for the gender of a character",
    prompts=(
        "A person is named, and the next word is a pronoun for them. In the corrupted prompt the person has the other "
        "gender."
    ),
    difference="the logit difference between the two pronouns",
    candidates=story_pairs,
    first=frozenset({" She", " she"}),
)


def main(config: StudyConfig) -> None:
    run(QUESTION, config)


if __name__ == "__main__":
    sys.exit(run_config(PronounsConfig, main, "python -m experiments.pronouns"))
