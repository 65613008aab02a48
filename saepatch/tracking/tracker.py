"""The tracker that runs log to: it writes the local log and forwards to the backends."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from saepatch.errors import UserError
from saepatch.tracking.backends import Backend
from saepatch.tracking.logfiles import (
    ARTIFACTS,
    METRICS,
    SUMMARY,
    contents,
    number,
    plain_name,
    plain_values,
    read_summary,
)
from saepatch.tracking.sender import BackgroundSender, Starter, reason

if TYPE_CHECKING:
    from saepatch.report import Chart

logger = logging.getLogger(__name__)


class Tracker:
    """Logs a run. Created by `saepatch.tracking.open.open_tracker`.

    Attributes:
        out: Folder of the local log.
        run_id: The backends' id of the run, to be stored in checkpoints; None for a run without backends.
    """

    def __init__(
        self,
        out: Path,
        lines: TextIO,
        run_id: str | None = None,
        backends: Mapping[str, Starter] | None = None,
    ) -> None:
        self.out, self.run_id = out, run_id
        self._lines = lines
        self._last_step = 0
        self._summary = read_summary(out / SUMMARY)
        self._warned: set[str] = set()
        self._senders = {
            name: BackgroundSender(start, partial(self._complain, name)) for name, start in (backends or {}).items()
        }

    @property
    def sync_command(self) -> str | None:
        """The shell command that uploads an offline run; None when there is nothing to upload."""
        return next(filter(None, (sender.sync_command for sender in self._senders.values())), None)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Writes one line of metrics.

        Args:
            metrics: Numbers by name: Python's, NumPy's or one-element tensors. NaN and infinities are kept, as text.
            step: Position of the line on the time axis, in optimiser steps, tokens or another unit. It should not
                decrease: W&B drops a row whose step is below the last (the local log keeps it).

        Raises:
            TypeError, ValueError: A value is not one number, or is called ``step`` or ``time``.
        """
        values = {name: number(value) for name, value in metrics.items()}
        if self._write_line(plain_values(values), step):
            self._send("log", lambda backend: backend.log(values, step))

    def histogram(self, name: str, counts: Iterable[Any], edges: Iterable[Any], step: int) -> None:
        """Writes a histogram: to ``metrics.jsonl`` a line ``{"step", "time", name: {"counts", "edges"}}``, and to W&B.

        Args:
            name: Name of the histogram.
            counts: Number of values between each edge and the next.
            edges: Edges of the bins, one more than there are counts.
            step: As for `log`.

        Raises:
            TypeError, ValueError: The edges do not fit the counts, a value is not one finite number, or the name is
                ``step`` or ``time``.
        """
        heights, bounds = [number(x) for x in counts], [number(x) for x in edges]
        if len(bounds) != len(heights) + 1:
            raise ValueError(f"histogram {name!r} has {len(bounds)} edges for {len(heights)} counts: give one more")
        if not all(map(math.isfinite, heights + bounds)):
            raise ValueError(f"histogram {name!r} has a count or an edge that is not finite: give finite ones")
        if self._write_line({name: {"counts": heights, "edges": bounds}}, step):
            self._send("take a histogram", lambda backend: backend.histogram(name, heights, bounds, step))

    def summarise(self, metrics: Mapping[str, Any]) -> None:
        """Sets headline figures of the run: ``metrics.summary.json``, and W&B's run summary. A later value wins.

        Raises:
            TypeError, ValueError: A value is not one number.
        """
        values = {name: number(value) for name, value in metrics.items()}
        self._summary.update(plain_values(values))
        with self._local(SUMMARY):
            fresh = self.out / f"{SUMMARY}.tmp"
            fresh.write_text(json.dumps(self._summary, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            fresh.replace(self.out / SUMMARY)
        self._send("take the summary", lambda backend: backend.summarise(values))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Writes a table to ``tables/NAME.jsonl``, one object per row, and to the backends.

        Args:
            name: Name of the table. Writing the same name again replaces the local file.
            columns: Names of the columns.
            rows: Rows, each as long as `columns`.

        Raises:
            ValueError: A row's length differs from the number of columns.
        """
        for index, row in enumerate(rows):
            if len(row) != len(columns):
                raise ValueError(f"table {name!r}: row {index} has {len(row)} cells for {len(columns)} columns")
        kept = [list(row) for row in rows]  # copied: backends get them later, when the caller may have changed them
        self._write_table(name, columns, kept)
        step = self._last_step
        self._send("take a table", lambda backend: backend.table(name, list(columns), kept, step))

    def curve(self, name: str, x: str, xs: Sequence[float], lines: Mapping[str, Sequence[Any]]) -> None:
        """Writes lines over their own x axis, such as effects over numbers of latents.

        Locally this is a table; backends receive one point at a time, which W&B draws over that axis. Each point takes
        one of W&B's own steps, so that lines logged after a curve may have later steps in W&B than `log` was given.

        Args:
            name: Name of the curve; its lines are called ``name/line``.
            x: Name of the axis (``k``, ``strength``).
            xs: Positions on the axis.
            lines: Values by line, one per position; None is a gap.

        Raises:
            ValueError: A line's length differs from the axis'.
        """
        for line, values in lines.items():
            if len(values) != len(xs):
                raise ValueError(f"curve {name!r}: {len(values)} values of {line!r} for {len(xs)} places of {x!r}")
        points = [{f"{name}/{line}": values[i] for line, values in lines.items()} for i in range(len(xs))]
        rows = [[place, *point.values()] for place, point in zip(xs, points)]
        kept = [(place, {key: v for key, v in point.items() if v is not None}) for place, point in zip(xs, points)]
        self._write_table(name, [x, *lines], rows)
        self._send("take a curve", lambda backend: backend.curve(name, x, kept))

    def figure(self, name: str, chart: Chart) -> None:
        """Writes a chart: locally as ``figures/NAME.svg``, to W&B as a plotly figure (heat maps) or as SVG.

        Args:
            name: Name of the figure. Writing the same name again replaces the local file.
            chart: What to draw.
        """
        from saepatch.report import write_figure

        path = self.out / "figures" / f"{plain_name(name)}.svg"
        with self._local(str(path.relative_to(self.out))):
            write_figure(chart, path)
        step = self._last_step
        self._send("take a figure", lambda backend: backend.figure(name, chart, step))

    def page(self, name: str, path: Path) -> None:
        """Sends an HTML page that the run wrote, such as its report, to the backends."""
        step = self._last_step
        self._send("take a page", lambda backend: backend.page(name, path, step))

    def configure(self, settings: Mapping[str, Any]) -> None:
        """Adds settings that were not known at the start to the configuration that backends show."""
        kept = json.loads(json.dumps(dict(settings), default=str))
        self._send("take settings", lambda backend: backend.configure(kept))

    def artifact(self, name: str, folder: Path, upload: bool = False) -> None:
        """Records the path, size and hash of a folder in ``artifacts.jsonl`` and as an artifact of W&B.

        Args:
            name: Name of the artifact.
            folder: The folder; all its files are read.
            upload: Upload the files to W&B, instead of only a reference to them.

        Raises:
            UserError: There is no such folder.
        """
        if not folder.is_dir():
            raise UserError(f"no folder {str(folder)!r} to record as an artifact: check the path")
        folder = folder.absolute()
        with self._local(ARTIFACTS):
            about = {"path": str(folder), **contents(folder)}
            row = {"step": self._last_step, "time": round(time.time(), 3), "name": name, **about}
            with (self.out / ARTIFACTS).open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._send("take an artifact", lambda backend: backend.artifact(name, folder, about, upload))

    def finish(self, exit_code: int = 0) -> None:
        """Closes the log and the W&B run, which shows as failed with an exit code other than 0; safe to call twice."""
        with self._local(METRICS):
            self._lines.close()
        senders, self._senders = self._senders, {}
        for name, sender in senders.items():
            if sender.finish(exit_code) and (command := sender.sync_command):
                logger.info("%s ran offline; to upload the run: %s", name, command)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish(0 if kind is None else 1)

    def _write_line(self, values: Mapping[str, Any], step: int) -> bool:
        """Appends a line to the log; False where its step is below the last, so that W&B would drop it."""
        if clash := values.keys() & {"step", "time"}:
            raise ValueError(
                f"a metric cannot be called {min(clash)!r}: every line has that key already; choose another name"
            )
        row = {"step": step, "time": round(time.time(), 3), **values}
        with self._local(METRICS):
            self._lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._lines.flush()
        if step < self._last_step:
            self._warn(
                "steps", f"step {step} comes after step {self._last_step}: W&B would drop it, the local log has it"
            )
            return False
        self._last_step = step
        return True

    def _write_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        path = self.out / "tables" / f"{plain_name(name)}.jsonl"
        with self._local(str(path.relative_to(self.out))):
            path.parent.mkdir(exist_ok=True)
            with path.open("w", encoding="utf-8") as lines:
                for row in rows:
                    cells = plain_values(dict(zip(columns, row)))
                    lines.write(json.dumps(cells, ensure_ascii=False, default=str) + "\n")

    def _send(self, what: str, call: Callable[[Backend], None]) -> None:
        for sender in self._senders.values():
            sender.send(what, call)

    def _complain(self, backend: str, what: str) -> None:
        self._warn(backend, f"{backend} {what}; the local log in {self.out} goes on")

    def _warn(self, about: str, message: str) -> None:
        """Warns the first time only."""
        if about not in self._warned:
            self._warned.add(about)
            logger.warning("%s", message)

    @contextmanager
    def _local(self, name: str) -> Iterator[None]:
        """Warn about an OSError instead of raising it: a full disk must not stop the run at a log line."""
        try:
            yield
        except OSError as error:
            self._warn(name, f"cannot write {self.out / name} ({reason(error)}): lines are being lost")
