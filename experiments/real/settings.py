"""Settings of the study of a real model."""

from dataclasses import dataclass

from saepatch.errors import UserError
from saepatch.tracking.open import read_spec

# What --quick replaces.
QUICK = {
    "tasks": ("ioi", "facts", "greater_than", "agreement"),
    "pairs": 16,
    "group": 6,
    "traced": 8,
    "samples": 3,
    "dictionaries": 1,
    "tokens": 20_000,
    "verify": 20,
    "sample": 20,
    "prompts": 10,
    "new_tokens": 10,
    "draws": 2,
}
TASKS = ("ioi", "facts", "greater_than", "agreement", "pronouns")


@dataclass(frozen=True)
class RealConfig:
    """Study a real model: patching, causal tracing, dictionaries and their latents, steering, restoration."""

    model: str = ""
    """Model: a folder, or a Hugging Face id."""
    data: str = ""
    """Texts for the dictionaries: a .jsonl, .json, .csv, .parquet or .txt file."""
    out: str = "runs/real"
    """Folder for summary.json, report.html and config.yaml."""
    sae: str = ""
    """Dictionaries: a folder with one sub-folder per site; empty: three are trained on the texts."""
    quick: bool = False
    """A short version: few tasks, pairs, facts, prompts and tokens, one dictionary."""
    beside: str = ""
    """summary.json of another run of this study, as of a reference model, whose verdicts stand beside this one's."""
    tasks: tuple[str, ...] = TASKS
    """Tasks; the first that the model gets right is the worked example."""
    pairs: int = 100
    """Maximum number of prompt pairs per split of the worked example; half as many (16 at least) of other tasks."""
    group: int = 32
    """Maximum number of pairs of one form in a map by layer and position."""
    dictionaries: int = 3
    """Number of depths at which dictionaries are trained, where none are given: 1, 2 or 3."""
    tokens: int = 1_000_000
    """Tokens that each dictionary is trained on, where none are given."""
    k: int = 32
    """Number of active latents of the dictionaries that are trained."""
    verify: int = 60
    """Number of nodes with the largest attribution estimates that are run exactly."""
    sample: int = 60
    """Number of further nodes, drawn at random, that are run exactly."""
    traced: int = 16
    """Maximum number of facts that are traced, all of one form."""
    samples: int = 10
    """Draws of Gaussian noise for each fact."""
    prompts: int = 24
    """Maximum number of prompts of a split that are continued under steering or restoration."""
    new_tokens: int = 20
    """Maximum number of tokens of a continuation."""
    draws: int = 5
    """Number of random latents, and of control sets, in steering and restoration."""
    seed: int = 0
    """Seed of pairs, controls and bootstrap draws."""
    device: str = "cpu"
    """Where to run: cpu, cuda or mps."""
    dtype: str = "float32"
    """Precision of the model: float32, bfloat16 or float16."""
    track: str = "none"
    """Trackers besides the local log, separated by commas: none, wandb, wandb:offline, wandb:online, trackio."""

    @property
    def beside_worked(self) -> int:
        """Maximum number of pairs per split of the tasks after the worked example."""
        return min(self.pairs, max(16, self.pairs // 2))

    def __post_init__(self) -> None:
        read_spec(self.track)
        if not self.model:
            raise UserError("no model: give a folder or a Hugging Face id, as in --model google/gemma-3-270m")
        if unknown := [name for name in self.tasks if name not in TASKS]:
            raise UserError(f"unknown task {unknown[0]!r}: use some of {', '.join(TASKS)}")
        if not 1 <= self.dictionaries <= 3:
            raise UserError(f"dictionaries = {self.dictionaries}: use 1, 2 or 3")
        generated = ("prompts", "new_tokens", "draws")
        names = ("pairs", "group", "tokens", "k", "verify", "sample", "traced", "samples", *generated)
        if wrong := [name for name in names if getattr(self, name) < 1]:
            raise UserError(f"{wrong[0]} = {getattr(self, wrong[0])}: use at least 1")
