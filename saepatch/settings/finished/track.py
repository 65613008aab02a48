"""Settings of `saepatch track`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from saepatch.settings.mixins import Output


@dataclass(frozen=True)
class TrackConfig(Output):
    """Make a W&B workspace for tracked runs: panels of every command, of training and of its sweeps (extra
    `workspace`)."""

    examples: ClassVar[tuple[str, ...]] = (
        "saepatch track workspace --entity TEAM",
        "saepatch track workspace --dry_run",
    )

    what: Literal["workspace"]
    """What to make: workspace."""
    project: str = "saepatch"
    """Project of the runs; --track writes to saepatch."""
    entity: str = ""
    """User or team that owns the project; empty: that of the login."""
    name: str = "saepatch"
    """Name of the workspace."""
    dry_run: bool = False
    """Print what would be uploaded, as JSON, and upload nothing."""
