"""Settings of `saepatch play`."""

from dataclasses import dataclass
from typing import ClassVar

from saepatch.errors import UserError
from saepatch.settings.mixins import DictionarySettings, ModelSettings


@dataclass(frozen=True)
class PlayConfig(DictionarySettings, ModelSettings):
    """Serve a page on which latents are searched, steered and patched, to this machine alone (extra `play`)."""

    examples: ClassVar[tuple[str, ...]] = (
        "saepatch play",
        "saepatch play --model gpt2 --sae gpt2-small-res-jb/blocks.8.hook_resid_pre --reference texts.txt",
        "saepatch play --port 8642",
    )

    reference: str = ""
    """Texts over which units of strength and cards are taken: .txt (one per line), .jsonl or .json (column text);
    empty: the embedded model's own texts; for another model none, and strengths are plain activations."""
    port: int = 0
    """Port of 127.0.0.1; 0: one that is free."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.port < 65536:
            raise UserError(f"port = {self.port}: use a number from 1 to 65535, or 0 for one that is free")
