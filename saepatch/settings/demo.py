"""Settings of `saepatch demo`."""

from dataclasses import dataclass
from typing import ClassVar

from saepatch.errors import UserError
from saepatch.settings.mixins import DictionarySettings, ModelSettings, Output, Tracked


@dataclass(frozen=True)
class DemoConfig(Output, Tracked, DictionarySettings, ModelSettings):
    """Patch, steer and restore single latents in the embedded model, and write a report."""

    examples: ClassVar[tuple[str, ...]] = (
        "saepatch demo --out runs/demo",
        "saepatch demo --pairs 40 --track wandb:offline,trackio --out runs/small",
    )

    out: str = "runs/demo"
    """Folder for report.html, summary.json and results.parquet."""
    model: str = "organism"
    """Model to run on: the embedded one, or a fine-tuned copy of it in a folder."""
    sae: str = "organism"
    """Dictionaries: the embedded ones, or a folder with one sub-folder per site."""
    pairs: int = 100
    """Number of prompt pairs per task and split."""
    ioi_site: str = "resid_post.3"
    """Site whose latents are patched on indirect object identification."""
    safety_site: str = ""
    """Site whose latents are restored under jailbreaks; empty: the earliest site where few suffice on `tune`."""
    steering_site: str = "resid_post.3"
    """Site whose latents are steered."""
    seed: int = 0
    """Seed of pairs, controls and bootstrap draws."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs < 10:
            raise UserError(f"pairs = {self.pairs} is too few for intervals and controls: use at least 10")
