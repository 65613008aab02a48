"""Settings of `saepatch runs`."""

from dataclasses import dataclass
from typing import ClassVar

from saepatch.settings.mixins import Output


@dataclass(frozen=True)
class RunsConfig(Output):
    """List the runs in a folder, at any depth, with their headline figures."""

    examples: ClassVar[tuple[str, ...]] = (
        "saepatch runs",
        "saepatch runs runs/study --json",
    )

    positional: ClassVar[str] = "root"
    root: str = "runs"
    """Folder that contains the runs' folders."""
