"""Which latents carry the number of a sentence's subject?

    python -m experiments.agreement --model organism --sae organism --out runs/agreement
    python -m experiments.agreement --model gpt2 --sae gpt2-small-res-jb/blocks.8.hook_resid_pre --device cuda

"The key near the cabinets" → " is", "The keys near the cabinets" → " are": the verb agrees with the subject, not with
the noun next to it. The embedded model is given the pairs of its own `agreement` task.
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

# The report split has every other noun.
NOUNS = (
    "key", "cabinet", "car", "book", "boy", "girl", "dog", "cat", "table", "chair", "doctor", "teacher", "house",
    "tree", "picture", "window", "phone", "bottle", "farmer", "lawyer", "truck", "bird", "letter", "box",
)  # fmt: skip
PLURALS = {"box": "boxes"}
TEMPLATES = {
    "select": ("The {s} near the {d}", "I think that the {s} behind the {d}", "Today the {s} beside the {d}"),
    "report": ("The {s} next to the {d}", "We know that the {s} by the {d}", "This week the {s} above the {d}"),
}


@dataclass(frozen=True)
class AgreementConfig(StudyConfig):
    """Find the latents that carry the subject's number, by patching, and compare them with other directions."""

    out: str = "runs/agreement"
    """Folder for summary.json, report.html, results.parquet, config.yaml and the figures."""


def agreement_pairs(split: str, seed: int) -> Iterator[FramedPair]:
    """Pairs of a singular and a plural subject, the plural clean in half of them; splits share no noun."""
    half = half_of(split)
    nouns = list(permutations(NOUNS[half], 2))
    cells = list(product(TEMPLATES[split], nouns, (False, True), (False, True)))
    Random(f"{split}/{seed}").shuffle(cells)
    for template, (subject, distractor), many, distractor_many in cells:
        forms, verbs = (subject, plural(subject)), (" is", " are")
        d = plural(distractor) if distractor_many else distractor
        clean, corrupted = (template.format(s=forms[i], d=d) for i in (many, not many))
        example = f"{split}-{forms[many]}-{d}-{TEMPLATES[split].index(template)}"
        yield FramedPair(PromptPair(clean, corrupted, verbs[many], verbs[not many], example), template)


def plural(noun: str) -> str:
    return PLURALS.get(noun, f"{noun}s")


QUESTION = Question(
    task="agreement",
    title="Singular or plural? Latents for the number of the subject",
    prompts=(
        "The verb must agree with the subject, across a second noun in the singular or plural. The corrupted prompt "
        "has the subject in the other number."
    ),
    difference="the logit difference between the verb's two forms",
    candidates=agreement_pairs,
    first=frozenset({" is", " was"}),
)


def main(config: StudyConfig) -> None:
    run(QUESTION, config)


if __name__ == "__main__":
    sys.exit(run_config(AgreementConfig, main, "python -m experiments.agreement"))
