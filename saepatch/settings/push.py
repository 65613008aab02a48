"""Settings of `saepatch push`."""

from dataclasses import dataclass
from typing import ClassVar

from saepatch.settings.mixins import Output


@dataclass(frozen=True)
class PushConfig(Output):
    """Upload dictionaries to a repository of the Hugging Face hub, for sae_lens and saepatch to load."""

    examples: ClassVar[tuple[str, ...]] = (
        "saepatch push runs/saes OWNER/NAME --dry_run",
        "saepatch push runs/saes/resid_post.3 OWNER/NAME --private",
    )

    folder: str
    """Folder of one dictionary, or what training leaves: one with a sub-folder a site."""
    repo_id: str
    """Repository on the hub, OWNER/NAME; made if there is none."""
    private: bool = False
    """Make the repository private; one that is there already has to be."""
    branch: str = ""
    """Branch to commit to; empty: the main one."""
    message: str = ""
    """Message of the commit."""
    dry_run: bool = False
    """List what would go up, and upload nothing."""
