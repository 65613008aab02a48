"""Settings of `saepatch latent`."""

import re
from dataclasses import dataclass
from typing import ClassVar

from saepatch.errors import UserError
from saepatch.organism import is_checkpoint
from saepatch.settings.mixins import DictionarySettings, ModelSettings, Output, PageSettings, latents_of_sites


@dataclass(frozen=True)
class LatentConfig(Output, PageSettings, DictionarySettings, ModelSettings):
    """Describe latents: top examples, firing frequency, the tokens they promote, their nearest neighbours."""

    examples: ClassVar[tuple[str, ...]] = (
        "saepatch latent resid_post.3:281",
        "saepatch latent resid_post.3:281,966,417 --html latents.html",
        'saepatch latent resid_post.3:281 --explain "The meaning of X is"',
        "saepatch latent resid_pre.8:417 --model gpt2 --sae gpt2-small-res-jb/blocks.8.hook_resid_pre "
        "--reference texts.txt",
    )

    latent: str
    """Site and number, as in resid_post.3:281; several, separated by commas, share one pass over the texts."""
    reference: str = ""
    """Texts to search for examples, one per line; empty: the embedded model's own."""
    explain: str = ""
    """A prompt by which the model explains the latent (Patchscope), with an X where the latent is written in, as in
    "The meaning of X is"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(latents_of_sites(self.latent)) != 1:
            raise UserError(f"latent {self.latent!r}: give latents of one site, as in resid_post.3:281,966")
        if not self.reference and not is_checkpoint(self.model):
            raise UserError(
                f"no texts to search for examples of {self.model}: give --reference FILE, one text per line"
            )
        if self.explain and not re.search(r"\bX\b", self.explain):
            raise UserError(f"explain {self.explain!r}: put an X where the latent is written in")
