"""Settings of `saepatch report`."""

from dataclasses import dataclass
from typing import ClassVar

from saepatch.settings.mixins import Output


@dataclass(frozen=True)
class ReportConfig(Output):
    """Write report.html of a finished run, from the files in its folder alone."""

    examples: ClassVar[tuple[str, ...]] = (
        "saepatch report runs/sweep",
        "saepatch report runs/sweep --read",
    )

    run: str
    """Folder of the run."""
    read: bool = False
    """First load the model again to add tokens and latent cards, which the report of a sharded run lacks."""
