"""Settings of `saepatch inspect`."""

from dataclasses import dataclass, field
from typing import ClassVar

from saepatch.settings.mixins import DictionarySettings, ModelSettings, Output


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
