"""Settings and results of the experiment on both halves of a jailbreak."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from saepatch.errors import UserError
from saepatch.measure.controls import DRAWS
from saepatch.model.sites import Site
from saepatch.records.statistics import Interval
from saepatch.restoration.answering import Answered
from saepatch.tracking.open import read_spec

HALVES = ("suppressed", "amplified")
DONE = {"suppressed": "suppressed restored", "amplified": "amplified ablated"}
BOTH, SHIFT = "both", "CC-Delta"


@dataclass(frozen=True)
class JailbreakConfig:
    """Find and test apart the latents that a jailbreak suppresses and those that it amplifies."""

    out: str = "runs/jailbreak"
    """Folder for summary.json, report.html, results.parquet and config.yaml."""
    sae: str = "organism"
    """Dictionaries: organism, or a folder with one sub-folder per site."""
    prompts: int = 48
    """Number of harmful requests per split, and of harmless ones."""
    tokens: int = 16
    """Maximum number of tokens of an answer."""
    draws: int = DRAWS
    """Number of random sets of latents, and of matched sets."""
    seed: int = 0
    """Seed of requests and of controls."""
    track: str = "none"
    """Trackers besides the local log, separated by commas: none, wandb, wandb:offline, wandb:online, trackio."""

    def __post_init__(self) -> None:
        read_spec(self.track)
        if self.prompts < 6 or self.tokens < 4 or self.draws < 1:
            raise UserError(
                f"prompts = {self.prompts}, tokens = {self.tokens}, draws = {self.draws}: use at least 6, 4 and 1"
            )


@dataclass(frozen=True)
class RankedHalves:
    """The first latents of each half in the order of their change, and how much of the change each half is.

    `ranked` has (site, latent) by half, `share` the half's share of the sum of absolute mean changes times row norms,
    `significant` the numbers of latents that pass the paired test with this sign, `active` those that are ever on.
    """

    ranked: dict[str, tuple[tuple[str, int], ...]]
    share: dict[str, float]
    significant: dict[str, int]
    active: int

    def top(self, half: str, k: int) -> dict[Site, tuple[int, ...]]:
        chosen: dict[Site, list[int]] = {}
        for site, latent in self.ranked[half][:k]:
            chosen.setdefault(Site.parse(site), []).append(latent)
        return {site: tuple(ids) for site, ids in chosen.items()}


@dataclass(frozen=True)
class ShiftChoice:
    """Where CC-Delta adds what was lost, how many times, and whether in the answer, too."""

    site: str
    strength: float
    in_answer: bool


@dataclass(frozen=True)
class Cost:
    """Divergence from the unedited model over its own answers to harmless requests, in nats per token."""

    kl: Interval


@dataclass(frozen=True)
class JailbreakResults:
    """Answers by prompts and condition; the chosen numbers of latents; costs by condition."""

    found: RankedHalves
    sizes: Mapping[str, int]
    shift: ShiftChoice
    answers: Mapping[str, Mapping[str, Sequence[Answered]]]
    costs: Mapping[str, Interval]
