"""Experiment tracking: a local log that always works, Weights & Biases beside it when asked for.

The local log is a folder: ``metrics.jsonl`` (one line for each :meth:`Tracker.log` and :meth:`Tracker.histogram`,
flushed at once, so that a killed run keeps every line), ``metrics.summary.json``, ``artifacts.jsonl`` and one
``<name>.jsonl`` for each table. W&B is a guest: it is spoken to from a thread of its own, so that it costs the run
microseconds, whatever it does. When it fails or hangs, at the start, in the middle or at the end, that is said once
through :mod:`logging`, and the run goes on with the local log.

This is the only module that knows W&B, and it imports it only once it is asked for.
"""

from __future__ import annotations

import json
import logging
import math
import netrc
import os
import re
import secrets
import shlex
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO
from urllib.parse import urlsplit

from saepatch.errors import UserError
from saepatch.guests import Courier, Guest, reason
from saepatch.logfiles import contents, cut, number, plain_name, plain_values, read_summary

logger = logging.getLogger(__name__)

SPECS = ("none", "wandb", "wandb:offline", "wandb:online")
INIT_TIMEOUT = 20.0  # seconds; W&B's own 90 are a long silence on a machine without network
FINISH_TIMEOUT = 60.0  # seconds; without a limit, a connection lost on the way holds a finished run for ever
GIT_TIMEOUT = 5.0  # seconds

_METRICS, _SUMMARY, _ARTIFACTS = "metrics.jsonl", "metrics.summary.json", "artifacts.jsonl"


def open_tracker(
    spec: str,
    out: Path,
    *,
    run: str,
    config: Mapping[str, Any],
    project: str = "saepatch",
    resume: bool = False,
    resume_from: int | None = None,
    run_id: str | None = None,
) -> Tracker:
    """Opens the local log in `out` and, if `spec` asks for it, a W&B run beside it.

    Use it as a context manager, so that the run is closed after an exception too::

        with open_tracker("wandb", out, run="layer-3", config=config) as tracker:
            tracker.log({"loss": 0.7}, step=10)

    A resumed W&B run keeps its id: online, the run goes on (where it was killed after its last checkpoint, W&B keeps
    the rows it has, and the resumed run repeats them); offline, another folder of the same run is begun, and one line
    uploads both.

    Args:
        spec: ``none`` for the local log alone; ``wandb`` for W&B in its configured mode, offline where there is no key;
            ``wandb:offline`` and ``wandb:online`` to say which.
        out: Folder of the run; made if need be. W&B's own folder goes to ``out/wandb``.
        run: Name of the run.
        config: What the run was configured with, nested as you like; values that JSON cannot hold go as text. W&B gets
            the versions of the libraries and the commit of the working directory with it.
        project: W&B project.
        resume: Append to the log that is there; otherwise it is begun afresh. A line cut short by a kill is taken out.
        resume_from: The same for a run that goes on from this step: lines of later steps are taken out, too.
        run_id: W&B's id of the run, as :attr:`Tracker.run_id` gave it before; a new one where there is none.

    Raises:
        UserError: The spec is unknown, or `out` cannot be written to. Nothing W&B does is raised.
    """
    if spec not in SPECS:
        raise UserError(f"unknown tracker {spec!r}: use one of {', '.join(SPECS)}")
    resume = resume or resume_from is not None
    try:
        out.mkdir(parents=True, exist_ok=True)
        if resume:
            cut(out / _METRICS, resume_from)
            cut(out / _ARTIFACTS, resume_from)
        else:
            (out / _SUMMARY).unlink(missing_ok=True)
            (out / _ARTIFACTS).unlink(missing_ok=True)
        lines = (out / _METRICS).open("a" if resume else "w", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write the log to {str(out)!r} ({error.strerror or error}): choose another --out"
        ) from error
    if spec == "none":
        return Tracker(out, lines, run_id)
    known, run_id = run_id is not None, run_id or secrets.token_hex(4)
    mode, here = spec.partition(":")[2] or None, Path.cwd()
    settings = json.loads(json.dumps(config, default=str))
    return Tracker(
        out,
        lines,
        run_id,
        lambda: _WandbRun(out, run, {**_surroundings(here), **settings}, project, mode, run_id, known),
    )


