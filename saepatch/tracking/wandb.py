"""The Weights & Biases backend. The only module that imports W&B; itself imported on demand."""

from __future__ import annotations

import logging
import netrc
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from saepatch.tracking.backends import RunDescription
from saepatch.tracking.sender import FINISH_TIMEOUT

if TYPE_CHECKING:
    from saepatch.report import Chart

logger = logging.getLogger(__name__)

INIT_TIMEOUT = 15.0  # seconds; W&B's default of 90 is too long a wait on a machine without network


class WandbRun:
    """One W&B run; methods may raise anything that W&B raises."""

    def __init__(self, about: RunDescription, resumed: bool, mode: str | None) -> None:
        import wandb

        self._wandb = wandb
        # Failures are reported once, through logging; W&B's own messages are kept off the terminal.
        settings = wandb.Settings(
            console="off",
            x_disable_stats=True,
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT,
            finish_timeout_raises=True,
            silent=True,
        )
        if mode != "offline" and os.environ.get("WANDB_MODE", "online") == "online" and not has_key():
            # W&B would prompt for a key and block an unattended run.
            logger.warning("W&B has no key (WANDB_API_KEY, or `wandb login`): the run is kept offline")
            mode = "offline"
        self._staging = about.out.absolute() / "wandb"
        self._run = wandb.init(
            project=about.project,
            name=about.run,
            dir=about.out,
            mode=mode,  # type: ignore[arg-type]
            config=dict(about.config),
            settings=settings,
            reinit="create_new",
            id=about.run_id,
            resume="allow" if resumed else None,
            group=about.group,
            job_type=about.job_type,
        )
        self._axes = about.axes
        self._step: int | None = None  # the run's step of the current row
        # W&B's own step of the current row and its next free one: a resumed run has steps already, and they must rise.
        self._row_step = self._free = int(getattr(self._run, "step", 0) or 0)
        for axis in dict.fromkeys(self._axes.values()):
            self._run.define_metric(axis, hidden=True)
        for metrics, axis in self._axes.items():
            self._run.define_metric(metrics, step_metric=axis)
        self.sync_command: str | None = None
        if self._run.offline and not self._run.disabled:
            # A resumed run has one folder per start; W&B uploads them as one run.
            # Under an agent of a sweep, the id is the agent's.
            folders = Path(self._run.dir).parents[1].glob(f"offline-run-*-{self._run.id}*")
            self.sync_command = shlex.join(["wandb", "sync", *map(str, sorted(folders))])

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**dict.fromkeys(self._axes.values(), step), **values}, step=self._row(step))

    def curve(self, name: str, x: str, points: Sequence[tuple[float, Mapping[str, float]]]) -> None:
        self._run.define_metric(x, hidden=True)
        self._run.define_metric(f"{name}/*", step_metric=x)
        for place, values in points:  # one row per point: the axis is not the run's
            self._run.log({**values, x: place}, step=self._free)
            self._free, self._step = self._free + 1, None

    def histogram(self, name: str, counts: Sequence[float], edges: Sequence[float], step: int) -> None:
        import numpy as np

        histogram = self._wandb.Histogram(np_histogram=(np.array(counts), np.array(edges)))
        self._run.log({name: histogram}, step=self._row(step))

    def summarise(self, values: Mapping[str, float]) -> None:
        if self._step is not None:
            # W&B writes a row when the next begins, and a row replaces the summary's values of its names.
            self._run.log({}, step=self._row_step, commit=True)
            self._step = None
        self._run.summary.update(dict(values))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        table = self._wandb.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)
        with self._staged_with_the_run():
            self._run.log({name: table}, step=self._row(step))  # without a step, W&B would advance its own

    def _row(self, step: int) -> int:
        """W&B's own step for a step of the run: the same, or the next free one where a curve's rows have passed it.

        W&B drops rows whose step is below the last, and merges rows logged at the same step.
        """
        if step != self._step:
            self._step, self._row_step = step, max(step, self._free)
            self._free = self._row_step + 1
        return self._row_step

    def figure(self, name: str, chart: Chart, step: int) -> None:
        from saepatch.tracking.plots import plotly_figure, svg_page

        figure = plotly_figure(chart)
        with self._staged_with_the_run():
            media = self._wandb.Plotly(figure) if figure is not None else self._wandb.Html(svg_page(chart))
            self._run.log({name: media}, step=self._row(step))

    def page(self, name: str, path: Path, step: int) -> None:
        with self._staged_with_the_run():
            self._run.log(
                {name: self._wandb.Html(path.read_text(encoding="utf-8"), inject=False)}, step=self._row(step)
            )

    def configure(self, settings: Mapping[str, Any]) -> None:
        self._run.config.update(dict(settings), allow_val_change=True)

    def artifact(self, name: str, folder: Path, about: Mapping[str, Any], upload: bool) -> None:
        with self._staged_with_the_run():
            artifact = self._wandb.Artifact(re.sub(r"[^a-zA-Z0-9_.-]+", "_", name), type="folder", metadata=dict(about))
            if upload:
                artifact.add_dir(str(folder))
            else:
                artifact.add_reference(folder.as_uri())
            self._run.log_artifact(artifact)

    def finish(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)

    def abandon(self) -> None:
        leave_service()

    @contextmanager
    def _staged_with_the_run(self) -> Iterator[None]:
        """Stage files in the run's folder: W&B's default, the home folder, would leave them behind when an offline run
        is moved."""
        elsewhere = os.environ.get("WANDB_DATA_DIR")
        os.environ.setdefault("WANDB_DATA_DIR", str(self._staging))
        try:
            yield
        finally:
            if elsewhere is None:
                del os.environ["WANDB_DATA_DIR"]


def leave_service() -> None:
    """Let this process end without W&B's service, for which W&B would wait at exit, with no limit.

    W&B's public API offers no way to skip that.
    """
    with suppress(Exception):
        import wandb

        wandb.setup().assert_service()._cleanup()  # type: ignore[misc]


def has_key() -> bool:
    """Whether W&B could log in without a prompt: from the environment, its settings or the netrc file."""
    import wandb

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    settings = wandb.Settings()
    if settings.api_key:
        return True
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        login = netrc.netrc(str(path)).authenticators(urlsplit(settings.base_url).netloc)
    except (OSError, netrc.NetrcParseError):
        return False
    return bool(login and login[2])
