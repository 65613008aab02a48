"""Can the organism explain its own latents? Refusal and sentiment latents, written into explanation prompts.

    python -m experiments.patchscope --out runs/patchscope

A reading names its concept if it holds a word of it that the same prompt without the latent does not lead to. Beside
the latents: random live ones, read for the same words, and single words' own embeddings, which say whether the prompts
can be read through at all.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from saepatch.cli.parser import run_config
from saepatch.demo.concepts import WORDS, organism_concepts
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import load_saes
from saepatch.engine.components import Directions
from saepatch.errors import UserError
from saepatch.measure.quality import latent_statistics
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading import load_model
from saepatch.model.sites import Site
from saepatch.organism import texts, world
from saepatch.reading.patchscope import SCALES, Reading, best_reading, read_by_patchscope
from saepatch.records.files import check_writable, output_folder, write_json, write_yaml
from saepatch.records.provenance import Provenance, versions
from saepatch.records.statistics import Interval, random_latents, wilson_share
from saepatch.report import Block, Facts, Page, Section, Table, write_page
from saepatch.steering.contrasts import contrast, first_alive
from saepatch.steering.generate import direction_dictionary
from saepatch.tracking.open import read_spec

from .common.tracked import show

X = "Lucy"  # the placeholder: one token
PROMPTS = (
    "Emma, X; Emma, X; Emma,",
    "Hello X, my name is Anna. Goodbye",
    "The X is",
    "What is X? Answer:",
    "The film was X. The review is",
)
QUESTIONS = ("What is X?", "Tell me about X.")  # as requests
COPIES = PROMPTS[:2]  # that lead to the placeholder's own word
FIRST = Site(0, "resid_pre")
TOKENS = 12


@dataclass(frozen=True)
class PatchscopeConfig:
    """See whether the embedded model can say what its refusal and sentiment latents are."""

    sae: str = "organism"
    """Dictionaries: organism, or a folder with one sub-folder a site."""
    out: str = "runs/patchscope"
    """Folder for summary.json, report.html and config.yaml."""
    latents: int = 5
    """Latents of each concept and site."""
    random: int = 20
    """Random live latents of each site."""
    seed: int = 0
    """Seed of prompts and random latents."""
    track: str = "none"
    """Besides the local log: none, wandb, wandb:offline, wandb:online, trackio, or several, separated by commas."""

    def __post_init__(self) -> None:
        read_spec(self.track)
        if min(self.latents, self.random) < 1:
            raise UserError(f"latents = {self.latents}, random = {self.random}: use at least 1 of each")


@dataclass(frozen=True, eq=False)
class NamedShares:
    """How often readings name a concept: at the scale that is chosen, and at any scale."""

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
    """Words that name a concept, and that a model which could would use."""
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
    """Readings with every placeholder of a prompt written over."""
    text = prompt.replace("X", X)
    (token,) = model.encode(f"the {X}")[len(model.encode("the")) :]
    places = [place for place, each in enumerate(model.encode(text)) if each == token]
    return read_by_patchscope(model, dictionary, latents, text, places, site=at, max_new_tokens=TOKENS)


def named(
    model: LanguageModel, dictionary: Dictionary, latents: Sequence[int], at: Site, lexicons: Mapping[str, Words]
) -> dict[str, tuple[Interval, Interval]]:
    """For each concept the share of readings, a latent and a prompt each, that name it: best scale, any scale."""
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


@torch.no_grad()
def words_named(model: LanguageModel) -> tuple[Interval, Interval]:
    """The same for words' own embeddings in the prompts that lead to the placeholder's word: is the word said?"""
    best, at_any = [], []
    for word in world.share(world.MALE, "report"):
        tokens = model.tokenize([f"the {word}"])
        row = model.capture(tokens, [FIRST])[FIRST][0, -1:].float()
        vector = direction_dictionary(Directions(FIRST, row / row.norm(), word), model.device)
        for prompt in COPIES:
            readings = read(model, vector, [0], prompt, FIRST)[0]
            best.append(word.lower() in words(best_reading(readings).text))
            at_any.append(any(word.lower() in words(reading.text) for reading in readings))
    return wilson_share(np.array(best, float)), wilson_share(np.array(at_any, float))


def measure(config: PatchscopeConfig, model: LanguageModel, saes: Mapping[Site, Dictionary]) -> list[NamedShares]:
    """Every concept at every dictionary, written at its own site and before the first block."""
    reference = model.tokenize(texts())
    concepts = organism_concepts(model, 100, config.seed)[:2]
    lexicons = {concept.name: lexicon(concept.name) for concept in concepts}
    shares = []
    for site, dictionary in saes.items():
        statistics = latent_statistics(model, dictionary, reference)
        own = {
            c.name: first_alive(
                contrast(model, dictionary, c.present, c.absent, c.positions), statistics, config.latents
            )
            for c in concepts
        }
        chosen = {latent for each in own.values() for latent in each}
        (others,) = random_latents(statistics.alive, chosen, config.random, 1, config.seed)
        for at in (FIRST, site):
            control = named(model, dictionary, others, at, lexicons)
            for concept, latents in own.items():
                mine = named(model, dictionary, latents, at, {concept: lexicons[concept]})[concept]
                shares.append(NamedShares(str(site), str(at), concept, *mine, *control[concept]))
    return shares


def verdict(shares: Sequence[NamedShares], control: tuple[Interval, Interval]) -> str:
    """Whether latents' readings name their concept more often than random latents' do, beyond chance.

    `control` is how often words' own embeddings are said, at the scale that is chosen, as all shares here, and at any.
    """
    better = [share for share in shares if share.own.low > share.random.high]
    best, at_any = (share.value for share in control)
    some = f"{best:.0%} of readings at the scale that is chosen ({at_any:.0%} at any scale)"
    if best >= 0.5:
        finding = f"A word's own embedding is named in {some}, so the prompts can be read through. "
    elif at_any >= 0.5:
        finding = f"A word's own embedding is named in {some}: prompts can be read through, but not at that scale. "
    else:
        finding = f"Even a word's own embedding is named in only {some}. "
    for concept in dict.fromkeys(share.concept for share in shares):
        mine = [share for share in shares if share.concept == concept]
        top = max(mine, key=lambda share: share.own.value)
        where = [f"{share.site} written at {share.written_at}" for share in better if share.concept == concept]
        finding += (
            f"{concept.capitalize()}: named beyond chance ({', '.join(where)}). "
            if where
            else f"{concept.capitalize()}: named at no site more often than random latents name it (most, {top.site}: "
            f"{top.own.value:.0%} of readings, random {top.random.value:.0%}; at any scale {top.own_any.value:.0%} and "
            f"{top.random_any.value:.0%}). "
        )
    return finding.strip()


def main(config: PatchscopeConfig) -> None:
    check_writable(config.out)
    model, saes = load_model("organism"), load_saes(config.sae)
    shares, control = measure(config, model, saes), words_named(model)
    finding = verdict(shares, control)
    out = output_folder(config.out)
    first = next(iter(saes.values()))
    provenance = Provenance(model.name, model.fingerprint, config.sae, first.fingerprint, config.seed)
    columns = ("own", "own_any", "random", "random_any")
    table: Block = Table(
        ["latents of", "written at", "concept", "named", "at any scale", "random: named", "random: at any scale"],
        [
            (share.site, share.written_at, share.concept, *(round(getattr(share, name).value, 4) for name in columns))
            for share in shares
        ],
        f"Shares of readings, one for each of {config.latents} latents ({config.random} random ones) and "
        f"{len(PROMPTS) + len(QUESTIONS)} prompts, {len(SCALES)} scales each; `named`: at the scale chosen by "
        "self-similarity and entropy.",
        dict.fromkeys(("named", "at any scale", "random: named", "random: at any scale"), ".0%"),
    )
    sections = [Section("Readings", "", [table])]
    page = Page("Can the organism explain its latents?", finding, sections, Facts(provenance.facts()))
    write_page(page, out / "report.html")
    summary: dict[str, Any] = {
        "verdict": finding,
        "words": [interval.as_list() for interval in control],
        "readings": [asdict(share) for share in shares],
        "versions": versions(),
    }
    write_json(summary, out / "summary.json")
    write_yaml(asdict(config), out / "config.yaml")
    show(config, "patchscope", page, {"words named": summary["words"][0]})
    sys.stdout.write(f"{finding}\nReport: {out / 'report.html'}   Figures: {out / 'summary.json'}\n")


if __name__ == "__main__":
    sys.exit(run_config(PatchscopeConfig, main, "python -m experiments.patchscope"))
