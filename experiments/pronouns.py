"""Which latents carry the gender of a character?

    python -m experiments.pronouns --model MODEL --sae FOLDER --out runs/pronouns

Pairs of prompts differ in "girl named Lily" against "boy named Tim"; the answer is " She" or " He". At each layer all
latents are ranked by their own denoising effect on the `select` prompts; the layer where the first 16 restore most on
`select` is then measured on `report` prompts, whose names and templates are others: both directions, with random and
matched random latents beside them. With the embedded model the pairs are its own `pronoun` task.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from random import Random
from typing import Any

import torch

from saepatch.charts import cell, effect_chart
from saepatch.commandline import run_config
from saepatch.curves import Curve, effect_curve
from saepatch.dictionaries import Dictionary, load_saes
from saepatch.effects import Effects
from saepatch.errors import UserError
from saepatch.models import LanguageModel, Tokens, load_model
from saepatch.patching import patch_latents
from saepatch.prompts import PromptPair, load_pairs
from saepatch.quality import latent_statistics, splice_quality
from saepatch.report import Facts, LineChart, Page, Section, Table, write_figure, write_page
from saepatch.results import Provenance, check_writable, output_folder, versions, write_json, write_rows
from saepatch.sites import Site
from saepatch.statistics import Interval

# Every other name is of the report split. Each half has names of one and of two tokens to many a small tokenizer, so
# that enough girls and boys make prompts of equal length.
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
SIZES = (1, 2, 4, 8, 16, 32, 64)
CHOOSE_BY = 16  # the layer is chosen by the effect of this many latents


@dataclass(frozen=True)
class PronounsConfig:
    """Patch the latents that carry a character's gender, at every layer, in both directions."""

    model: str = "organism"
    """Model: organism, a folder, or a Hugging Face id."""
    sae: str = "organism"
    """Dictionaries: organism, a folder with one sub-folder a site, or RELEASE/SAE_ID."""
    out: str = "runs/pronouns"
    """Folder for summary.json, report.html, results.parquet, denoise.svg, noise.svg and config.yaml."""
    pairs: int = 100
    """Prompt pairs a split, at most."""
    seed: int = 0
    """Seed of the pairs, controls and bootstrap draws."""
    device: str = "cpu"
    """Where to run: cpu, cuda or mps."""

    def __post_init__(self) -> None:
        if self.pairs < 2:
            raise UserError(f"pairs = {self.pairs} is too few for an interval: use at least 2")


def story_pairs(model: LanguageModel, split: str, n: int, seed: int) -> list[PromptPair]:
    """Girl/boy pairs of equal token length, half of them with the girl as the clean prompt.

    Each split has its own names and templates. Pairs whose prompts differ in token length are left out.
    """
    half = slice(0, None, 2) if split == "select" else slice(1, None, 2)
    pairs = []
    places = product(enumerate(TEMPLATES[split]), enumerate(GIRLS[half]), enumerate(BOYS[half]))
    for (i, template), (j, girl), (k, boy) in places:
        texts = [template.format(noun=noun, name=name) for noun, name in (("girl", girl), ("boy", boy))]
        if len(model.encode(texts[0])) != len(model.encode(texts[1])):
            continue
        she_first = (i + j + k) % 2 == 0  # so that no name and no template is always on the clean side
        clean, corrupted = texts if she_first else texts[::-1]
        answer, counter = (" She", " He") if she_first else (" He", " She")
        pairs.append(PromptPair(clean, corrupted, answer, counter, f"{split}-{girl}-{boy}-{i}"))
    if len(pairs) < 2:
        raise UserError(
            f"only {len(pairs)} pairs of equal token length for {model.name}: its tokenizer splits the names apart"
        )
    Random(f"{split}/{seed}").shuffle(pairs)
    return pairs[:n]


@dataclass(frozen=True, eq=False)
class Layer:
    """What ranking the latents of one site on `select` found."""

    dictionary: Dictionary
    ranking: tuple[int, ...]
    effect: Interval  # of the first CHOOSE_BY latents together, on select


