"""The description of a run, and the interface of the trackers besides the local log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from saepatch.report import Chart


@dataclass(frozen=True)
class RunDescription:
    """The description of a run that trackers receive.

    Attributes:
        out: Folder of the run; created if needed. W&B's own folder is ``out/wandb``.
        run: Name of the run.
        config: Configuration of the run, possibly nested; values that JSON cannot represent become text. Library
            versions and the commit of the working directory are added.
        project: Project in W&B and trackio.
        run_id: The backends' id of an earlier run to continue, from `Tracker.run_id`; None for a new run.
        group: Shared by the runs of one study, which W&B groups by it; None: the name of the folder that contains
            `out`.
        job_type: Kind of run within the study: train, patch, steer.
        axes: The unit of steps by metric name (``{"*": "tokens"}``): the x axis on which W&B draws these metrics.
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
    """An experiment tracker besides the local log.

    Any method may raise any exception, or hang; all but `abandon` are called from one thread, in order.

    Attributes:
        sync_command: The shell command that uploads an offline run; None where there is nothing to upload.
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
        """Stop the interpreter from waiting for the backend at exit; called while another call hangs."""
