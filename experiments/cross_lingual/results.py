"""Settings and results of the experiment on languages."""

from collections.abc import Mapping
from dataclasses import dataclass

from saepatch.data.pairs import PromptPair
from saepatch.errors import UserError
from saepatch.records.statistics import Interval
from saepatch.tracking.open import read_spec

from .capitals import CAPITAL

FEWEST = 8  # parallel pairs of a split


@dataclass(frozen=True)
class CrossLingualConfig:
    """Find the latents that languages share, and the depths at which concept and output language are decided."""

    out: str = "runs/cross_lingual"
    """Folder for summary.json, report.html, results.parquet and config.yaml."""
    model: str = "organism"
    """The embedded model, a folder, or a Hugging Face id."""
    sae: str = "organism"
    """Dictionaries: organism, or a folder with one sub-folder per site; empty: none."""
    latents: int = 16
    """Number of first latents of each language."""
    pairs: int = 40
    """Maximum number of parallel pairs of a split."""
    languages: tuple[str, ...] = ("English", "Spanish")
    """Two or more of English, French, German, Spanish, for other models than the embedded one."""
    seed: int = 0
    """Seed of pairs and controls."""
    device: str = "cpu"
    """Where to run."""
    dtype: str = "float32"
    """Precision of the model."""
    track: str = "none"
    """Trackers besides the local log, separated by commas: none, wandb, wandb:offline, wandb:online, trackio."""

    def __post_init__(self) -> None:
        read_spec(self.track)
        if self.latents < 1 or self.pairs < FEWEST:
            raise UserError(f"latents = {self.latents}, pairs = {self.pairs}: use at least 1 and {FEWEST}")
        if len({*self.languages}) != len(self.languages) or len(self.languages) < 2 or {*self.languages} - {*CAPITAL}:
            raise UserError(f"languages = {', '.join(self.languages)}: use two or more of {', '.join(CAPITAL)}")


@dataclass(frozen=True)
class ParallelPairs:
    """By split and language, pairs of prompts on the same countries in the same order; and what was left out.

    `cut` has, by language, the beginnings of prompts on the countries of `report` (clean, corrupted), up to the copula
    in `copulas`; with it, they ask for the capital.
    """

    pairs: Mapping[str, Mapping[str, tuple[PromptPair, ...]]]
    left_out: Mapping[str, int]
    cut: Mapping[str, tuple[tuple[str, ...], ...]]
    copulas: Mapping[str, str]

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self.pairs["report"])


@dataclass(frozen=True)
class LanguageLatents:
    """At one site, first latents on `select`: of each language, and of each half of its pairs."""

    first: dict[str, tuple[int, ...]]
    halves: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class SharedLatents:
    """At one site and for one ordered pair of languages: overlaps of first latents, and what they restore.

    `overlap` is the share of language A's first latents, found on one half of the countries' pairs, that are among B's
    on the other half; `chance` that among latents matched with B's in frequency and size; `ceiling` the same within A.
    `own`, `transfer` and `matched` are
    normalised effects in B of B's latents, of A's, and of latents matched with A's; `home` is the effect of A's in A.
    """

    overlap: float
    chance: float
    ceiling: float
    own: Interval
    transfer: Interval
    matched: Interval
    home: Interval


@dataclass(frozen=True)
class DepthOf:
    """By layer, what the last token's state of another language and country brings along; and without a patch."""

    layers: tuple[int, ...]
    concept: tuple[Interval, ...]
    language: tuple[Interval, ...]
    unpatched: tuple[float, float]


@dataclass(frozen=True)
class CrossLingualResults:
    """All results, by site and ordered pair of languages ("A → B")."""

    counts: Mapping[str, int]
    left_out: Mapping[str, int]
    shared: Mapping[str, Mapping[str, SharedLatents]]
    depth: Mapping[str, DepthOf]