def rank(model: LanguageModel, dictionary: Dictionary, pairs: Sequence[PromptPair], seed: int) -> Layer:
    """Rank every latent of a site by its own effect, and patch the first ones together."""
    singles = patch_latents(model, dictionary, pairs, progress=True)
    ranking = [edit.units[0] for edit in singles.top(max(SIZES))]
    together = patch_latents(model, dictionary, pairs, [ranking[:CHOOSE_BY]])
    return Layer(dictionary, tuple(ranking), together.of(0, seed))


def run(config: PronounsConfig) -> None:
    torch.manual_seed(config.seed)
    check_writable(config.out)
    model = load_model(config.model, config.device)
    saes = load_saes(config.sae, config.device)
    for dictionary in saes.values():
        dictionary.check(model)
    select, report = (
        load_pairs("pronoun", split, config.pairs, config.seed)
        if config.model in ("organism", "organism-base")
        else story_pairs(model, split, config.pairs, config.seed)
        for split in ("select", "report")
    )
    layers = [rank(model, dictionary, select, config.seed) for dictionary in saes.values()]
    best = max(layers, key=lambda layer: layer.effect.value)
    prompts = model.tokenize([text for pair in select for text in (pair.clean, pair.corrupted)])
    stats = latent_statistics(model, best.dictionary, prompts)
    curves = [
        effect_curve(model, best.dictionary, report, best.ranking, SIZES, stats, direction, seed=config.seed)
        for direction in ("denoise", "noise")
    ]
    singles = [
        patch_latents(model, best.dictionary, report, direction=direction, progress=True)
        for direction in ("denoise", "noise")
    ]
    by_layer = [
        patch_latents(model, layer.dictionary, report, [layer.ranking[:CHOOSE_BY]], direction=direction).of(
            0, config.seed
        )
        for layer in layers
        for direction in ("denoise", "noise")
    ]
    found = Found(config, model, _ce_recovered(model, saes, prompts), layers, best, curves, singles, by_layer)
    out = output_folder(config.out)
    found.write(out)
    sys.stdout.write(found.table() + f"\nReport: {out / 'report.html'}   Figures: {out / 'summary.json'}\n")


