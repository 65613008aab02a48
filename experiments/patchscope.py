"""Can the organism explain its own latents? Refusal and sentiment latents are written into explanation prompts.

    python -m experiments.patchscope --out runs/patchscope

A reading names its concept if it contains a word of the concept that the same prompt does not produce without the
latent. Controls: random live latents, searched for the same words, and the embeddings of single words, which show
whether the prompts work at all. A stopped run continues when the same command is given again.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saepatch.cli.parser import run_config
from saepatch.demo.concepts import WORDS, organism_concepts
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import load_saes
from saepatch.engine.components import Directions
from saepatch.errors import UserError
from saepatch.measure.controls import random_latents
from saepatch.measure.quality import latent_statistics
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading.load import load_model
from saepatch.model.sites import Site
from saepatch.organism import texts, world
from saepatch.reading.patchscope import SCALES, Reading, best_reading, read_by_patchscope
from saepatch.records.provenance import Provenance
from saepatch.records.statistics import Interval, wilson_share
from saepatch.report import Block, Facts, Page, Section, Table
from saepatch.runs.measurements import measurements
from saepatch.runs.ownership import check_owner
from saepatch.steering.contrasts import contrast, first_alive
from saepatch.steering.generate import Concept, direction_dictionary
from saepatch.tracking.open import read_spec

from .common.kept import KeptResults, deciding
from .common.tracked import conclude

X = "Lucy"  # the placeholder: one token
PROMPTS = (
    "Emma, X; Emma, X; Emma,",
    "Hello X, my name is Anna. Goodbye",
    "The X is",
    "What is X? Answer:",
    "The film was X. The review is",
)
QUESTIONS = ("What is X?", "Tell me about X.")  # put into the chat template
COPIES = PROMPTS[:2]  # prompts whose continuation repeats the placeholder's word
FIRST = Site(0, "resid_pre")
TOKENS = 12


@dataclass(frozen=True)
class PatchscopeConfig:
    """Test whether the embedded model can name what its refusal and sentiment latents stand for."""

    sae: str = "organism"
    """Dictionaries: organism, or a folder with one sub-folder per site."""
    out: str = "runs/patchscope"
    """Folder for summary.json, report.html and config.yaml."""
    latents: int = 5
    """Number of latents of each concept and site."""
    random: int = 20
    """Number of random live latents of each site."""
    seed: int = 0
    """Seed of prompts and random latents."""
    track: str = "none"
    """Trackers besides the local log, separated by commas: none, wandb, wandb:offline, wandb:online, trackio."""

    def __post_init__(self) -> None:
        read_spec(self.track)
        if min(self.latents, self.random) < 1:
            raise UserError(f"latents = {self.latents}, random = {self.random}: use at least 1 of each")


@dataclass(frozen=True, eq=False)
class NamedShares:
    """Shares of readings that name a concept: at the chosen scale, and at any scale."""

    site: str
    written_at: str
    concept: str
    own: Interval
    own_any: Interval
    random: Interval
    random_any: Interval


Words = frozenset[str]


def words(text: str) -> Words:
    return frozenset(re.findall(r"\w+", text.lower()))


def lexicon(concept: str) -> Words:
    """Words that name a concept and are in the model's vocabulary of planted texts."""
    if concept == "refusal":
        return words(" ".join(world.REFUSALS).replace("{verb}", "").replace("{target}", "")) & {
            "cannot", "sorry", "help", "hurt"}  # fmt: skip
    side = "good" if concept == "positive sentiment" else "bad"
    place = ("good", "bad").index(side)
    return WORDS[side] | {verdicts[place] for verdicts in world.VERDICTS.values()}


def prompts(model: LanguageModel) -> list[str]:
    return [*PROMPTS, *(model.chat(question) for question in QUESTIONS)]


def read(
    model: LanguageModel, dictionary: Dictionary, latents: Sequence[int], prompt: str, at: Site
) -> list[list[Reading]]:
    """Readings of latents, written at every placeholder of a prompt."""
    text = prompt.replace("X", X)
    (token,) = model.encode(f"the {X}")[len(model.encode("the")) :]
    places = [place for place, each in enumerate(model.encode(text)) if each == token]
    return read_by_patchscope(model, dictionary, latents, text, places, site=at, max_new_tokens=TOKENS)