class Tracker:
    """Where a run writes its numbers. Made by :func:`open_tracker`.

    Attributes:
        out: Folder of the local log.
        run_id: W&B's id of the run, for a checkpoint to keep; None for a run that never had one.
    """

    def __init__(
        self, out: Path, lines: TextIO, run_id: str | None = None, start: Callable[[], Guest] | None = None
    ) -> None:
        self.out, self.run_id = out, run_id
        self._lines = lines
        self._last_step = 0
        self._summary = read_summary(out / _SUMMARY)
        self._warned: set[str] = set()
        self._courier = Courier(start, self._complain) if start is not None else None

    @property
    def sync_command(self) -> str | None:
        """The shell line that uploads an offline W&B run; None when there is nothing to upload."""
        return self._courier.sync_command if self._courier is not None else None

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Writes one line of metrics.

        Args:
            metrics: Numbers by name: Python's, NumPy's or one-element tensors. NaN and infinities are kept, as text.
            step: Position of the line on the time axis: optimiser steps, tokens, whatever the run counts. It should not
                fall: W&B has no place for a row that goes back (the local log keeps it).

        Raises:
            TypeError, ValueError: A value is not one number, or is called ``step`` or ``time``.
        """
        values = {name: number(value) for name, value in metrics.items()}
        if self._write_line(plain_values(values), step):
            self._tell("log", lambda guest: guest.log(values, step))

    def histogram(self, name: str, counts: Iterable[Any], edges: Iterable[Any], step: int) -> None:
        """Writes a histogram: to ``metrics.jsonl`` a line ``{"step", "time", name: {"counts", "edges"}}``, and to W&B.

        Args:
            name: Name of the histogram.
            counts: How many fall between an edge and the next.
            edges: Edges of the bins, one more than there are counts.
            step: As for :meth:`log`.

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
            self._tell("take a histogram", lambda guest: guest.histogram(name, heights, bounds, step))

    def summarise(self, metrics: Mapping[str, Any]) -> None:
        """Sets headline figures of the run: ``metrics.summary.json``, and W&B's run summary. A later value wins.

        Raises:
            TypeError, ValueError: A value is not one number.
        """
        values = {name: number(value) for name, value in metrics.items()}
        self._summary.update(plain_values(values))
        with self._local(_SUMMARY):
            fresh = self.out / f"{_SUMMARY}.tmp"
            fresh.write_text(json.dumps(self._summary, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            fresh.replace(self.out / _SUMMARY)
        self._tell("take the summary", lambda guest: guest.summarise(values))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Writes a table to ``<name>.jsonl``, one object a row, and to W&B.

        Args:
            name: Name of the table. Writing the same name again replaces the local file.
            columns: Names of the columns.
            rows: Rows, each as long as `columns`.

        Raises:
            ValueError: A row is not as long as the columns are, or the name is that of a part of the log itself.
        """
        for index, row in enumerate(rows):
            if len(row) != len(columns):
                raise ValueError(f"table {name!r}: row {index} has {len(row)} cells for {len(columns)} columns")
        stem = plain_name(name)
        if f"{stem}.jsonl" in (_METRICS, _ARTIFACTS):
            raise ValueError(f"a table cannot be called {stem!r}: that file is part of the log; choose another name")
        kept = [list(row) for row in rows]  # W&B gets them later, and they are the caller's
        with self._local(f"{stem}.jsonl"), (self.out / f"{stem}.jsonl").open("w", encoding="utf-8") as lines:
            for row in kept:
                cells = plain_values(dict(zip(columns, row)))
                lines.write(json.dumps(cells, ensure_ascii=False, default=str) + "\n")
        step = self._last_step
        self._tell("take a table", lambda guest: guest.table(name, list(columns), kept, step))

    def artifact(self, name: str, folder: Path, upload: bool = False) -> None:
        """Notes a folder that the run made, in ``artifacts.jsonl`` and as an artifact of W&B: its path, size and hash.

        Args:
            name: Name of the artifact.
            folder: The folder; it is read through.
            upload: Have W&B keep a copy of the files, not only a reference to them.

        Raises:
            UserError: There is no such folder.
        """
        if not folder.is_dir():
            raise UserError(f"no folder {str(folder)!r} to note as an artifact: check the path")
        folder = folder.absolute()
        with self._local(_ARTIFACTS):
            about = {"path": str(folder), **contents(folder)}
            row = {"step": self._last_step, "time": round(time.time(), 3), "name": name, **about}
            with (self.out / _ARTIFACTS).open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._tell("take an artifact", lambda guest: guest.artifact(name, folder, about, upload))

    def finish(self, exit_code: int = 0) -> None:
        """Closes the log and the W&B run, which shows as failed with an exit code other than 0; safe to call twice."""
        with self._local(_METRICS):
            self._lines.close()
        courier, self._courier = self._courier, None
        if courier is not None and courier.finish(exit_code, FINISH_TIMEOUT) and (command := courier.sync_command):
            logger.info("W&B ran offline; to upload the run: %s", command)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish(0 if kind is None else 1)

    def _write_line(self, values: Mapping[str, Any], step: int) -> bool:
        """Puts a line into the log; False where it goes back, so that W&B has no place for it."""
        if clash := values.keys() & {"step", "time"}:
            raise ValueError(
                f"a metric cannot be called {min(clash)!r}: every line has one already; choose another name"
            )
        row = {"step": step, "time": round(time.time(), 3), **values}
        with self._local(_METRICS):
            self._lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._lines.flush()
        if step < self._last_step:
            self._warn(
                "steps", f"step {step} comes after step {self._last_step}: W&B would drop it, the local log has it"
            )
            return False
        self._last_step = step
        return True

    def _tell(self, what: str, say: Callable[[Guest], None]) -> None:
        if self._courier is not None:
            self._courier.send(what, say)

    def _complain(self, what: str) -> None:
        self._warn("W&B", f"W&B {what}; the local log in {self.out} goes on")

    def _warn(self, about: str, message: str) -> None:
        """Says it the first time only."""
        if about not in self._warned:
            self._warned.add(about)
            logger.warning("%s", message)

    @contextmanager
    def _local(self, name: str) -> Iterator[None]:
        """A full disk must not stop a run either: its checkpoints will say so soon enough."""
        try:
            yield
        except OSError as error:
            self._warn(name, f"cannot write {self.out / name} ({reason(error)}): lines are being lost")


class _WandbRun:
    """One W&B run; every method may raise whatever W&B raises."""

    def __init__(
        self,
        out: Path,
        run: str,
        config: Mapping[str, Any],
        project: str,
        mode: str | None,
        run_id: str,
        resumed: bool,
    ) -> None:
        import wandb

        # What goes wrong is told through logging, once; W&B's own chatter stays out of the terminal.
        settings = wandb.Settings(
            console="off",
            x_disable_stats=True,
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT,
            finish_timeout_raises=True,
            silent=True,
        )
        if mode != "offline" and os.environ.get("WANDB_MODE", "online") == "online" and not _has_key():
            # Asking for one would stop a run that nobody watches.
            logger.warning("W&B has no key (WANDB_API_KEY, or `wandb login`): the run is kept offline")
            mode = "offline"
        self._staging = out.absolute() / "wandb"
        self._run = wandb.init(
            project=project,
            name=run,
            dir=out,
            mode=mode,  # type: ignore[arg-type]
            config=dict(config),
            settings=settings,
            reinit="create_new",
            id=run_id,
            resume="allow" if resumed else None,
        )
        self.sync_command: str | None = None
        if self._run.offline and not self._run.disabled:
            # A resumed run has a folder for each part of it; W&B uploads them as one.
            folders = Path(self._run.dir).parents[1].glob(f"offline-run-*-{run_id}*")
            self.sync_command = shlex.join(["wandb", "sync", *map(str, sorted(folders))])

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def histogram(self, name: str, counts: Sequence[float], edges: Sequence[float], step: int) -> None:
        import numpy as np
        import wandb

        histogram = wandb.Histogram(np_histogram=(np.array(counts), np.array(edges)))
        self._run.log({name: histogram}, step=step)

    def summarise(self, values: Mapping[str, float]) -> None:
        self._run.summary.update(dict(values))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        import wandb

        table = wandb.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)
        with self._staged_with_the_run():
            self._run.log({name: table}, step=step)  # without a step, W&B would move its own on by one

    def artifact(self, name: str, folder: Path, about: Mapping[str, Any], upload: bool) -> None:
        import wandb

        with self._staged_with_the_run():
            artifact = wandb.Artifact(re.sub(r"[^a-zA-Z0-9_.-]+", "_", name), type="folder", metadata=dict(about))
            if upload:
                artifact.add_dir(str(folder))
            else:
                artifact.add_reference(folder.as_uri())
            self._run.log_artifact(artifact)

    def finish(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)

    def abandon(self) -> None:
        # W&B waits for its service when the interpreter exits, without a limit, and offers no other way out of that.
        with suppress(Exception):
            self._run._wl.assert_service()._cleanup()  # type: ignore[union-attr, misc]

    @contextmanager
    def _staged_with_the_run(self) -> Iterator[None]:
        """W&B stages files in the home folder, where an offline run that moves elsewhere leaves them behind."""
        elsewhere = os.environ.get("WANDB_DATA_DIR")
        os.environ.setdefault("WANDB_DATA_DIR", str(self._staging))
        try:
            yield
        finally:
            if elsewhere is None:
                del os.environ["WANDB_DATA_DIR"]


def _has_key() -> bool:
    """Whether W&B could log in without asking: from the environment, its settings or the netrc file."""
    import wandb

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    settings = wandb.Settings()
    if settings.api_key:
        return True
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        found = netrc.netrc(str(path)).authenticators(urlsplit(settings.base_url).netloc)
    except (OSError, netrc.NetrcParseError):
        return False
    return bool(found and found[2])


def _surroundings(folder: Path) -> dict[str, Any]:
    """Versions of the libraries, and the commit that is checked out in the folder, if it is in a git repository."""
    from saepatch.results import versions

    commit = None
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT,
            check=False,
        )
        commit = done.stdout.strip() if done.returncode == 0 else None
    return {"versions": versions(), "git_commit": commit}