@dataclass(frozen=True, eq=False)
class Found:
    """All results, and the files they are written to."""

    config: PronounsConfig
    model: LanguageModel
    ce_recovered: dict[Site, float]
    layers: Sequence[Layer]
    best: Layer
    curves: Sequence[Curve]  # denoising, noising
    singles: Sequence[Effects]  # denoising, noising: every latent alone at the best site
    by_layer: Sequence[Interval]  # report: denoising and noising of the first latents, layer after layer

    @property
    def site(self) -> Site:
        return self.best.dictionary.site

    def summary(self) -> dict[str, Any]:
        denoise, noise = self.curves
        effects = self.singles[0]
        return {
            "model": self.config.model,
            "site": str(self.site),
            "ce_recovered": {str(site): value for site, value in self.ce_recovered.items()},
            "pairs": len(effects.examples),
            "clean": float(effects.clean.mean()),
            "corrupted": float(effects.corrupted.mean()),
            "clean_right": float((effects.clean > 0).mean()),
            "denoise_top": _points(denoise.sizes, denoise.top),
            "denoise_random": _points(denoise.sizes, denoise.random),
            "denoise_matched": _points(denoise.sizes, denoise.matched),
            "noise_top": _points(noise.sizes, noise.top),
            "noise_random": _points(noise.sizes, noise.random),
            "noise_matched": _points(noise.sizes, noise.matched),
            "seed": self.config.seed,
            "versions": versions(),
        }

    def table(self) -> str:
        """What is printed: the layers, then the curve at the chosen one."""
        lines = [f"{'site':<14}{'select, first 16':>26}{'report: denoise':>26}{'report: noise':>26}"]
        for number, layer in enumerate(self.layers):
            cells = (layer.effect, self.by_layer[2 * number], self.by_layer[2 * number + 1])
            mark = " *" if layer is self.best else ""
            lines.append(f"{layer.dictionary.site!s:<14}" + "".join(f"{cell!s:>26}" for cell in cells) + mark)
        lines.append(f"\nat {self.site} (*: chosen on select), {len(self.singles[0].examples)} report pairs")
        lines.append(f"{'latents':<14}{'denoise':>26}{'random':>26}{'matched':>26}{'noise':>26}")
        denoise, noise = self.curves
        for i, k in enumerate(denoise.sizes):
            row = (denoise.top[i], denoise.random[i], denoise.matched[i], noise.top[i])
            lines.append(f"{k:<14}" + "".join(f"{cell!s:>26}" for cell in row))
        return "\n".join(lines)

    def write(self, out: Any) -> None:
        import yaml

        sae = self.best.dictionary
        provenance = Provenance(self.model.name, self.model.fingerprint, sae.name, sae.fingerprint, self.config.seed)
        effects = [*self.singles, *(one for curve in self.curves for one in curve.effects)]
        rows = [row for one in effects for row in one.rows("pronouns")]
        write_rows([(rows, provenance)], out / "results.parquet")
        (out / "config.yaml").write_text(yaml.safe_dump(asdict(self.config)), encoding="utf-8")
        for chart, name in zip(self.charts(), ("denoise", "noise"), strict=True):
            write_figure(chart, out / f"{name}.svg")
        write_page(self.page(provenance), out / "report.html")
        write_json(self.summary(), out / "summary.json")

    def charts(self) -> list[LineChart]:
        n = len(self.singles[0].examples)
        return [
            effect_chart(f"{name} at {self.site}", curve, n)
            for name, curve in zip(("Denoising", "Noising"), self.curves, strict=True)
        ]

    def page(self, provenance: Provenance) -> Page:
        summary, denoise, noise = self.summary(), *self.singles
        sixteen = self.curves[0].sizes.index(CHOOSE_BY)
        top, random = self.curves[0].top[sixteen], self.curves[0].random[sixteen]
        lead = (
            f"At {self.site} of {self.config.model}, chosen on other prompts, {CHOOSE_BY} latents restore {top} of the "
            f"logit difference between She and He; {CHOOSE_BY} random live ones restore {random}."
        )
        layers = Table(
            ["site", "CE recovered", "select: denoise", "report: denoise", "report: noise"],
            [
                (
                    str(layer.dictionary.site),
                    summary["ce_recovered"][str(layer.dictionary.site)],
                    *map(cell, (layer.effect, self.by_layer[2 * i], self.by_layer[2 * i + 1])),
                )
                for i, layer in enumerate(self.layers)
            ],
            f"The first {CHOOSE_BY} latents of each layer's ranking, patched together at all positions.",
        )
        best = [edit.units[0] for edit in denoise.top(12)]
        latents = Table(
            ["latent", "denoising", "noising", "pairs where it differs"],
            [(j, cell(denoise.of(j)), cell(noise.of(j)), int(denoise.ran[:, j].sum())) for j in best],
            f"The 12 latents of {self.site} that restore most alone, on {len(denoise.examples)} report pairs.",
            {"latent": "d"},
        )
        text = (
            f"Mean logit difference of the right pronoun: {summary['clean']:.2f} clean, {summary['corrupted']:.2f} "
            f"corrupted; the right one is ahead in {summary['clean_right']:.0%} of clean prompts. Latents are ranked "
            "on `select`; names and templates of `report` are others."
        )
        sections = [Section("By layer", text, [layers]), Section("At the chosen layer", "", [*self.charts(), latents])]
        return Page("Who is it? Latents for the gender of a character", lead, sections, Facts(provenance.facts()))


def _ce_recovered(model: LanguageModel, saes: dict[Site, Dictionary], prompts: Tokens) -> dict[Site, float]:
    """As training measured it on held-out text of this very model; for other dictionaries, over the select prompts."""
    known = {site: sae.metrics_on(model).get("ce_recovered") for site, sae in saes.items()}
    return {
        site: value if value is not None else splice_quality(model, saes[site], prompts).ce_recovered
        for site, value in known.items()
    }


def _points(sizes: Sequence[int], intervals: Sequence[Interval]) -> list[list[float]]:
    return [[k, i.value, i.low, i.high] for k, i in zip(sizes, intervals, strict=True)]


if __name__ == "__main__":
    sys.exit(run_config(PronounsConfig, run, "python -m experiments.pronouns"))
