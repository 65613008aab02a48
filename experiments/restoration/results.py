"""Settings and results of the safety experiment."""

from dataclasses import dataclass

from saepatch.errors import UserError
from saepatch.measure.quality import SpliceQuality
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site
from saepatch.restoration.answering import Answered
from saepatch.tracking.open import read_spec

from .curves import ChosenLatents, RefusalCurve
from .guards import Guards
from .probes import Depth, HeldOut, Layer, Utility
from .runs import Runs
from .settings import Setting

SETTINGS = ("setting_a", "setting_b")


@dataclass(frozen=True)
class SafetyConfig:
    """Restore latents from a donor while the model answers, in two settings, with controls."""

    out: str = "runs/safety"
    """Folder for summary.json, report.html, results.parquet, config.yaml and the figures."""
    model: str = "organism"
    """Aligned model: the embedded one, or a fine-tuned copy of it in a folder."""
    base: str = "organism-base"
    """Its base model, for setting A."""
    sae: str = "organism"
    """Dictionaries of the aligned model, for setting B: the embedded ones, or a folder with one sub-folder per site."""
    shared_sae: str = "organism-shared"
    """Dictionaries trained on both models, for setting A, as by `python -m training --model ALIGNED --also [BASE]`:
    those of one model reconstruct the other poorly."""
    settings: tuple[str, ...] = SETTINGS
    """Settings to measure: setting_a, setting_b."""
    prompts: int = 100
    """Number of harmful requests per split, and of harmless ones."""
    sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    """Numbers of latents that are restored together, over all sites."""
    draws: int = 5
    """Number of random sets of latents, and of matched sets, for each size."""
    tokens: int = 16
    """Maximum number of tokens of an answer."""
    template: int = 0
    """Number of tokens at the end of prompts that are restored, beside the generated ones; 0: from the assistant's turn
    on, as the chat template opens it."""
    max_fvu: float = 0.5
    """Largest fraction of variance unexplained that a dictionary may have on either model in setting A."""
    seed: int = 0
    """Seed of prompts, controls and bootstrap draws."""
    device: str = "cpu"
    """Where to run: cpu, cuda or mps."""
    track: str = "none"
    """Trackers besides the local log, separated by commas: none, wandb, wandb:offline, wandb:online, trackio."""

    def __post_init__(self) -> None:
        read_spec(self.track)
        if self.prompts < 4:
            raise UserError(f"prompts = {self.prompts} is too few for an interval: use at least 4")
        if not self.sizes or min(self.sizes) < 1 or sorted(set(self.sizes)) != list(self.sizes):
            raise UserError(f"sizes = {list(self.sizes)}: give increasing numbers from 1, as in --sizes [1,4,16]")
        if self.draws < 1 or self.tokens < 4 or self.template < 0:
            raise UserError(
                f"draws = {self.draws}, tokens = {self.tokens}, template = {self.template}: use at least 1, 4 and 0"
            )
        if not self.settings or set(self.settings) - set(SETTINGS):
            raise UserError(f"settings = {list(self.settings)}: use setting_a, setting_b or both")


@dataclass(frozen=True, eq=False)
class Result:
    """All results of one setting, from `report`; the choice is from `tune`."""

    setting: Setting
    choice: ChosenLatents
    latents: int  # number of latents chosen
    curve: RefusalCurve
    neurons: RefusalCurve | None
    dense: Answered
    residual: Answered
    everything: Answered  # all latents of all sites restored
    reconstruction: Answered
    depths: list[Depth]
    layers: list[Layer]
    kinds: dict[str, float]
    held_out: list[HeldOut]
    utility: Utility
    guards: Guards
    quality: dict[Site, tuple[SpliceQuality, SpliceQuality]]
    exact: bool | None  # setting A: restoring whole sites gives the donor's tokens (see `safety._exact`)
    examples: tuple[Answered, ...]  # bare, restored, all latents restored, donor


@dataclass(frozen=True, eq=False)
class SafetyResults:
    """The whole experiment."""

    config: SafetyConfig
    model: LanguageModel
    results: list[Result]
    runs: Runs
    seconds: dict[str, float]
