"""A question about pairs of prompts: settings, and pairs that fit a model's tokenizer."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

from saepatch.data.batches import batch_pairs
from saepatch.data.pairs import PromptPair, pairs_of
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.organism import tasks
from saepatch.tracking.open import read_spec

log = logging.getLogger(__name__)

TRIES = 4000  # largest number of candidate pairs tried for a tokenizer
IN_VAIN = 400  # candidates in a row that add no pair, after which none is expected any more
LEAST = 2  # pairs per split


@dataclass(frozen=True)
class StudyConfig:
    """Settings of an experiment on pairs."""

    model: str = "organism"
    """Model: organism, a folder, or a Hugging Face id."""
    sae: str = "organism"
    """Dictionaries, separated by commas: organism, a folder (one dictionary, or a sub-folder per site) or
    RELEASE/SAE_ID."""
    out: str = "runs/study"
    """Folder for summary.json, report.html, results.parquet, config.yaml and the figures."""
    pairs: int = 100
    """Maximum number of prompt pairs per split."""
    sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Numbers of latents, or of other directions, that are patched together."""
    verify: int = 150
    """Number of nodes with the largest estimates of each attribution method that are run exactly."""
    sample: int = 150
    """Number of further nodes, drawn at random, that are run exactly."""
    seed: int = 0
    """Seed of the pairs, controls and bootstrap draws."""
    device: str = "cpu"
    """Where to run: cpu, cuda or mps."""
    dtype: str = "float32"
    """Precision of the model: float32, bfloat16 or float16."""
    track: str = "none"
    """Trackers besides the local log, separated by commas: none, wandb, wandb:offline, wandb:online, trackio."""
    prepend_bos: bool | None = None
    """Prepend a BOS where the tokenizer adds none; unset: if a dictionary was trained that way."""

    def __post_init__(self) -> None:
        if self.pairs < LEAST:
            raise UserError(f"pairs = {self.pairs} is too few for an interval: use at least {LEAST}")
        if not self.sizes or min(self.sizes) < 1 or sorted(set(self.sizes)) != list(self.sizes):
            raise UserError(f"sizes = {list(self.sizes)}: give increasing numbers from 1, as in --sizes [1,4,16]")
        if min(self.verify, self.sample) < 2:
            raise UserError(f"verify = {self.verify}, sample = {self.sample}: use at least 2 of each")
        read_spec(self.track)


@dataclass(frozen=True)
class FramedPair:
    """A pair and its frame, the pattern that it was made from: pairs of one frame have the same structure."""

    pair: PromptPair
    frame: str


@dataclass(frozen=True)
class Question:
    """The question that an experiment asks.

    Attributes:
        task: Name of the embedded model's task, also written in the rows.
        title: The report's title.
        prompts: Description of the prompts.
        difference: Name of the metric in text, as in "the logit difference between She and He".
        candidates: Function of (split, seed) that yields pairs for other models, in the order in which they are tried.
        kinds: Columns of the embedded task that make up the frame, together with the template.
        first: Answers of one of the two classes; None where answers vary by pair.
    """

    task: str
    title: str
    prompts: str
    difference: str
    candidates: Callable[[str, int], Iterable[FramedPair]]
    kinds: tuple[str, ...] = ()
    first: frozenset[str] | None = None


def half_of(split: str) -> slice:
    """The slice of a list of words that a split uses: the second, fourth, … for `report`, the rest for `select`."""
    return slice(0, None, 2) if split == "select" else slice(1, None, 2)


def fitting(model: LanguageModel, candidates: Iterable[FramedPair], n: int) -> list[FramedPair]:
    """The first `n` pairs whose prompts have the same number of tokens and whose answers are one token each.

    Candidates are tried until `IN_VAIN` in a row add no pair.

    Raises:
        UserError: fewer than `LEAST` of the candidates fit.
    """
    fit: dict[tuple[str, str], FramedPair] = {}
    last = 0  # number of the last candidate that added a pair
    for number, framed in enumerate(islice(candidates, TRIES)):
        if len(fit) == n or number - last > IN_VAIN:
            break
        prompts = (framed.pair.clean, framed.pair.corrupted)
        if prompts not in fit and _fits(model, framed.pair):
            fit[prompts], last = framed, number
    if len(fit) < LEAST:
        raise UserError(
            f"only {len(fit)} prompt pairs fit the tokenizer of {model.name}, which splits too many words (a pair's "
            "prompts need the same number of tokens, its answers one token each): use another model"
        )
    if len(fit) < n:
        log.info("%d pairs fit the tokenizer of %s, not %d", len(fit), model.name, n)
    return list(fit.values())


def _fits(model: LanguageModel, pair: PromptPair) -> bool:
    try:
        batch_pairs(model, [pair])
    except UserError:
        return False
    return True


def embedded(question: Question, split: str, n: int, seed: int) -> list[FramedPair]:
    """Pairs of the embedded model's own task."""
    rows = list(tasks.task(question.task, split, n, seed))
    frames = [" ".join([row["template"], *(row[kind] for kind in question.kinds)]) for row in rows]
    return [FramedPair(pair, frame) for pair, frame in zip(pairs_of(rows), frames, strict=True)]
