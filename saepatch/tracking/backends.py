"""The description of a run, and the interface of a tracker beside the local log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from saepatch.report import Chart


@dataclass(frozen=True)
class RunDescription:
    """A run as its trackers know it.

    Attributes:
        out: Folder of the run; made if need be. W&B's own folder goes to ``out/wandb``.
        run: Name of the run.
        config: What the run was configured with, nested as you like; values that JSON cannot hold go as text. W&B gets
            the versions of the libraries and the commit of the working directory with it.
        project: Project of W&B and trackio.
        run_id: The backends' id of the run, as `Tracker.run_id` gave it before; None for a new one.
        group: Runs of one study share it, so that W&B lines them up; None for the folder that `out` is in.
        job_type: What kind of run of the study this is: train, patch, steer.
        axes: What steps count, by the names of metrics (``{"*": "tokens"}``): W&B draws these over it.
    """

    out: Path
    run: str
    config: Mapping[str, Any]
    project: str = "saepatch"
    run_id: str | None = None
    group: str | None = None
    job_type: str | None = None
    axes: Mapping[str, str] = field(default_factory=dict)


@runtime_checkable
class Backend(Protocol):
    """An experiment tracker beside the local log.

    Any method may raise anything, or hang; all but `abandon` are called from one thread, in the order of the run.

    Attributes:
        sync_command: The shell line that uploads what the backend keeps offline; None where there is nothing to upload.
    """

    sync_command: str | None

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def histogram(self, name: str, counts: Sequence[float], edges: Sequence[float], step: int) -> None: ...

    def summarise(self, values: Mapping[str, float]) -> None: ...

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None: ...

    def curve(self, name: str, x: str, points: Sequence[tuple[float, Mapping[str, float]]]) -> None: ...

    def figure(self, name: str, chart: Chart, step: int) -> None: ...

    def page(self, name: str, path: Path, step: int) -> None: ...

    def configure(self, settings: Mapping[str, Any]) -> None: ...

    def artifact(self, name: str, folder: Path, about: Mapping[str, Any], upload: bool) -> None: ...

    def finish(self, exit_code: int) -> None: ...

    def abandon(self) -> None:
        """Keep the interpreter from waiting for the backend at exit; called while another call hangs."""
