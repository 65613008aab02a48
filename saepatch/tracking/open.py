"""Experiment tracking: a local log that always works; optionally Weights & Biases and trackio.

The local log is a folder: ``metrics.jsonl`` (one line for each `Tracker.log` and `Tracker.histogram`,
flushed at once, so that a killed run keeps every line), ``metrics.summary.json``, ``artifacts.jsonl``, one
``tables/NAME.jsonl`` for each table and curve, and ``figures/``. Every other backend is called from its own thread, so
that a call costs the run microseconds. A backend that fails or hangs, at any time, is reported once through `logging`,
and the run goes on with the local log.
"""

from __future__ import annotations

import json
import secrets
import subprocess
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from saepatch.errors import UserError
from saepatch.records.secrets import redacted_values
from saepatch.tracking.backends import Backend, RunDescription
from saepatch.tracking.logfiles import ARTIFACTS, METRICS, SUMMARY, cut
from saepatch.tracking.sender import Starter
from saepatch.tracking.tracker import Tracker

__all__ = ["SPECS", "RunDescription", "Tracker", "open_tracker", "read_spec"]

SPECS = ("none", "wandb", "wandb:offline", "wandb:online", "trackio")
GIT_TIMEOUT = 5.0  # seconds


def open_tracker(spec: str, about: RunDescription, *, resume: bool = False, resume_from: int | None = None) -> Tracker:
    """Opens the local log in the run's folder and the backends named in `spec`.

    Use it as a context manager, so that the run is closed after an exception too::

        with open_tracker("wandb", RunDescription(out, run="layer-3", config=config)) as tracker:
            tracker.log({"loss": 0.7}, step=10)

    A resumed W&B run keeps its id: online, the run continues (rows logged after the last checkpoint before a kill stay,
    and the resumed run repeats them); offline, a second folder of the same run is started, and one command uploads
    both.

    Args:
        spec: ``none`` for the local log alone; ``wandb`` for W&B in its configured mode, offline where there is no key;
            ``wandb:offline`` and ``wandb:online`` to choose the mode; ``trackio`` for its local dashboard; or both,
            separated by a comma.
        about: The run; with a `run_id`, an existing run of the backends.
        resume: Append to the existing log instead of replacing it. A line truncated by a kill is removed.
        resume_from: Append for a run that continues from this step: lines of later steps are removed as well.

    Raises:
        UserError: The spec is unknown, or the folder cannot be written to. Backend failures are never raised.
    """
    wanted = read_spec(spec)
    lines = _open_log(about.out, resume or resume_from is not None, resume_from)
    if not wanted:
        return Tracker(about.out, lines, about.run_id)
    resumed = about.run_id is not None
    about = replace(
        about,
        config={**_surroundings(Path.cwd()), **redacted_values(json.loads(json.dumps(about.config, default=str)))},
        run_id=about.run_id or secrets.token_hex(4),
        group=about.group or about.out.absolute().parent.name,
    )
    backends: dict[str, Starter] = {}
    for tracker in wanted:
        if tracker == "trackio":
            backends["trackio"] = Starter(partial(_start_trackio, about, resumed))
        else:
            mode = tracker.partition(":")[2] or None
            backends["W&B"] = Starter(partial(_start_wandb, about, resumed, mode), _give_up_wandb)
    return Tracker(about.out, lines, about.run_id, backends)


def read_spec(spec: str) -> tuple[str, ...]:
    """The backends that `--track` names, separated by commas.

    Raises:
        UserError: a name is unknown, or a backend is named twice.
    """
    wanted = [name.strip() for name in spec.split(",")]
    if unknown := [name for name in wanted if name not in SPECS]:
        raise UserError(
            f"unknown tracker {unknown[0]!r}: use one of {', '.join(SPECS)}, or several, separated by commas"
        )
    named = tuple(name for name in wanted if name != "none")
    if len({name.partition(":")[0] for name in named}) < len(named):
        raise UserError(f"track {spec!r} names a tracker twice: name each once")
    return named


def _open_log(out: Path, resume: bool, resume_from: int | None) -> TextIO:
    try:
        out.mkdir(parents=True, exist_ok=True)
        if resume:
            cut(out / METRICS, resume_from)
            cut(out / ARTIFACTS, resume_from)
        else:
            (out / SUMMARY).unlink(missing_ok=True)
            (out / ARTIFACTS).unlink(missing_ok=True)
        return (out / METRICS).open("a" if resume else "w", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write the log to {str(out)!r} ({error.strerror or error}): choose another --out"
        ) from error


# Imported in the backend's thread, and only on demand: importing W&B takes a second.
def _start_wandb(about: RunDescription, resumed: bool, mode: str | None) -> Backend:
    from saepatch.tracking.wandb import WandbRun

    return WandbRun(about, resumed, mode)


def _give_up_wandb() -> None:
    from saepatch.tracking.wandb import leave_service

    leave_service()


def _start_trackio(about: RunDescription, resumed: bool) -> Backend:
    from saepatch.tracking.trackio import TrackioRun

    return TrackioRun(about, resumed)


def _surroundings(folder: Path) -> dict[str, Any]:
    """Versions of the libraries, and the commit checked out in the folder, if it is in a git repository."""
    from saepatch.records.provenance import versions

    commit = None
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],  # noqa: S607 – the git of the PATH
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT,
            check=False,
        )
        commit = done.stdout.strip() if done.returncode == 0 else None
    return {"versions": versions(), "git_commit": commit}
