"""Letters of multiple choice: given the right answer's content, which heads and latents carry its label?

    python -m experiments.letters --model FOLDER --sae FOLDER --out runs/letters

Questions with four options are asked after four examples, every label right equally often. A model that does not answer
above chance has nothing to localise, and the report says so. Otherwise two kinds of pairs are patched: in one, two
contents change places, labels staying where they are; in the other, labels are in random order and two of them change
places, contents staying. What carries the letter matters in both, what carries the option's place in the first alone.
Heads and latents are ranked on half of the questions and reported on the others. A stopped run continues when the same
command is given again.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from saepatch.cli.parser import run_config
from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import load_saes
from saepatch.engine.components import Edit
from saepatch.errors import UserError
from saepatch.measure.attribution import attribute
from saepatch.measure.controls import DRAWS, control_sets
from saepatch.measure.patching import patch_components, patch_heads
from saepatch.measure.quality import latent_statistics
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading.load import load_model
from saepatch.pages.charts import INTERVALS, WILSON, cell
from saepatch.records.provenance import Provenance
from saepatch.records.rows import write_records
from saepatch.records.statistics import Interval, bootstrap_mean, wilson_share
from saepatch.report import Block, Cell, Facts, Page, Section, Table
from saepatch.runs.measurements import measurements
from saepatch.runs.ownership import check_owner
from saepatch.tracking.open import read_spec

from .common.kept import KeptResults, deciding
from .common.tracked import conclude
from .real.stages.tasks import CAPITALS

LETTERS = "ABCD"
CHANCE = 1 / len(LETTERS)
CONTENTS, LABELS = "contents change places", "labels change places"
EXAMPLES = 4  # before every question, each with another label right
HEADS = 10  # heads that are reported


@dataclass(frozen=True)
class LettersConfig:
    """Localise the label of the right answer in multiple choice, where a model answers above chance."""

    model: str = ""
    """Model: a folder, or a Hugging Face id."""
    out: str = "runs/letters"
    """Folder for summary.json, report.html, results.parquet and config.yaml."""
    sae: str = ""
    """Dictionaries: a folder with one sub-folder per site; empty: heads alone."""
    latents: int = 16
    """Number of first latents that are patched together."""
    seed: int = 0
    """Seed of options and of controls."""
    device: str = "cpu"
    """Where to run."""
    dtype: str = "float32"
    """Precision of the model."""
    track: str = "none"
    """Trackers besides the local log, separated by commas: none, wandb, wandb:offline, wandb:online, trackio."""

    def __post_init__(self) -> None:
        read_spec(self.track)
        if not self.model:
            raise UserError("no model: give a folder or a Hugging Face id, as in --model google/gemma-3-270m")
        if self.latents < 1:
            raise UserError(f"latents = {self.latents}: use at least 1")


@dataclass(frozen=True)
class LetterChoice:
    """A question, its options in their order, and the number of the right one."""

    question: str
    options: tuple[str, ...]
    right: int

    def text(self, labels: str = LETTERS) -> str:
        lines = "".join(f"{label}. {option}\n" for label, option in zip(labels, self.options, strict=True))
        return f"Question: {self.question}\n{lines}Answer:"

    def swapped(self, other: int) -> "LetterChoice":
        """The right option and another one in each other's place."""
        options = list(self.options)
        options[self.right], options[other] = options[other], options[self.right]
        return LetterChoice(self.question, tuple(options), other)


@dataclass(frozen=True)
class Accuracy:
    """Share of questions answered right, and of each letter among the answers."""

    right: Interval
    letters: tuple[float, ...]

    @property
    def above_chance(self) -> bool:
        return self.right.low > CHANCE


@dataclass(frozen=True)
class Carried:
    """Effects on `report` of what was ranked on `select`, by kind of pairs."""

    effects: dict[str, dict[str, Interval]]


@dataclass(frozen=True)
class LettersResults:
    """Accuracy, and where it is above chance, effects of heads and of latents (by site)."""

    accuracy: Accuracy
    heads: Carried | None
    latents: Mapping[str, Carried]


