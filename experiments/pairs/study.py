"""What the experiments share: a question about pairs of prompts, asked of any model and its dictionaries.

Everything is chosen on the `select` split, every figure comes from `report`, whose names, templates and objects are
others. On a large model the sweeps over all latents and all dimensions are long: use `--device cuda`, or fewer pairs.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import torch

from saepatch.data.batches import batch_pairs
from saepatch.data.pairs import PromptPair, pairs_of
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import load_saes
from saepatch.errors import UserError
from saepatch.measure.quality import latent_statistics
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading import load_model
from saepatch.model.sites import Site
from saepatch.organism import is_checkpoint, tasks
from saepatch.pages import track_page
from saepatch.records.files import check_writable, output_folder
from saepatch.tracking.open import RunDescription, open_tracker, read_spec

from . import stages
from .findings import Found, printed, unsure
from .page import write

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
    """Beside the local log: none, wandb, wandb:offline, wandb:online, trackio, or several with commas between."""
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
class Framed:
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
        build: Prompts for any other model: (model, split, n, seed).
        kinds: Columns of the embedded task that, with the template, make a frame.
        first: Answers on one side of a two-sided task; None where answers differ from pair to pair.
    """

    task: str
    title: str
    prompts: str
    difference: str
    build: Callable[[LanguageModel, str, int, int], list[Framed]]
    kinds: tuple[str, ...] = ()
    first: frozenset[str] | None = None


def fitting(model: LanguageModel, candidates: Iterable[Framed], n: int) -> list[Framed]:
    """The first `n` pairs whose two prompts have equally many tokens, and whose answers are single ones.

    Raises:
        UserError: fewer than `LEAST` of the candidates are.
    """
    found: dict[tuple[str, str], Framed] = {}
    for one in islice(candidates, TRIES):
        try:
            batch_pairs(model, [one.pair])
        except UserError:
            continue
        found.setdefault((one.pair.clean, one.pair.corrupted), one)
        if len(found) == n:
            break
    if len(found) < LEAST:
        raise UserError(
            f"only {len(found)} prompt pairs fit the tokenizer of {model.name}: the prompts of a pair need equally "
            "many tokens and its answers one token each, and this tokenizer splits too many words: use another model"
        )
    if len(found) < n:
        log.info("%d pairs fit the tokenizer of %s, not %d", len(found), model.name, n)
    return list(found.values())


def embedded(question: Question, split: str, n: int, seed: int) -> list[Framed]:
    """The embedded model's own task."""
    rows = list(tasks.task(question.task, split, n, seed))
    frames = [" ".join([row["template"], *(row[kind] for kind in question.kinds)]) for row in rows]
    return [Framed(pair, frame) for pair, frame in zip(pairs_of(rows), frames, strict=True)]


def largest_group(model: LanguageModel, prompts: Sequence[Framed]) -> list[PromptPair]:
    """The most pairs of one frame whose positions mean the same.

    Tokens that every prompt of a frame holds are the frame's own; where these stand at the same positions in two
    prompts, so does what stands between them.
    """
    frames: dict[str, list[tuple[PromptPair, list[int], list[int]]]] = {}
    for one in prompts:
        ids = model.encode(one.pair.clean), model.encode(one.pair.corrupted)
        frames.setdefault(one.frame, []).append((one.pair, *ids))
    groups: dict[tuple[object, ...], list[PromptPair]] = {}
    for frame, members in frames.items():
        own = set.intersection(*(set(ids) for _, *both in members for ids in both))
        for pair, *both in members:
            places = tuple(tuple((i, t) for i, t in enumerate(ids) if t in own) for ids in both)
            groups.setdefault((frame, len(both[0]), places), []).append(pair)
    return max(groups.values(), key=len)


def position_labels(model: LanguageModel, pairs: Sequence[PromptPair]) -> list[str]:
    """Each position of a group: its number and its token where all agree; else the first pair's, in brackets."""
    rows = [model.encode(text) for pair in pairs for text in (pair.clean, pair.corrupted)]
    labels = []
    for position, column in enumerate(zip(*rows, strict=True)):
        clean, corrupted = (model.tokenizer.decode([token]).strip() or "␣" for token in column[:2])
        shown = clean if clean == corrupted else f"{clean}/{corrupted}"
        labels.append(f"{position} {shown if len(set(column)) == 1 else f'[{shown}]'}")
    return labels


