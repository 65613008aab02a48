"""Prompt pairs for a real model: indirect objects, greater-than, agreement, facts and pronouns.

Candidates are made from templates; those that fit the tokenizer (equal token lengths, answers of one token) are given
to the model, and the pairs that it gets right are kept: the answer is ahead after the clean prompt and the
counter-answer after the corrupted one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations, product
from random import Random

import numpy as np
import torch
from jaxtyping import Bool, Float

from saepatch.data.batches import batch_pairs, same_length_batches
from saepatch.data.pairs import PromptPair, load_pairs
from saepatch.engine.gradients import Readout
from saepatch.engine.metrics import logit_difference
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.organism import is_checkpoint
from saepatch.records.statistics import Interval, wilson_share

from ...agreement import agreement_pairs
from ...common.kept import KeptResults
from ...ioi import ioi_pairs
from ...pairs.question import FramedPair, fitting, half_of
from ...pronouns import story_pairs

FEWEST_RIGHT = 8  # pairs of each split; a task with fewer is left out
BATCH = 32  # pairs per forward pass
SPLITS = ("select", "report")

Candidates = Callable[[str, int], Iterator[FramedPair]]

# Landmarks by city: answers that many tokenizers have as one token.
LANDMARKS = {
    "Eiffel Tower": "Paris", "Colosseum": "Rome", "Brandenburg Gate": "Berlin", "Buckingham Palace": "London",
    "Kremlin": "Moscow", "Acropolis": "Athens", "Forbidden City": "Beijing", "Hagia Sophia": "Istanbul",
    "Space Needle": "Seattle", "Willis Tower": "Chicago", "Louvre Museum": "Paris", "Trevi Fountain": "Rome",
    "Reichstag building": "Berlin", "Tower Bridge": "London", "Red Square": "Moscow", "Parthenon": "Athens",
    "Prado Museum": "Madrid", "Blue Mosque": "Istanbul", "Charles Bridge": "Prague", "Wrigley Field": "Chicago",
    "Burj Khalifa": "Dubai", "Fenway Park": "Boston", "White House": "Washington", "Sagrada Familia": "Barcelona",
    "Notre Dame Cathedral": "Paris", "Pantheon": "Rome", "Tower of London": "London", "Anne Frank House": "Amsterdam",
}  # fmt: skip
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Germany": "Berlin", "Spain": "Madrid", "Russia": "Moscow", "Greece": "Athens",
    "China": "Beijing", "Japan": "Tokyo", "Egypt": "Cairo", "Austria": "Vienna", "Poland": "Warsaw", "Cuba": "Havana",
    "Ireland": "Dublin", "Portugal": "Lisbon", "Sweden": "Stockholm", "Norway": "Oslo", "Finland": "Helsinki",
    "Hungary": "Budapest", "Denmark": "Copenhagen", "Turkey": "Ankara", "Iran": "Tehran", "Iraq": "Baghdad",
    "Kenya": "Nairobi", "Syria": "Damascus", "Thailand": "Bangkok", "Peru": "Lima", "Canada": "Ottawa",
    "Lebanon": "Beirut",
}  # fmt: skip
FACT_TEMPLATES: Mapping[str, tuple[tuple[str, Mapping[str, str]], ...]] = {
    "select": (
        ("The {subject} can be found in the city of", LANDMARKS),
        ("Everyone knows that the capital city of {subject} is called", CAPITALS),
    ),
    "report": (
        ("The {subject} is located in the city of", LANDMARKS),
        ("The capital of {subject} is the city of", CAPITALS),
    ),
}
EVENTS = {
    "select": ("war", "voyage", "siege", "reign"),
    "report": ("project", "famine", "strike", "expedition"),
}  # splits share no event
CENTURIES = ("13", "14", "15", "16", "17", "18")


@dataclass(frozen=True)
class PromptTask:
    """One kind of prompts: a title, a sentence on them, and a function of (split, seed) that yields candidates."""

    title: str
    prompts: str
    candidates: Candidates


def fact_pairs(split: str, seed: int) -> Iterator[FramedPair]:
    """Pairs of subjects with different answers; splits share no template and no subject."""
    cells = [
        (template, known, a, b)
        for template, known in FACT_TEMPLATES[split]
        for a, b in permutations(list(known)[half_of(split)], 2)
        if known[a] != known[b]
    ]
    Random(f"{split}/{seed}").shuffle(cells)
    for template, known, a, b in cells:
        clean, corrupted = (template.format(subject=subject) for subject in (a, b))
        yield FramedPair(PromptPair(clean, corrupted, f" {known[a]}", f" {known[b]}", f"{split}-{a}-{b}"), template)


def greater_than_pairs(split: str, seed: int) -> Iterator[FramedPair]:
    """Pairs of an early and a late year of one century, each clean in half of the pairs.

    The answer is later than the clean year; the counter-answer is later than the corrupted year. The earlier of the two
    comes before the late year, so that it is wrong there. Tokenizers that split years into digits are given the tens
    digit, others two digits.
    """
    template = "The {event} lasted from the year {century}{year} to the year {century}"
    cells = list(product(EVENTS[split], CENTURIES, (1, 2, 3), (5, 6, 7), range(2, 8), (False, True), ("", "5")))
    Random(f"{split}/{seed}").shuffle(cells)
    for event, century, early, late, unit, late_first, ones in cells:
        prompts = [template.format(event=event, century=century, year=f"{tens}{unit}") for tens in (early, late)]
        answers = [f"{tens + 1}{ones}" for tens in (early, late)]
        if late_first:
            prompts, answers = prompts[::-1], answers[::-1]
        example = f"{split}-{event}-{century}-{early}-{late}-{unit}-{late_first}"
        yield FramedPair(PromptPair(prompts[0], prompts[1], answers[0], answers[1], example), template)


# After Wang et al. 2022 (indirect objects), Hanna et al. 2023 (greater-than), Linzen et al. 2016 (agreement) and
# Meng et al. 2022 (facts).
TASKS: Mapping[str, PromptTask] = {
    "ioi": PromptTask(
        "Indirect objects",
        "The answer is the person who is named only once; in the corrupted prompt the other one gives.",
        ioi_pairs,
    ),
    "facts": PromptTask(
        "Facts",
        "A landmark's or a country's city; the corrupted prompt has another subject of equal length.",
        fact_pairs,
    ),
    "greater_than": PromptTask(
        "Greater-than",
        "The end of a span of years is later than its start; the other year of the pair is the counter-answer.",
        greater_than_pairs,
    ),
    "agreement": PromptTask(
        "Subject–verb agreement", "The verb agrees with the subject, across another noun.", agreement_pairs
    ),
    "pronouns": PromptTask("Pronouns", "A pronoun for a named girl or boy.", story_pairs),
}


@dataclass(frozen=True, eq=False)
class TaskPairs:
    """The pairs of a task that the model gets right, by split, and its accuracy over all that fit the tokenizer.

    `reason` explains why the task is left out; it is empty, and both splits have pairs, where the task is used.
    """

    name: str
    framed: Mapping[str, Sequence[FramedPair]]
    accuracy: Mapping[str, Interval]
    reason: str = ""

    def pairs(self, split: str) -> list[PromptPair]:
        return [framed.pair for framed in self.framed[split]]


@dataclass(frozen=True, eq=False)
class PairMetrics:
    """The logit difference of every candidate pair that fits, after both of its prompts."""

    clean: Float[np.ndarray, "pairs"]
    corrupted: Float[np.ndarray, "pairs"]

    @property
    def right(self) -> Bool[np.ndarray, "pairs"]:
        return (self.clean > 0) & (self.corrupted < 0)


@torch.no_grad()
def pair_metrics(model: LanguageModel, pairs: Sequence[PromptPair]) -> PairMetrics:
    """The logit difference after the clean and the corrupted prompt of each pair, without patching."""
    values = np.zeros((2, len(pairs)))
    for part in same_length_batches(batch_pairs(model, pairs), BATCH):
        readout = Readout.of(logit_difference, part, model)
        with readout.running(model):
            for row, tokens in enumerate((part.clean, part.corrupted)):
                values[row, part.index.cpu().numpy()] = readout(model.next_logits(tokens)).cpu().numpy()
    return PairMetrics(*values)


def read_task(model: LanguageModel, name: str, n: int, seed: int, kept: KeptResults) -> TaskPairs:
    """The first `n` pairs of each split that the model gets right, of at most `2 n` candidates."""
    framed: dict[str, Sequence[FramedPair]] = {}
    accuracy: dict[str, Interval] = {}
    for split in SPLITS:
        try:
            fit = fitting(model, TASKS[name].candidates(split, seed), 2 * n)
        except UserError as error:
            return TaskPairs(name, {}, accuracy, str(error))
        measure = partial(pair_metrics, model, [each.pair for each in fit])
        metrics = kept.get(f"tasks/{name}/{split}", PairMetrics, measure)
        framed[split] = [each for each, right in zip(fit, metrics.right, strict=True) if right][:n]
        accuracy[split] = wilson_share(metrics.right.astype(float))
        if len(framed[split]) < FEWEST_RIGHT:
            reason = (
                f"the model gets {int(metrics.right.sum())} of {len(fit)} {split} pairs right, fewer than "
                f"{FEWEST_RIGHT}, so there is nothing to localise"
            )
            return TaskPairs(name, {}, accuracy, reason)
    return TaskPairs(name, framed, accuracy)


def task_pairs(
    name: str, model: LanguageModel, task: str, sizes: Mapping[str, int], seed: int, kept: KeptResults
) -> dict[str, list[PromptPair]]:
    """Pairs of a task by split: the embedded model's own, or those that another model gets right.

    Another model's `tune` is what `select` has beyond the first pairs.

    Raises:
        UserError: an unknown task, or the model gets too few pairs of it right.
    """
    if is_checkpoint(name):
        return {split: load_pairs(task, split, n, seed) for split, n in sizes.items()}
    if task not in TASKS:
        raise UserError(f"no task is called {task!r}: for {name}, use one of {', '.join(TASKS)}")
    first, second = sizes["select"], sizes.get("tune", 0)
    read = read_task(model, task, max(first + second, sizes["report"]), seed, kept)
    if read.reason:
        raise UserError(f"{task} cannot be studied on {name}: {read.reason}")
    select, report = (read.pairs(split) for split in SPLITS)
    if second:
        first = min(first, len(select) * first // (first + second))  # both have a part of what there is
        return {"select": select[:first], "tune": select[first : first + second], "report": report[: sizes["report"]]}
    return {"select": select[:first], "report": report[: sizes["report"]]}
