"""Settings of `saepatch push`."""

from dataclasses import dataclass
from typing import ClassVar

from saepatch.settings.mixins import Output


@dataclass(frozen=True)
class PushConfig(Output):
    """Upload dictionaries to a Hugging Face hub repository, from which sae_lens and saepatch load them."""

    examples: ClassVar[tuple[str, ...]] = (
        "saepatch push runs/saes OWNER/NAME --dry_run",
        "saepatch push runs/saes/resid_post.3 OWNER/NAME --private",
    )

    folder: str
    """Folder of one dictionary, or the output of training: a folder with one sub-folder per site."""
    repo_id: str
    """Repository on the hub, OWNER/NAME; created if it does not exist."""
    private: bool = False
    """Make the repository private; an existing repository must be private already."""
    branch: str = ""
    """Branch to commit to; empty: main."""
    message: str = ""
    """Commit message."""
    dry_run: bool = False
    """List the files, and upload nothing."""
