"""Settings of the experiment on facts."""

from dataclasses import dataclass
from typing import Literal

from saepatch.errors import UserError
from saepatch.facts.contexts import Sampled
from saepatch.tracking.open import read_spec

METHODS = ("ROME", "ROME-original", "MEMIT", "MEMIT-1-layer", "AlphaEdit", "EMMET")


@dataclass(frozen=True)
class FactsConfig:
    """Trace facts, edit them by weights and by latents, and measure what the edits break."""

    out: str = "runs/facts"
    """Folder for summary.json, report.html, results.parquet and config.yaml."""
    model: str = "organism"
    """The embedded model, a folder, or a Hugging Face id."""
    requests: str = "organism"
    """Facts: organism, world (capitals, landmarks, …, for models of English), or a file or dataset as for `saepatch
    edit`."""
    reference: str = "organism"
    """Texts for the covariance of keys and for the held-out loss."""
    held_out: float = 0.2
    """Share of the texts that are kept for the held-out loss."""
    sae: str = "organism"
    """Dictionary of the edits by latents: organism, a folder or RELEASE/SAE_ID; empty: none."""
    site: str = "resid_post.3"
    """Site of that dictionary."""
    layers: tuple[int, ...] = ()
    """Layers at which single edits are tried; empty: all."""
    traced: int = 12
    """Facts of the causal trace; 0: no trace."""
    noise: bool = True
    """Whether subjects are corrupted by Gaussian noise, too, which takes four times as long as other subjects do."""
    choose: int = 12
    """Facts on which layer and token are chosen."""
    singles: int = 30
    """Facts edited one by one, for the comparison of methods."""
    fluency: int = 20
    """Tokens of the texts whose variety is measured for single edits; 0: not measured."""
    methods: tuple[str, ...] = ()
    """Methods that are compared, ROME among them; empty: all (ROME, ROME-original, MEMIT, MEMIT-1-layer, AlphaEdit,
    EMMET)."""
    spread: int = 2
    """Layers of the methods that spread an edit, around the chosen one."""
    batches: Literal["also", "only"] = "also"
    """How methods that can edit several facts in one update run sequences: one edit after another and also in batches,
    each batch being the edits between two checkpoints, or in batches only."""
    trim: bool = False
    """Unembed only tokens that occur in facts and texts, all others having no probability: for large vocabularies."""
    checkpoints: tuple[int, ...] = (1, 3, 10, 30)
    """Numbers of edits after which a sequence is measured."""
    prefixes: int = 0
    """Sampled prefixes of 10 tokens before each prompt, beside the bare prompt."""
    steps: int = 25
    """Largest number of steps in the search for each value."""
    weight: float = 100.0
    """λ of MEMIT."""
    threshold: float = 0.05
    """Eigenvalues of the covariance below this span AlphaEdit's null space."""
    ridge: float = 0.0
    """Share of the mean diagonal that is added to the covariance, where texts are few."""
    token: Literal["", "subject", "last"] = ""
    """Token at which facts are edited; empty: the better of both."""
    dtype: str = "float32"
    """Precision of the model."""
    device: str = "cpu"
    """Where to run."""
    seed: int = 0
    """Seed of noise, prefixes, sampled texts and bootstrap draws."""
    track: str = "none"
    """Trackers besides the local log, separated by commas: none, wandb, wandb:offline, wandb:online, trackio."""

    def __post_init__(self) -> None:
        read_spec(self.track)
        if self.methods and ("ROME" not in self.methods or not set(self.methods) <= set(METHODS)):
            raise UserError(f"methods {', '.join(self.methods)}: name ROME and any of {', '.join(METHODS[1:])}")
        if not 0 < self.held_out < 1 or self.spread < 1 or self.traced < 0 or self.fluency in (1, 2):
            raise UserError(
                f"held_out = {self.held_out}, spread = {self.spread}, traced = {self.traced}, fluency = {self.fluency}:"
                " use a share between 0 and 1, at least 1 layer, no negative number, and no text of 1 or 2 tokens"
            )
        if min(self.choose, self.singles) < 2 or self.steps < 1 or self.prefixes < 0 or not self.checkpoints:
            raise UserError("give at least 2 facts to choose on, 2 single edits, 1 step and 1 checkpoint")

    @property
    def sampled(self) -> Sampled:
        return Sampled(((10, self.prefixes),) if self.prefixes else (), apart=False, seed=self.seed)
