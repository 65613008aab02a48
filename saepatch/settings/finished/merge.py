"""Settings of `saepatch merge`."""

from dataclasses import dataclass
from typing import ClassVar

from saepatch.settings.mixins import Output, Tracked


@dataclass(frozen=True)
class MergeConfig(Output, Tracked):
    """Merge the shards of a run into results.parquet and summary.json."""

    examples: ClassVar[tuple[str, ...]] = (
        "saepatch merge runs/sweep",
        "saepatch merge runs/sweep --track wandb:online",
    )

    out: str
    """Folder of the run."""
