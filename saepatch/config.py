"""Settings of the command line's commands. Light to import: `saepatch --help` reads nothing else."""

from dataclasses import dataclass

from saepatch.errors import UserError


@dataclass(frozen=True)
class DemoConfig:
    """Patch, steer and restore single latents in the embedded model, and write a report."""

    out: str = "runs/demo"
    """Folder for report.html, summary.json and results.parquet."""
    model: str = "organism"
    """Model to run on: the embedded one, or a fine-tuned copy of it in a folder."""
    sae: str = "organism"
    """Dictionaries: the embedded ones, or a folder with one sub-folder a site."""
    pairs: int = 100
    """Prompt pairs of each task and split."""
    ioi_site: str = "resid_post.3"
    """Site whose latents are patched on indirect object identification."""
    safety_site: str = ""
    """Site whose latents are restored under jailbreaks; empty: the earliest where few are enough on `tune`."""
    steering_site: str = "resid_post.3"
    """Site whose latents steer."""
    seed: int = 0
    """Seed of pairs, controls and bootstrap draws."""
    track: str = "none"
    """W&B beside the local log: none, wandb, wandb:offline or wandb:online."""
    device: str = "cpu"
    """Where to run: cpu, cuda or mps."""

    def __post_init__(self) -> None:
        if self.pairs < 10:
            raise UserError(f"pairs = {self.pairs} is too few for intervals and controls: use at least 10")


@dataclass(frozen=True)
class InspectConfig:
    """Print a model's sites and, where dictionaries are given, what each of them keeps."""

    model: str
    """The embedded model (organism, organism-base), a folder, or a Hugging Face id."""
    sae: str = ""
    """Dictionaries to check against the model: organism, a folder, or RELEASE/SAE_ID."""
    device: str = "cpu"
    """Where to run: cpu, cuda or mps."""
    dtype: str = "float32"
    """Precision of the model: float32, bfloat16 or float16."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Leave off unless you trust its author."""
