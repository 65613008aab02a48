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
    """First read the run's prompts and top latents with the model again, as a run in shards has not done."""
