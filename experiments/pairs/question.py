"""A question about pairs of prompts: its settings, and prompts that fit a model's tokenizer."""

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

TRIES = 4000  # prompt pairs that are built for a tokenizer before giving up on more
LEAST = 2  # pairs a split, for an interval


@dataclass(frozen=True)
class StudyConfig:
    """Settings of an experiment."""

    model: str = "organism"
    """Model: organism, a folder, or a Hugging Face id."""
    sae: str = "organism"
    """Dictionaries: organism, a folder (of one, or of one sub-folder a site) or RELEASE/SAE_ID, several with commas."""
    out: str = "runs/study"
    """Folder for summary.json, report.html, results.parquet, config.yaml and the figures."""
    pairs: int = 100
    """Prompt pairs a split, at most."""
    sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Numbers of latents, or of other directions, that are patched together."""
    verify: int = 150
    """Nodes with the largest estimates that each attribution method has checked exactly."""
    sample: int = 150
    """Nodes drawn at random from the others that are checked as well."""
    seed: int = 0
    """Seed of the pairs, controls and bootstrap draws."""
    device: str = "cpu"
    """Where to run: cpu, cuda or mps."""
    dtype: str = "float32"
    """Precision of the model: float32, bfloat16 or float16."""
    track: str = "none"
    """Besides the local log: none, wandb, wandb:offline, wandb:online, trackio, or several, separated by commas."""
    prepend_bos: bool | None = None
    """Put a BOS in front of texts whose tokenizer adds none; unset: where the dictionaries were trained so."""

    def __post_init__(self) -> None:
        if self.pairs < LEAST:
            raise UserError(f"pairs = {self.pairs} is too few for an interval: use at least {LEAST}")
        if not self.sizes or min(self.sizes) < 1 or sorted(set(self.sizes)) != list(self.sizes):
            raise UserError(f"sizes = {list(self.sizes)}: give rising numbers from 1, as in --sizes [1,4,16]")
        if min(self.verify, self.sample) < 2:
            raise UserError(f"verify = {self.verify}, sample = {self.sample}: use at least 2 of each")
        read_spec(self.track)


@dataclass(frozen=True)
class FramedPair:
    """A pair and what it was made from: pairs of one frame say alike things in a like order."""

    pair: PromptPair
    frame: str


@dataclass(frozen=True)
class Question:
    """What an experiment asks.

    Attributes:
        task: Name of the task of the embedded model, and of the rows.
        title: The report's title.
        prompts: A sentence on the prompts.
        difference: What the metric is the difference of, as in "the logit difference between She and He".
        candidates: Prompts for any other model, in the order they are tried in: (split, seed).
        kinds: Columns of the embedded task that, with the template, make a frame.
        first: Answers on one side of a two-sided task; None where answers differ from pair to pair.
    """

    task: str
    title: str
    prompts: str
    difference: str
    candidates: Callable[[str, int], Iterable[FramedPair]]
    kinds: tuple[str, ...] = ()
    first: frozenset[str] | None = None


def half_of(split: str) -> slice:
    """Every other word of a list is of the `report` split, the rest of the others."""
    return slice(0, None, 2) if split == "select" else slice(1, None, 2)


def fitting(model: LanguageModel, candidates: Iterable[FramedPair], n: int) -> list[FramedPair]:
    """The first `n` pairs whose two prompts have equally many tokens, and whose answers are single ones.

    Raises:
        UserError: fewer than `LEAST` of the candidates are.
    """
    fit: dict[tuple[str, str], FramedPair] = {}
    for framed in islice(candidates, TRIES):
        try:
            batch_pairs(model, [framed.pair])
        except UserError:
            continue
        fit.setdefault((framed.pair.clean, framed.pair.corrupted), framed)
        if len(fit) == n:
            break
    if len(fit) < LEAST:
        raise UserError(
            f"only {len(fit)} prompt pairs fit the tokenizer of {model.name}: the prompts of a pair need equally "
            "many tokens and its answers one token each, and this tokenizer splits too many words: use another model"
        )
    if len(fit) < n:
        log.info("%d pairs fit the tokenizer of %s, not %d", len(fit), model.name, n)
    return list(fit.values())


def embedded(question: Question, split: str, n: int, seed: int) -> list[FramedPair]:
    """The embedded model's own task."""
    rows = list(tasks.task(question.task, split, n, seed))
    frames = [" ".join([row["template"], *(row[kind] for kind in question.kinds)]) for row in rows]
    return [FramedPair(pair, frame) for pair, frame in zip(pairs_of(rows), frames, strict=True)]
