"""The trackio backend: a live dashboard on this machine, without an account (the extra `dashboard`).

Runs are stored in trackio's own folder (``TRACKIO_DIR``), where `trackio show --project saepatch` finds them. This is
the only module that imports trackio.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saepatch.tracking.backends import RunDescription

if TYPE_CHECKING:
    from saepatch.report import Chart

log = logging.getLogger(__name__)


class TrackioRun:
    """One trackio run; methods may raise anything that trackio raises.

    trackio has no run summary and no custom axes: summaries go into the run's last row, and a curve's points are steps.
    """

    def __init__(self, about: RunDescription, resumed: bool) -> None:
        with _silent():
            import trackio

            self._trackio = trackio
            settings = {key: value for key, value in about.config.items() if not key.startswith("_")}
            self._run = trackio.init(
                project=about.project,
                name=f"{about.run}-{about.run_id}",  # trackio identifies a run by its name
                group=about.group,
                config={**settings, **({"job_type": about.job_type} if about.job_type else {})},
                resume="allow" if resumed else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        self.sync_command: str | None = None
        self._project, self._last = about.project, 0

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._last = step
        self._run.log(dict(values), step=step)

    def histogram(self, name: str, counts: Sequence[float], edges: Sequence[float], step: int) -> None:
        import numpy as np

        self._run.log({name: self._trackio.Histogram(np_histogram=(np.array(counts), np.array(edges)))}, step=step)

    def summarise(self, values: Mapping[str, float]) -> None:
        self._run.log({f"summary/{name}": value for name, value in values.items()}, step=self._last)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        self._run.log({name: self._trackio.Table(columns=list(columns), data=[list(row) for row in rows])}, step=step)

    def curve(self, name: str, x: str, points: Sequence[tuple[float, Mapping[str, float]]]) -> None:
        for place, values in points:
            self._run.log({**values, f"{name}/{x}": place})

    def figure(self, name: str, chart: Chart, step: int) -> None:
        from saepatch.tracking.plots import svg_page

        self._run.log({name: self._trackio.Html(svg_page(chart))}, step=step)

    def page(self, name: str, path: Path, step: int) -> None:
        self._run.log({name: self._trackio.Html(path.read_text(encoding="utf-8"))}, step=step)

    def configure(self, settings: Mapping[str, Any]) -> None:
        self._run.config.update(dict(settings))

    def artifact(self, name: str, folder: Path, about: Mapping[str, Any], upload: bool) -> None:
        self.table(name, ["path", *about], [[str(folder), *about.values()]], self._last)

    def finish(self, exit_code: int) -> None:
        self._run.log({"exit_code": exit_code}, step=self._last)
        with _silent():
            self._run.finish()
        log.info("trackio: to look at the run: trackio show --project %s", self._project)

    def abandon(self) -> None:
        """Nothing to do: trackio has no process that outlives this one."""


@contextmanager
def _silent() -> Iterator[None]:
    """Discard what this thread prints: trackio prints even where standard output is JSON. Other threads print on."""
    before, own = sys.stdout, threading.current_thread()

    class Filter:
        def write(self, text: str) -> int:
            return len(text) if threading.current_thread() is own else before.write(text)

        def __getattr__(self, name: str) -> Any:
            return getattr(before, name)

    sys.stdout = Filter()
    try:
        yield
    finally:
        sys.stdout = before
