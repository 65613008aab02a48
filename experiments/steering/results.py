"""Settings and results of the steering experiment."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from saepatch.errors import UserError
from saepatch.organism import is_checkpoint
from saepatch.records.statistics import Interval, paired_difference
from saepatch.steering.generate import Concept
from saepatch.tracking.open import read_spec

from .baselines import Prediction
from .stages import KnownDictionary, Point


@dataclass(frozen=True)
class SteeringConfig:
    """Steer by the top K latents at equal norm and divergence; compare random latents, a dense direction, prompting."""

    model: str = "organism"
    """Model: organism, a folder, or a Hugging Face id."""
    sae: str = "organism"
    """Dictionaries, separated by commas: organism, a folder (one dictionary, or a sub-folder per site) or
    RELEASE/SAE_ID."""
    out: str = "runs/steering"
    """Folder for summary.json, report.html, rows.parquet, config.yaml, the figures and the measurements."""
    site: str = ""
    """Site to steer at; empty: for each concept the one where steering succeeds most on `tune`, averaged over sizes."""
    concepts: str = ""
    """YAML file of concepts; empty: refusal, sentiment and French for organism, a character's gender for others."""
    reference: str = ""
    """Texts over which units are taken: a .txt file (one per line) or .jsonl (column text); organism has its own."""
    unit: Literal["default", "quantile", "largest"] = "default"
    """A latent's unit: the 0.95 quantile of its positive activations, or the largest; default: the largest for the
    embedded model, which has no outliers, and the quantile for others."""
    reference_texts: int = 1000
    """Maximum number of reference texts."""
    sizes: tuple[int, ...] = (1, 2, 5, 10, 20)
    """Numbers of latents that steer together."""
    strengths: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
    """Norms of the perturbation, in units of the first latent's unit times its length."""
    divergences: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    """Divergences at which methods are compared, in nats per token."""
    prompts: int = 100
    """Maximum number of prompts with the concept, and without it, on which latents are chosen."""
    continued: int = 48
    """Maximum number of prompts of `tune`, and of `report`, that are continued."""
    new_tokens: int = 24
    """Maximum number of tokens of a continuation."""
    draws: int = 5
    """Number of random latents."""
    limit: float = 20.0
    """Largest perplexity on `tune`, relative to that without steering, of a strength that may be chosen."""
    quick: bool = False
    """A small run of the whole experiment."""
    seed: int = 0
    """Seed of prompts and random latents."""
    device: str = "cpu"
    """Where to run: cpu, cuda or mps."""
    dtype: str = "float32"
    """Precision of the model: float32, bfloat16 or float16."""
    track: str = "none"
    """Trackers besides the local log, separated by commas: none, wandb, wandb:offline, wandb:online, trackio."""
    prepend_bos: bool | None = None
    """Prepend a BOS where the tokenizer adds none; unset: if a dictionary was trained that way."""

    def __post_init__(self) -> None:
        read_spec(self.track)
        for name in ("sizes", "strengths", "divergences"):
            values = getattr(self, name)
            if not values or min(values) <= 0 or sorted(set(values)) != list(values):
                raise UserError(f"{name} = {list(values)}: give increasing numbers above 0, as in --{name} [1,2,5]")
        if self.sizes[0] != 1 or len(self.sizes) < 2:
            raise UserError(f"sizes = {list(self.sizes)}: begin with 1, to which the others are compared")
        for name, least in (("prompts", 4), ("continued", 4), ("new_tokens", 2), ("draws", 1), ("reference_texts", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} = {getattr(self, name)}: use at least {least}")
        if self.limit < 1:
            raise UserError(f"limit = {self.limit}: use at least 1")
        if not self.reference and not is_checkpoint(self.model):
            raise UserError(f"latents' units in {self.model} need reference texts: give --reference FILE")

    @property
    def largest(self) -> bool:
        """Whether latents are measured by their largest activation."""
        return self.unit == "largest" or (self.unit == "default" and is_checkpoint(self.model))

    @property
    def unit_name(self) -> str:
        """What a latent's unit is, in words."""
        return "largest activation" if self.largest else "0.95 quantile of its positive activations"


@dataclass(frozen=True, eq=False)
class SteeringResult:
    """Results of steering towards one concept, on `report` unless stated otherwise.

    `norms` has the points of each method at every strength, `divergences` at every divergence (None: not reachable),
    `chosen` at the strength that was best on `tune`. On `tune`: `fluent` flags the points of `norms` within the limit
    on perplexity, `by_site` and `by_order` have the best points of each site and ranking. `overall` has the harmonic
    means of `baselines.overall` by method, `predictions` what is known of single latents before they steer.
    """

    concept: Concept
    site: KnownDictionary
    unit: float
    order: Sequence[int]
    order_name: str
    by_site: Mapping[str, Sequence[Point]]
    by_order: Mapping[str, Sequence[Point]]
    unsteered: Point
    prompting: Point | None
    prefix: str
    norms: Mapping[str, Sequence[Point]]
    divergences: Mapping[str, Sequence[Point | None]]
    chosen: Mapping[str, Point]
    fluent: Mapping[str, Sequence[bool]]
    one_token: Point | None
    one_token_prefix: str
    predictions: Sequence[Prediction]
    overall: Mapping[str, Interval]

    def at_equal_norm(self, size: int, level: float) -> Interval:
        """Success rate of `size` latents minus that of one, averaged over the strengths at which both are fluent."""
        fluent = zip(self.fluent[f"top-{size}"], self.fluent["top-1"], strict=True)
        pairs = zip(self.norms[f"top-{size}"], self.norms["top-1"], strict=True)
        return _difference([pair for pair, both in zip(pairs, fluent, strict=True) if all(both)], level)

    def at_equal_divergence(self, size: int, level: float) -> Interval:
        """The difference averaged over the divergences that both reach."""
        pairs = zip(self.divergences[f"top-{size}"], self.divergences["top-1"], strict=True)
        return _difference([(a, b) for a, b in pairs if a and b], level)

    def at_chosen(self, size: int, level: float) -> Interval:
        """The difference with each at its own chosen strength."""
        return _difference([(self.chosen[f"top-{size}"], self.chosen["top-1"])], level)


def _difference(pairs: Sequence[tuple[Point, Point]], level: float) -> Interval:
    """Mean over pairs of points of the first's success minus the second's, with an interval over prompts."""
    if not pairs:
        return Interval.withheld(float("nan"), 0, "nothing to compare")
    return paired_difference(np.mean([a.shown - b.shown for a, b in pairs], 0), level)
