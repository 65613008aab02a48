"""Experiment tracking: a local log that always works, Weights & Biases beside it when asked for.

The local log is a folder: ``metrics.jsonl`` (one line for each :meth:`Tracker.log`, flushed at once, so that a killed
run keeps every line), ``metrics.summary.json`` and one ``<name>.jsonl`` for each table. W&B is a guest: when it fails,
at the start, in the middle or at the end, that is said once through :mod:`logging`, and the run goes on with the local
log.

This is the only module that knows W&B, and it imports it only once it is asked for.
"""

from __future__ import annotations

import json
import logging
import math
import netrc
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO
from urllib.parse import urlsplit

from saepatch.errors import UserError

logger = logging.getLogger(__name__)

SPECS = ("none", "wandb", "wandb:offline", "wandb:online")
INIT_TIMEOUT = 20.0  # seconds; W&B's own 90 are a long silence on a machine without network
FINISH_TIMEOUT = 60.0  # seconds; without a limit, a connection lost on the way holds a finished run for ever


def open_tracker(
    spec: str, out: Path, *, run: str, config: Mapping[str, Any], project: str = "saepatch", resume: bool = False
) -> Tracker:
    """Opens the local log in `out` and, if `spec` asks for it, a W&B run beside it.

    Use it as a context manager, so that the run is closed after an exception too::

        with open_tracker("wandb", out, run="layer-3", config=config) as tracker:
            tracker.log({"loss": 0.7}, step=10)

    Args:
        spec: ``none`` for the local log alone; ``wandb`` for W&B in its configured mode, offline where there is no key;
            ``wandb:offline`` and ``wandb:online`` to say which.
        out: Folder of the run; made if need be. W&B's own folder goes to ``out/wandb``.
        run: Name of the run.
        config: What the run was configured with, nested as you like; values that JSON cannot hold go as text.
        project: W&B project.
        resume: Append to the log that is there; otherwise it is begun afresh.

    Raises:
        UserError: The spec is unknown, or `out` cannot be written to. Nothing W&B does is raised.
    """
    if spec not in SPECS:
        raise UserError(f"unknown tracker {spec!r}: use one of {', '.join(SPECS)}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lines = (out / "metrics.jsonl").open("a" if resume else "w", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write the log to {str(out)!r} ({error.strerror or error}): choose another --out"
        ) from error
    tracker = Tracker(out, lines)
    if spec != "none":
        mode = spec.partition(":")[2] or None
        tracker._invite(lambda: _WandbRun(out, run, config, project, mode))
    return tracker


