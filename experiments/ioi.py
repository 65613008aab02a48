"""Which latents name the indirect object?

    python -m experiments.ioi --model organism --sae organism --out runs/ioi
    python -m experiments.ioi --model gpt2 --sae gpt2-small-res-jb/blocks.8.hook_resid_pre --device cuda

"When Mary and John went to the store, John gave a drink to" → " Mary"; in the corrupted prompt Mary gives, and John is
the answer. The embedded model is given the pairs of its own `ioi` task.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations, product
from random import Random

from saepatch.cli.parser import run_config
from saepatch.data.pairs import PromptPair

from .pairs.question import FramedPair, Question, StudyConfig, half_of
from .pairs.study import run

# After Wang et al. 2022 (https://arxiv.org/abs/2211.00593). The report split has every other name, place and object;
# each is a single token of GPT-2's tokenizer.
NAMES = (
    "Mary", "John", "Tom", "James", "Anna", "Mark", "Sarah", "Paul", "Emily", "Jack", "Laura", "Kevin", "Amy", "David",
    "Lisa", "Peter", "Rachel", "Michael", "Kate", "Daniel", "Alice", "Andrew", "Jane", "George",
)  # fmt: skip
PLACES = ("store", "garden", "restaurant", "school", "hospital", "office", "house", "station")
OBJECTS = ("ring", "drink", "basketball", "computer", "necklace", "book", "letter", "phone")
TEMPLATES = {
    "select": (
        "When {a} and {b} went to the {place}, {s} gave a {gift} to",
        "Then, {a} and {b} had a lot of fun at the {place}. {s} gave a {gift} to",
        "While {a} and {b} were working at the {place}, {s} gave a {gift} to",
    ),
    "report": (
        "After {a} and {b} went to the {place}, {s} decided to give a {gift} to",
        "Then, {a} and {b} were thinking about going to the {place}. {s} wanted to give a {gift} to",
        "Friends {a} and {b} found a {gift} at the {place}. {s} handed it to",
    ),
}


@dataclass(frozen=True)
class IoiConfig(StudyConfig):
    """Find the latents that name the indirect object, by patching, and compare them with other directions."""

    out: str = "runs/ioi"
    """Folder for summary.json, report.html, results.parquet, config.yaml and the figures."""


def ioi_pairs(split: str, seed: int) -> Iterator[FramedPair]:
    """Pairs in the orders ABBA and BABA; splits share no template, name, place or object."""
    half = half_of(split)
    names = list(permutations(NAMES[half], 2))
    cells = list(product(TEMPLATES[split], names, PLACES[half], OBJECTS[half], ("ABBA", "BABA")))
    Random(f"{split}/{seed}").shuffle(cells)
    for template, (io, subject), place, gift, kind in cells:
        a, b = (io, subject) if kind == "ABBA" else (subject, io)
        clean, corrupted = (template.format(a=a, b=b, s=s, place=place, gift=gift) for s in (subject, io))
        example = f"{split}-{io}-{subject}-{place}-{gift}-{kind}-{TEMPLATES[split].index(template)}"
        yield FramedPair(PromptPair(clean, corrupted, f" {io}", f" {subject}", example), f"{template} {kind}")


QUESTION = Question(
    task="ioi",
    title="Who gets it? Latents for the indirect object",
    prompts=(
        "Two people meet and one gives something to the other; the answer is the one who was named only once. In the "
        "corrupted prompt the other person gives, which swaps the answer."
    ),
    difference="the logit difference between the two names",
    candidates=ioi_pairs,
    kinds=("kind",),
)


def main(config: StudyConfig) -> None:
    run(QUESTION, config)


if __name__ == "__main__":
    sys.exit(run_config(IoiConfig, main, "python -m experiments.ioi"))