def choices(seed: int) -> tuple[str, dict[str, list[LetterChoice]]]:
    """Examples to put in front, and questions by split: no country in two of the three, every place right as often."""
    random, countries = Random(seed), list(CAPITALS)
    random.shuffle(countries)
    parts = {"examples": countries[:EXAMPLES], "select": countries[EXAMPLES::2], "report": countries[EXAMPLES + 1 :: 2]}
    made: dict[str, list[LetterChoice]] = {}
    for name, mine in parts.items():
        made[name] = []
        for number, country in enumerate(mine):
            for place in [number % len(LETTERS)] if name == "examples" else range(len(LETTERS)):
                others = sorted({CAPITALS[other] for other in mine if other != country})
                options = random.sample(others, len(LETTERS) - 1)
                options.insert(place, CAPITALS[country])
                made[name].append(LetterChoice(f"What is the capital of {country}?", tuple(options), place))
    shown = "".join(f"{each.text()} {LETTERS[each.right]}\n\n" for each in made.pop("examples"))
    return shown, made


def once(asked: Sequence[LetterChoice]) -> list[LetterChoice]:
    """Every question once, its right option in another place than that of the question before."""
    questions = list(dict.fromkeys(choice.question for choice in asked))
    return [choice for choice in asked if choice.right == questions.index(choice.question) % len(LETTERS)]


def pairs_of(shown: str, asked: Sequence[LetterChoice], kind: str, seed: int) -> list[PromptPair]:
    """One pair for each question, its right option changing places, or its label, with a random other one."""
    random, pairs = Random(seed), []
    for number, choice in enumerate(asked):
        other = random.choice([place for place in range(len(LETTERS)) if place != choice.right])
        if kind == CONTENTS:
            labels, counterpart, changed = LETTERS, choice.swapped(other), LETTERS
            answer, counter = labels[choice.right], labels[other]
        else:
            labels = "".join(random.sample(LETTERS, len(LETTERS)))
            turned = list(labels)
            turned[choice.right], turned[other] = turned[other], turned[choice.right]
            counterpart, changed = choice, "".join(turned)
            answer, counter = labels[choice.right], changed[choice.right]
        clean, corrupted = choice.text(labels), counterpart.text(changed)
        pairs.append(PromptPair(shown + clean, shown + corrupted, f" {answer}", f" {counter}", f"{kind}-{number}"))
    return pairs


@torch.no_grad()
def accuracy(model: LanguageModel, shown: str, asked: Sequence[LetterChoice]) -> Accuracy:
    """How often the right letter is the likeliest of the four."""
    right, given = dict[str, list[float]](), list[int]()
    for choice in asked:
        prompt = shown + choice.text()
        letters = [model.encode(f"{prompt} {letter}")[-1] for letter in LETTERS]
        best = int(model.next_logits([prompt])[0, letters].argmax())
        given.append(best)
        right.setdefault(choice.question, []).append(float(best == choice.right))
    counts = np.bincount(given, minlength=len(LETTERS)) / len(given)
    shares = np.array([np.mean(some) for some in right.values()])  # over questions: places of one are not independent
    return Accuracy(wilson_share(shares), tuple(counts.tolist()))


def of_heads(model: LanguageModel, pairs: Mapping[str, Mapping[str, Sequence[PromptPair]]]) -> Carried:
    """The heads with the largest mean effect over both kinds on `select`, and each one's effects on `report`."""
    ranked = [patch_heads(model, some) for some in pairs["select"].values()]
    mean = np.mean([effects.ratios() for effects in ranked], axis=0)
    first = np.argsort(-mean, kind="stable")[:HEADS].tolist()
    effects = {}
    for kind, some in pairs["report"].items():
        patched = patch_heads(model, some)
        named = {f"{patched.edits[i].site.layer}.{patched.edits[i].units[0]}": patched.of(i) for i in first}
        effects[kind] = named
    return Carried(effects)


def of_latents(
    model: LanguageModel,
    dictionary: Dictionary,
    pairs: Mapping[str, Mapping[str, Sequence[PromptPair]]],
    k: int,
    seed: int,
) -> Carried:
    """The first latents of each kind on `select`, patched together in both kinds on `report`, beside matched ones."""
    effects: dict[str, dict[str, Interval]] = {kind: {} for kind in pairs["report"]}
    for ranked_on, some in pairs["select"].items():
        edits, means = attribute(model, dictionary, some).means(each_position=False)
        order = np.argsort(-means, kind="stable").tolist()
        first = tuple(edits[i].units[0] for i in order if edits[i].kind == "latent" and means[i] > 0)[:k]
        if not first:
            continue
        texts = [text for pair in some for text in (pair.clean, pair.corrupted)]
        statistics = latent_statistics(model, dictionary, model.tokenize(texts))
        _, matched = control_sets(first, len(first), statistics, seed, DRAWS)
        groups = [Edit(dictionary.site, ids, role="given") for ids in (first, *matched)]
        for kind, report in pairs["report"].items():
            patched = patch_components(model, dictionary, report, groups)
            each = patched.change / patched.gap[:, None]
            at = [patched.edits.index(edit) for edit in groups]
            effects[kind][f"ranked where {ranked_on}"] = bootstrap_mean(each[:, at[0]])
            effects[kind][f"matched, ranked where {ranked_on}"] = bootstrap_mean(each[:, at[1:]].mean(1))
    return Carried(effects)