class Tracker:
    """Where a run writes its numbers. Made by :func:`open_tracker`."""

    def __init__(self, out: Path, lines: TextIO) -> None:
        self.out = out
        self._lines = lines
        self._guest: _WandbRun | None = None
        self._last_step = 0
        self._summary: dict[str, Any] = {}
        self._warned: set[str] = set()

    @property
    def sync_command(self) -> str | None:
        """The shell line that uploads an offline W&B run; None when there is nothing to upload."""
        return self._guest.sync_command if self._guest else None

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Writes one line of metrics.

        Args:
            metrics: Numbers by name: Python's, NumPy's or one-element tensors. NaN and infinities are kept, as text.
            step: Position of the line on the time axis: optimiser steps, tokens, whatever the run counts. It should not
                fall: W&B has no place for a row that goes back (the local log keeps it).

        Raises:
            TypeError, ValueError: A value is not one number, or is called ``step`` or ``time``.
        """
        values = {name: _number(value) for name, value in metrics.items()}
        if clash := values.keys() & {"step", "time"}:
            raise ValueError(
                f"a metric cannot be called {min(clash)!r}: every line has one already; choose another name"
            )
        row = {"step": step, "time": round(time.time(), 3), **_plain_values(values)}
        with self._local("metrics.jsonl"):
            self._lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._lines.flush()
        if step < self._last_step:
            self._warn(
                "steps", f"step {step} comes after step {self._last_step}: W&B would drop it, the local log has it"
            )
            return
        self._last_step = step
        self._tell("log", lambda guest: guest.log(values, step))

    def summarise(self, metrics: Mapping[str, Any]) -> None:
        """Sets headline figures of the run: ``metrics.summary.json``, and W&B's run summary. A later value wins.

        Raises:
            TypeError, ValueError: A value is not one number.
        """
        values = {name: _number(value) for name, value in metrics.items()}
        self._summary.update(_plain_values(values))
        with self._local("metrics.summary.json"):
            fresh = self.out / "metrics.summary.json.tmp"
            fresh.write_text(json.dumps(self._summary, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            fresh.replace(self.out / "metrics.summary.json")
        self._tell("take the summary", lambda guest: guest.summarise(values))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Writes a table to ``<name>.jsonl``, one object a row, and to W&B.

        Args:
            name: Name of the table. Writing the same name again replaces the local file.
            columns: Names of the columns.
            rows: Rows, each as long as `columns`.

        Raises:
            ValueError: A row is not as long as the columns are, or the name is that of the log itself.
        """
        for index, row in enumerate(rows):
            if len(row) != len(columns):
                raise ValueError(f"table {name!r}: row {index} has {len(row)} cells for {len(columns)} columns")
        stem = re.sub(r"[^\w.-]+", "_", name).strip(".") or "table"
        if stem == "metrics":
            raise ValueError("a table cannot be called 'metrics': that file is the log; choose another name")
        cells = [_plain_values(dict(zip(columns, row))) for row in rows]
        with self._local(f"{stem}.jsonl"), (self.out / f"{stem}.jsonl").open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in cells)
        self._tell("take a table", lambda guest: guest.table(name, columns, rows, self._last_step))

    def finish(self) -> None:
        """Closes the log and the W&B run; safe to call twice."""
        with self._local("metrics.jsonl"):
            self._lines.close()
        self._drop_guest()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._guest is not None and kind is not None:
            self._guest.exit_code = 1  # so that W&B shows the run as failed
        self.finish()

    def _invite(self, start: Callable[[], _WandbRun]) -> None:
        try:
            self._guest = start()
        except Exception as error:
            self._complain("could not start", error)

    def _tell(self, what: str, say: Callable[[_WandbRun], None]) -> None:
        """Passes a call on to W&B; after a failure there is no second one."""
        if self._guest is None:
            return
        try:
            say(self._guest)
        except Exception as error:
            self._complain(f"could not {what}", error)
            self._drop_guest()

    def _drop_guest(self) -> None:
        guest, self._guest = self._guest, None
        if guest is None:
            return
        try:
            guest.finish()
        except Exception as error:
            self._complain("did not finish cleanly", error)
        if guest.sync_command:
            logger.info("W&B ran offline; to upload the run: %s", guest.sync_command)

    def _complain(self, what: str, error: Exception) -> None:
        self._warn("W&B", f"W&B {what} ({_reason(error)}); the local log in {self.out} goes on")

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
            self._warn(name, f"cannot write {self.out / name} ({_reason(error)}): lines are being lost")


class _WandbRun:
    """One W&B run; every method may raise whatever W&B raises."""

    def __init__(self, out: Path, run: str, config: Mapping[str, Any], project: str, mode: str | None) -> None:
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
        self.exit_code = 0
        self._staging = out.absolute() / "wandb"
        self._run = wandb.init(
            project=project,
            name=run,
            dir=out,
            mode=mode,  # type: ignore[arg-type]
            config=json.loads(json.dumps(config, default=str)),
            settings=settings,
            reinit="create_new",
        )
        self.sync_command: str | None = None
        if self._run.offline and not self._run.disabled:
            self.sync_command = f"wandb sync {shlex.quote(str(Path(self._run.dir).parent))}"

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def summarise(self, values: Mapping[str, float]) -> None:
        self._run.summary.update(dict(values))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        import wandb

        table = wandb.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)
        # W&B stages a table in the home folder, where an offline run that moves to another machine leaves it behind.
        elsewhere = os.environ.get("WANDB_DATA_DIR")
        os.environ.setdefault("WANDB_DATA_DIR", str(self._staging))
        try:
            self._run.log({name: table}, step=step)  # without a step, W&B would move its own on by one
        finally:
            if elsewhere is None:
                del os.environ["WANDB_DATA_DIR"]

    def finish(self) -> None:
        self._run.finish(exit_code=self.exit_code)


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


def _number(value: Any) -> float:
    """The value as one float; integers stay what they are."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    return float(value)


def _plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can hold: a float that is not finite becomes text that ``float()`` reads back."""
    return {
        name: ("NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity")
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for name, value in values.items()
    }


def _reason(error: Exception) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
