"""Settings of the experiment on circuits."""

from dataclasses import dataclass

from saepatch.errors import UserError
from saepatch.tracking.open import read_spec

OWN_SITES = ("resid_post.4", "resid_post.2,resid_post.4")  # of the embedded model


@dataclass(frozen=True)
class CircuitsConfig:
    """Find the smallest faithful circuits of nodes and of edges for several tasks, by several rankings."""

    model: str = "organism"
    """Model: organism, a folder, or a Hugging Face id."""
    sae: str = "organism"
    """Dictionaries: organism, or a folder with one sub-folder per site; empty: heads, MLPs and embeddings alone."""
    tasks: tuple[str, ...] = ("ioi", "facts", "agreement")
    """Tasks: of the embedded model, or for other models ioi, facts, greater_than, agreement, pronouns."""
    sites: tuple[str, ...] = ()
    """Sites whose latents and error terms are members, together where separated by commas; empty: resid_post.4, and it
    with resid_post.2, of the embedded model; each dictionary's own of others."""
    out: str = "runs/circuits"
    """Folder for summary.json, report.html, the circuits and config.yaml."""
    select: int = 200
    """Number of pairs that nodes are ranked on, and edges on the first `few` of them."""
    tune: int = 60
    """Number of pairs that sizes are chosen on."""
    report: int = 100
    """Number of pairs that circuits are reported on."""
    few: int = 24
    """Number of pairs of each split on which latents are patched exactly, and circuits of edges run."""
    least: float = 0.9
    """Faithfulness that a circuit must reach."""
    steps: int = 15
    """Steps in which masks (DBM) learn; 0: none are learned."""
    seed: int = 0
    """Seed of pairs and of random circuits."""
    device: str = "cpu"
    """Where to run: cpu, cuda or mps."""
    dtype: str = "float32"
    """Precision of the model: float32, bfloat16 or float16."""
    track: str = "none"
    """Trackers besides the local log, separated by commas: none, wandb, wandb:offline, wandb:online, trackio."""

    def __post_init__(self) -> None:
        read_spec(self.track)
        if min(self.select, self.tune, self.report, self.few) < 2 or not self.tasks:
            raise UserError("give at least one task, and at least 2 pairs of each split")
        if not 0 < self.least < 1 or self.steps < 0:
            raise UserError(f"least = {self.least}, steps = {self.steps}: use a share between 0 and 1, and at least 0")