def main(config: LettersConfig) -> None:
    out = Path(config.out)
    check_owner(out, "letters")
    model = load_model(config.model, config.device, config.dtype)
    saes = load_saes(config.sae, config.device) if config.sae else {}
    shown, asked = choices(config.seed)
    decides = deciding(config, model, saes, ("out", "track", "device"))
    with measurements(out, "letters", decides) as kept_file:
        kept = KeptResults(kept_file, {})
        every = [choice for some in asked.values() for choice in some]
        measured = kept.get("accuracy", Accuracy, partial(accuracy, model, shown, every))
        heads, latents = None, {}
        if measured.above_chance:
            pairs = {
                split: {kind: pairs_of(shown, once(some), kind, config.seed) for kind in (CONTENTS, LABELS)}
                for split, some in asked.items()
            }
            heads = kept.get("heads", Carried, partial(of_heads, model, pairs))
            for site, dictionary in saes.items():
                measure = partial(of_latents, model, dictionary, pairs, config.latents, config.seed)
                latents[str(site)] = kept.get(f"latents/{site}", Carried, measure)
    write(config, model, LettersResults(measured, heads, latents))


def verdict(results: LettersResults) -> str:
    """Whether there is anything to localise, and what carries it."""
    share = results.accuracy.right
    letters = ", ".join(f"{name} {each:.0%}" for name, each in zip(LETTERS, results.accuracy.letters, strict=True))
    text = f"The right letter is the likeliest of the four in {share.value:.0%} [{share.low:.0%}, {share.high:.0%}] of "
    text += f"{share.n} questions (chance {CHANCE:.0%}); answers: {letters}. "
    if results.heads is None:
        return text + "That is not above chance: there is no label to localise."
    both = results.heads.effects
    letter = [name for name, each in both[LABELS].items() if each.low > 0 and both[CONTENTS][name].low > 0]
    place = [name for name, each in both[CONTENTS].items() if each.low > 0 and not both[LABELS][name].low > 0]
    text += f"Heads that carry the letter (they matter in both kinds of pairs): {', '.join(letter) or 'none'}; the "
    return text + f"option's place (in the first kind alone): {', '.join(place) or 'none'}."


def write(config: LettersConfig, model: LanguageModel, results: LettersResults) -> None:
    """Write the report, summary, rows and settings, and log them to trackers."""
    provenance = Provenance(model.name, model.fingerprint, config.sae, "", config.seed)
    carried = {"heads": results.heads, **{f"latents of {site}": each for site, each in results.latents.items()}}
    rows: list[dict[str, Any]] = [
        {
            "part": part,
            "pairs": kind,
            "what": name,
            "value": each.value,
            "low": each.low,
            "high": each.high,
            "n": each.n,
        }
        for part, of in carried.items()
        if of is not None
        for kind, some in of.effects.items()
        for name, each in some.items()
    ]
    write_records([(rows, provenance)], Path(config.out) / "results.parquet")
    share: list[list[Cell]] = [["right", cell(results.accuracy.right)]]
    blocks: list[Block] = [Table(["answers", "share"], share, WILSON, {"share": ".0%"})]
    if rows:
        table: list[list[Cell]] = [
            [part, name, kind, cell(each)]
            for part, of in carried.items()
            if of is not None
            for kind, some in of.effects.items()
            for name, each in some.items()
        ]
        blocks.append(Table(["part", "what", "pairs", "effect"], table, f"Denoising, on `report`. {INTERVALS}"))
    given = {name: text for name, text in provenance.facts().items() if config.sae or name != "dictionary"}
    page = Page("Letters of multiple choice", verdict(results), [Section("Results", "", blocks)], Facts(given))
    summary: dict[str, Any] = {
        "right": results.accuracy.right.as_list(),
        "letters": dict(zip(LETTERS, results.accuracy.letters, strict=True)),
        "carried": {
            part: {kind: {name: each.as_list() for name, each in some.items()} for kind, some in of.effects.items()}
            for part, of in carried.items()
            if of is not None
        },
    }
    conclude(config, "letters", page, summary, {"right": summary["right"]})


if __name__ == "__main__":
    sys.exit(run_config(LettersConfig, main, "python -m experiments.letters"))
