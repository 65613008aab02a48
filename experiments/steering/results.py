"""Settings and results of the steering experiment."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from saepatch.errors import UserError
from saepatch.organism import is_checkpoint
from saepatch.records.statistics import Interval, paired_difference
from saepatch.steering.generate import Concept
from saepatch.tracking.open import read_spec

from .stages import KnownDictionary, Point


@dataclass(frozen=True)
class SteeringConfig:
    """Steer by the top K latents at equal norm and divergence, beside random ones, a dense direction and words."""

    model: str = "organism"
    """Model: organism, a folder, or a Hugging Face id."""
    sae: str = "organism"
    """Dictionaries: organism, a folder (of one, or of one sub-folder a site) or RELEASE/SAE_ID, several with commas."""
    out: str = "runs/steering"
    """Folder for summary.json, report.html, rows.parquet, config.yaml, figures and what a stopped run goes on from."""
    site: str = ""
    """Site to steer at; empty: for each concept the one where latents, few and many alike, do best on `tune`."""
    concepts: str = ""
    """YAML file of concepts; empty: refusal, sentiment and French for organism, a character's gender for others."""
    reference: str = ""
    """Texts that maxima are taken over: a .txt file (one a line), or .jsonl (column text); organism has its own."""
    reference_texts: int = 1000
    """How many of them, at most."""
    sizes: tuple[int, ...] = (1, 2, 5, 10, 20)
    """Numbers of latents that steer together."""
    strengths: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
    """Norms of the perturbation, in units of the first latent's largest activation times its length."""
    divergences: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    """Divergences at which ways are compared, in nats a token."""
    prompts: int = 100
    """Prompts with and without a concept that latents are chosen on, at most."""
    continued: int = 48
    """Prompts that are continued, of `tune` and of `report`, at most."""
    new_tokens: int = 24
    """Tokens of a continuation, at most."""
    draws: int = 5
    """Random latents."""
    limit: float = 20.0
    """No strength is chosen whose perplexity on `tune` is more than so many times that without steering."""
    quick: bool = False
    """A small run of all of it."""
    seed: int = 0
    """Seed of prompts and random latents."""
    device: str = "cpu"
    """Where to run: cpu, cuda or mps."""
    dtype: str = "float32"
    """Precision of the model: float32, bfloat16 or float16."""
    track: str = "none"
    """Besides the local log: none, wandb, wandb:offline, wandb:online, trackio, or several, separated by commas."""
    prepend_bos: bool | None = None
    """Put a BOS in front of texts whose tokenizer adds none; unset: where the dictionaries were trained so."""

    def __post_init__(self) -> None:
        read_spec(self.track)
        for name in ("sizes", "strengths", "divergences"):
            values = getattr(self, name)
            if not values or min(values) <= 0 or sorted(set(values)) != list(values):
                raise UserError(f"{name} = {list(values)}: give rising numbers above 0, as in --{name} [1,2,5]")
        if self.sizes[0] != 1 or len(self.sizes) < 2:
            raise UserError(f"sizes = {list(self.sizes)}: begin with 1, which others are compared with")
        for name, least in (("prompts", 4), ("continued", 4), ("new_tokens", 2), ("draws", 1), ("reference_texts", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} = {getattr(self, name)}: use at least {least}")
        if self.limit < 1:
            raise UserError(f"limit = {self.limit}: use at least 1")
        if not self.reference and not is_checkpoint(self.model):
            raise UserError(f"which texts are latents' maxima in {self.model} taken over? Give --reference FILE")


@dataclass(frozen=True, eq=False)
class SteeringResult:
    """What steering towards one concept gave, on `report` unless said otherwise.

    `norms` has every way at every strength, `divergences` at every divergence (None: out of its reach), `chosen` at the
    strength that was best on `tune`. `fluent` says which of `norms` are within the limit on perplexity, `by_site` and
    `by_order` are the choices; these are on `tune`.
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

    def at_equal_norm(self, size: int, level: float) -> Interval:
        """How much more often `size` latents succeed than one, averaged over the strengths at which both are fluent."""
        fluent = zip(self.fluent[f"top-{size}"], self.fluent["top-1"], strict=True)
        pairs = zip(self.norms[f"top-{size}"], self.norms["top-1"], strict=True)
        return _difference([pair for pair, both in zip(pairs, fluent, strict=True) if all(both)], level)

    def at_equal_divergence(self, size: int, level: float) -> Interval:
        """The same, averaged over the divergences that both reach."""
        pairs = zip(self.divergences[f"top-{size}"], self.divergences["top-1"], strict=True)
        return _difference([(a, b) for a, b in pairs if a and b], level)

    def at_chosen(self, size: int, level: float) -> Interval:
        """The same, each at its own strength."""
        return _difference([(self.chosen[f"top-{size}"], self.chosen["top-1"])], level)


def _difference(pairs: Sequence[tuple[Point, Point]], level: float) -> Interval:
    """Mean over pairs of points of the first's success less the second's; the interval is over prompts."""
    if not pairs:
        return Interval.withheld(float("nan"), 0, "nothing to compare")
    return paired_difference(np.mean([a.shown - b.shown for a, b in pairs], 0), level)
