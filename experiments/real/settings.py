"""Settings of the study of a real model."""

from dataclasses import dataclass

from saepatch.errors import UserError
from saepatch.tracking.open import read_spec

# What --quick replaces.
QUICK = {"pairs": 16, "group": 6}


@dataclass(frozen=True)
class RealConfig:
    """Study a real model on pairs that it gets right: patching by layer, head, MLP and position."""

    model: str = ""
    """Model: a folder, or a Hugging Face id."""
    data: str = ""
    """Texts: a .jsonl, .json, .csv, .parquet or .txt file."""
    out: str = "runs/real"
    """Folder for summary.json, report.html and config.yaml."""
    sae: str = ""
    """Dictionaries: a folder with one sub-folder per site."""
    quick: bool = False
    """A short version: few pairs."""
    pairs: int = 100
    """Maximum number of prompt pairs per task and split."""
    group: int = 32
    """Maximum number of pairs of one form in a map by layer and position."""
    seed: int = 0
    """Seed of pairs, controls and bootstrap draws."""
    device: str = "cpu"
    """Where to run: cpu, cuda or mps."""
    dtype: str = "float32"
    """Precision of the model: float32, bfloat16 or float16."""
    track: str = "none"
    """Trackers besides the local log, separated by commas: none, wandb, wandb:offline, wandb:online, trackio."""

    def __post_init__(self) -> None:
        read_spec(self.track)
        if not self.model:
            raise UserError("no model: give a folder or a Hugging Face id, as in --model google/gemma-3-270m")
        if min(self.pairs, self.group) < 1:
            raise UserError(f"pairs = {self.pairs}, group = {self.group}: use at least 1")