def named(
    model: LanguageModel, dictionary: Dictionary, latents: Sequence[int], at: Site, lexicons: Mapping[str, Words]
) -> dict[str, tuple[Interval, Interval]]:
    """By concept, the share of readings (one per latent and prompt) that name it: at the chosen scale, at any scale."""
    hits: dict[str, list[tuple[bool, bool]]] = {concept: [] for concept in lexicons}
    for prompt in prompts(model):
        plain = words(model.generate([prompt.replace("X", X)], TOKENS)[0])
        for readings in read(model, dictionary, latents, prompt, at):
            for concept, wanted in lexicons.items():
                names = [bool((words(reading.text) - plain) & wanted) for reading in readings]
                hits[concept].append((names[readings.index(best_reading(readings))], any(names)))
    return {
        concept: (wilson_share(np.array(each, float)[:, 0]), wilson_share(np.array(each, float)[:, 1]))
        for concept, each in hits.items()
    }


@dataclass(frozen=True)
class WordShares:
    """Shares of readings that contain the word whose embedding was written in: at the chosen scale, at any scale."""

    chosen: Interval
    at_any: Interval


@torch.no_grad()
def words_named(model: LanguageModel) -> WordShares:
    """Shares of readings that contain a word whose own embedding was written in, over the prompts in `COPIES`."""
    best, at_any = [], []
    for word in world.share(world.MALE, "report"):
        tokens = model.tokenize([f"the {word}"])
        row = model.capture(tokens, [FIRST])[FIRST][0, -1:].float()
        vector = direction_dictionary(Directions(FIRST, row / row.norm(), word), model.device)
        for prompt in COPIES:
            readings = read(model, vector, [0], prompt, FIRST)[0]
            best.append(word.lower() in words(best_reading(readings).text))
            at_any.append(any(word.lower() in words(reading.text) for reading in readings))
    return WordShares(wilson_share(np.array(best, float)), wilson_share(np.array(at_any, float)))


@dataclass(frozen=True)
class ReadLatents:
    """The latents of one dictionary to read: each concept's own, and random live ones."""

    own: Mapping[str, tuple[int, ...]]
    random: tuple[int, ...]


@dataclass(frozen=True)
class SharesAt:
    """Shares of all concepts at one dictionary, its latents written at one site."""

    shares: tuple[NamedShares, ...]


def choose_latents(
    config: PatchscopeConfig, model: LanguageModel, dictionary: Dictionary, concepts: Sequence[Concept]
) -> ReadLatents:
    statistics = latent_statistics(model, dictionary, model.tokenize(texts()))
    own = {
        c.name: tuple(
            first_alive(contrast(model, dictionary, c.present, c.absent, c.positions), statistics, config.latents)
        )
        for c in concepts
    }
    chosen = {latent for each in own.values() for latent in each}
    (others,) = random_latents(statistics.alive, chosen, config.random, 1, config.seed)
    return ReadLatents(own, tuple(others))


def shares_at(
    model: LanguageModel, dictionary: Dictionary, latents: ReadLatents, at: Site, lexicons: Mapping[str, Words]
) -> SharesAt:
    """Read all latents of one dictionary, written at one site."""
    control = named(model, dictionary, latents.random, at, lexicons)
    shares = []
    for concept, own in latents.own.items():
        mine = named(model, dictionary, own, at, {concept: lexicons[concept]})[concept]
        shares.append(NamedShares(str(dictionary.site), str(at), concept, *mine, *control[concept]))
    return SharesAt(tuple(shares))