def token_texts(model: LanguageModel, pairs: Sequence[PromptPair]) -> list[list[str]]:
    """The texts of each clean prompt's tokens."""
    return [[model.tokenizer.decode([token]) for token in model.encode(pair.clean)] for pair in pairs]


def load(config: StudyConfig) -> tuple[LanguageModel, dict[Site, Dictionary]]:
    """The model and every dictionary, checked against each other."""
    saes: dict[Site, Dictionary] = {}
    for spec in config.sae.split(","):
        for site, dictionary in load_saes(spec.strip(), config.device).items():
            if site in saes:
                raise UserError(f"two dictionaries for {site} ({saes[site].name}, {dictionary.name}): give one of them")
            saes[site] = dictionary
    bos = config.prepend_bos
    if bos is None:
        bos = any(_trained_with_bos(dictionary) for dictionary in saes.values())
    model = load_model(config.model, config.device, config.dtype, prepend_bos=bos)
    for dictionary in saes.values():
        dictionary.check(model)
    return model, dict(sorted(saes.items()))


def _trained_with_bos(dictionary: Dictionary) -> bool:
    cfg: Any = dictionary.sae.cfg
    return bool(cfg.metadata.get("prepend_bos"))


def run(question: Question, config: StudyConfig) -> Found:
    """Answer the question for the model; files go to `config.out`, and tables to the terminal.

    Raises:
        UserError: an output folder that cannot be written, a model and dictionaries that do not fit, too few pairs, or
            a model that does not tell the clean prompts from the corrupted ones.
    """
    torch.manual_seed(config.seed)
    check_writable(config.out)  # now, and not after minutes of work
    clock: dict[str, float] = {}
    with _stage("load", clock):
        model, saes = load(config)
        own = is_checkpoint(config.model)
        select, report = (
            embedded(question, split, config.pairs, config.seed)
            if own
            else question.build(model, split, config.pairs, config.seed)
            for split in ("select", "report")
        )
    settings = replace(config, prepend_bos=model.prepend_bos)
    found = _measure(question, settings, model, list(saes.values()), select, report, clock)
    out = output_folder(config.out)
    about = RunDescription(out, run=question.task, config=asdict(settings), job_type="experiment")
    with open_tracker(config.track, about) as tracker:
        track_page(write(found, out), out / "report.html", tracker)
    sys.stdout.write(f"{printed(found)}\n\nReport: {out / 'report.html'}   Figures: {out / 'summary.json'}\n")
    return found


def _measure(
    question: Question,
    config: StudyConfig,
    model: LanguageModel,
    saes: Sequence[Dictionary],
    framed_select: Sequence[Framed],
    framed_report: Sequence[Framed],
    clock: dict[str, float],
) -> Found:
    select, report = ([one.pair for one in framed] for framed in (framed_select, framed_report))
    group, seed = largest_group(model, framed_report), config.seed
    with _stage("maps", clock):
        streams = stages.stream_effects(model, group)
        heads = stages.head_effects(model, report)
    with _stage("sites", clock):
        sites = stages.rank_sites(model, saes, select, report, max(config.sizes), seed)
        best = stages.best_site(sites)
    with _stage("latents", clock):
        latents = stages.by_position(model, best, group)
        tops = stages.patch_tops(model, best, report, seed)
        if warning := unsure(tops["denoise"], model.name):
            log.warning(warning)
        prompts = model.tokenize([text for pair in select for text in (pair.clean, pair.corrupted)])
        statistics = latent_statistics(model, best.dictionary, prompts)
        curves = stages.curves(model, best, report, config.sizes, statistics, seed)
    with _stage("attribution", clock):
        agreements = stages.screen(model, best.dictionary, report, config.verify, config.sample, seed)
    with _stage("other directions", clock):
        kinds = stages.compare_directions(model, best, select, report, config.sizes, question.first)
    return Found(
        question=question,
        config=config,
        model=model,
        columns=position_labels(model, group),
        group=len(group),
        examples=report[:3],
        tokens=token_texts(model, report),
        group_tokens=token_texts(model, group),
        streams=streams,
        heads=heads,
        sites=sites,
        best=best,
        latents=latents,
        tops=tops,
        curves=curves,
        agreements=agreements,
        kinds=kinds,
        seconds=clock,
    )


@contextmanager
def _stage(name: str, clock: dict[str, float]) -> Iterator[None]:
    log.info("%s …", name)
    start = time.monotonic()
    yield
    clock[name] = round(time.monotonic() - start, 2)
