"""Settings of `saepatch inspect` and `saepatch plan`, which look at a model before anything is run."""

from dataclasses import dataclass, field
from typing import ClassVar

from saepatch.errors import UserError
from saepatch.settings.mixins import DictionarySettings, ModelSettings, Output

WORK = ("patch", "attribute")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class InspectConfig(Output, DictionarySettings, ModelSettings):
    """Print a model's sites and, where dictionaries are given, how well each reconstructs its site."""

    examples: ClassVar[tuple[str, ...]] = (
        "saepatch inspect organism --sae organism",
        "saepatch inspect gpt2 --sae gpt2-small-res-jb/blocks.8.hook_resid_pre --json",
    )

    model: str = field()  # required: overrides the mixin's default
    """The embedded model (organism, organism-base), a folder, or a Hugging Face id."""
    sae: str = ""
    """Dictionaries to check against the model: organism, a folder, or RELEASE/SAE_ID."""


@dataclass(frozen=True)
class PlanConfig(Output):
    """Say what a sweep of a large model would need of each device, from its config.json alone, without its weights."""

    examples: ClassVar[tuple[str, ...]] = (
        "saepatch plan llama-70b/config.json --devices 2 --device_gb 80 --site resid_post.40 --d_sae 65536",
        "saepatch plan organism --work attribute --tokens 200 --site resid_post.3 --d_sae 2048 --json",
    )

    model: str = field()
    """A config.json, a folder that holds one, or an embedded model (organism, organism-base)."""
    work: str = "patch"
    """What is to be done: patch or attribute."""
    tokens: int = 128
    """Tokens of a prompt."""
    rows: int = 1
    """Prompts, or edits, that run at a time."""
    site: str = ""
    """Sites of the dictionaries, separated by commas; empty: no dictionary is counted."""
    d_sae: int = 16384
    """Latents of each dictionary."""
    dtype: str = "bfloat16"
    """Type of the model's numbers: float32, bfloat16 or float16. Dictionaries are in float32."""
    devices: int = 1
    """Devices over which the blocks are spread, in order."""
    device_gb: float = 80.0
    """Memory of each device in GB (10⁹ bytes)."""
    device_tflops: float = 0.0
    """Speed that each device reaches, in 10¹² operations a second, for an estimate of the time; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.work not in WORK:
            raise UserError(f"work {self.work!r}: use {' or '.join(WORK)}")
        if self.dtype not in BYTES:
            raise UserError(f"dtype {self.dtype!r}: use {', '.join(BYTES)}")
        for name in ("tokens", "rows", "d_sae", "devices"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: use at least 1")
        if self.device_gb <= 0 or self.device_tflops < 0:
            raise UserError("device_gb and device_tflops: use numbers above 0 (0 TFLOPS: no estimate of the time)")
