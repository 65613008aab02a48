"""Settings of `saepatch compare`."""

from dataclasses import dataclass
from typing import ClassVar

from saepatch.settings.mixins import Output


@dataclass(frozen=True)
class CompareConfig(Output):
    """Show two runs of one command or experiment side by side: settings, figures and largest effects."""

    examples: ClassVar[tuple[str, ...]] = (
        "saepatch compare runs/a runs/b",
        "saepatch compare runs/a runs/b --html both.html",
    )

    one: str
    """Folder of a finished run."""
    other: str
    """Folder of another run of the same command or experiment."""
    html: str = ""
    """HTML file to write the comparison to as well."""