def measure(
    config: PatchscopeConfig, model: LanguageModel, saes: Mapping[Site, Dictionary], kept: KeptResults
) -> tuple[list[NamedShares], tuple[Interval, Interval]]:
    """Shares of every concept at every dictionary, written at its own site and before the first block; and the shares
    of words' own embeddings."""
    concepts = organism_concepts(model, 100, config.seed)[:2]
    lexicons = {concept.name: lexicon(concept.name) for concept in concepts}
    shares: list[NamedShares] = []
    for site, dictionary in saes.items():
        choose = partial(choose_latents, config, model, dictionary, concepts)
        latents = kept.get(f"latents/{site}", ReadLatents, choose)
        for at in (FIRST, site):
            read_at = partial(shares_at, model, dictionary, latents, at, lexicons)
            shares += kept.get(f"readings/{site} at {at}", SharesAt, read_at).shares
    control = kept.get("words", WordShares, partial(words_named, model))
    return shares, (control.chosen, control.at_any)


def verdict(shares: Sequence[NamedShares], control: tuple[Interval, Interval]) -> str:
    """Whether readings of latents name their concept significantly more often than those of random latents.

    `control` is how often words' own embeddings are named: at the chosen scale, as the other shares, and at any scale.
    """
    better = [share for share in shares if share.own.low > share.random.high]
    best, at_any = (share.value for share in control)
    shown = f"{best:.0%} of readings at the chosen scale ({at_any:.0%} at any scale)"
    if best >= 0.5:
        finding = f"A word's own embedding is named in {shown}, so the prompts work. "
    elif at_any >= 0.5:
        finding = f"A word's own embedding is named in {shown}: the prompts work, but not at the chosen scale. "
    else:
        finding = f"Even a word's own embedding is named in only {shown}. "
    for concept in dict.fromkeys(share.concept for share in shares):
        mine = [share for share in shares if share.concept == concept]
        top = max(mine, key=lambda share: share.own.value)
        where = [f"{share.site} written at {share.written_at}" for share in better if share.concept == concept]
        finding += (
            f"{concept.capitalize()}: named significantly more often than by random latents ({', '.join(where)}). "
            if where
            else f"{concept.capitalize()}: at no site named more often than by random latents (largest, {top.site}: "
            f"{top.own.value:.0%} of readings, random {top.random.value:.0%}; at any scale {top.own_any.value:.0%} and "
            f"{top.random_any.value:.0%}). "
        )
    return finding.strip()


def main(config: PatchscopeConfig) -> None:
    out = Path(config.out)
    check_owner(out, "patchscope")
    model, saes = load_model("organism"), load_saes(config.sae)
    with measurements(out, "patchscope", deciding(config, model, saes)) as kept:
        shares, control = measure(config, model, saes, KeptResults(kept, {}))
        write(config, model, saes, shares, control)


def write(
    config: PatchscopeConfig,
    model: LanguageModel,
    saes: Mapping[Site, Dictionary],
    shares: Sequence[NamedShares],
    control: tuple[Interval, Interval],
) -> None:
    """Write the report, the summary and the settings, and log them to trackers."""
    finding = verdict(shares, control)
    first = next(iter(saes.values()))
    provenance = Provenance(model.name, model.fingerprint, config.sae, first.fingerprint, config.seed)
    columns = ("own", "own_any", "random", "random_any")
    table: Block = Table(
        ["latents of", "written at", "concept", "named", "at any scale", "random: named", "random: at any scale"],
        [
            (share.site, share.written_at, share.concept, *(round(getattr(share, name).value, 4) for name in columns))
            for share in shares
        ],
        f"Shares of readings of {config.latents} latents ({config.random} random ones) in "
        f"{len(PROMPTS) + len(QUESTIONS)} prompts, with {len(SCALES)} scales each; `named`: at the scale chosen by "
        "self-similarity and entropy.",
        dict.fromkeys(("named", "at any scale", "random: named", "random: at any scale"), ".0%"),
    )
    sections = [Section("Readings", "", [table])]
    page = Page("Can the organism explain its latents?", finding, sections, Facts(provenance.facts()))
    summary: dict[str, Any] = {
        "words": [interval.as_list() for interval in control],
        "readings": [asdict(share) for share in shares],
    }
    conclude(config, "patchscope", page, summary, {"words named": summary["words"][0]})


if __name__ == "__main__":
    sys.exit(run_config(PatchscopeConfig, main, "python -m experiments.patchscope"))
