"""Experiment tracking: a local log that always works; Weights & Biases and trackio beside it when asked for.

The local log is a folder: ``metrics.jsonl`` (one line for each `Tracker.log` and `Tracker.histogram`,
flushed at once, so that a killed run keeps every line), ``metrics.summary.json``, ``artifacts.jsonl``, one
``tables/NAME.jsonl`` for each table and curve, and ``figures/``. Each backend beside it is called from a thread of its
own, so that it costs the run microseconds, whatever it does. One that fails or hangs, at the start, in the middle or at
the end, is reported once through `logging`, and the run goes on with the local log.
"""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from saepatch.errors import UserError
from saepatch.tracking.backends import Backend, RunDescription
from saepatch.tracking.logfiles import ARTIFACTS, METRICS, SUMMARY, cut
from saepatch.tracking.tracker import Tracker

__all__ = ["SPECS", "RunDescription", "Tracker", "open_tracker", "read_spec"]

SPECS = ("none", "wandb", "wandb:offline", "wandb:online", "trackio")
GIT_TIMEOUT = 5.0  # seconds


def open_tracker(spec: str, about: RunDescription, *, resume: bool = False, resume_from: int | None = None) -> Tracker:
    """Opens the local log in the run's folder and, if `spec` asks for them, backends beside it.

    Use it as a context manager, so that the run is closed after an exception too::

        with open_tracker("wandb", RunDescription(out, run="layer-3", config=config)) as tracker:
            tracker.log({"loss": 0.7}, step=10)

    A resumed W&B run keeps its id: online, the run goes on (where it was killed after its last checkpoint, W&B keeps
    the rows it has, and the resumed run repeats them); offline, another folder of the same run is begun, and one line
    uploads both.

    Args:
        spec: ``none`` for the local log alone; ``wandb`` for W&B in its configured mode, offline where there is no key;
            ``wandb:offline`` and ``wandb:online`` to say which; ``trackio`` for its local dashboard; or both, with a
            comma between.
        about: The run; with a `run_id`, one that backends know already.
        resume: Append to the log that is there; otherwise it is begun afresh. A line cut short by a kill is taken out.
        resume_from: The same for a run that goes on from this step: lines of later steps are taken out, too.

    Raises:
        UserError: The spec is unknown, or the folder cannot be written to. No failure of a backend is raised.
    """
    wanted = read_spec(spec)
    lines = _open_log(about.out, resume or resume_from is not None, resume_from)
    if not wanted:
        return Tracker(about.out, lines, about.run_id)
    resumed = about.run_id is not None
    about = replace(
        about,
        config={**_surroundings(Path.cwd()), **json.loads(json.dumps(about.config, default=str))},
        run_id=about.run_id or secrets.token_hex(4),
        group=about.group or about.out.absolute().parent.name,
    )
    backends: dict[str, Callable[[], Backend]] = {}
    for tracker in wanted:
        if tracker == "trackio":
            backends["trackio"] = partial(_start_trackio, about, resumed)
        else:
            backends["W&B"] = partial(_start_wandb, about, resumed, tracker.partition(":")[2] or None)
    return Tracker(about.out, lines, about.run_id, backends)


def read_spec(spec: str) -> tuple[str, ...]:
    """The backends that a `--track` names, none or several with commas between.

    Raises:
        UserError: one is unknown, or two are of a kind.
    """
    wanted = [name.strip() for name in spec.split(",")]
    if unknown := [name for name in wanted if name not in SPECS]:
        raise UserError(
            f"unknown tracker {unknown[0]!r}: use one of {', '.join(SPECS)}, or several with commas between"
        )
    named = tuple(name for name in wanted if name != "none")
    if len({name.partition(":")[0] for name in named}) < len(named):
        raise UserError(f"trackers {spec!r} name one of them twice: name each once")
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


# Imported in the thread of the backend, and only where it was asked for: W&B takes a second.
def _start_wandb(about: RunDescription, resumed: bool, mode: str | None) -> Backend:
    from saepatch.tracking.wandb import WandbRun

    return WandbRun(about, resumed, mode)


def _start_trackio(about: RunDescription, resumed: bool) -> Backend:
    from saepatch.tracking.trackio import TrackioRun

    return TrackioRun(about, resumed)


def _surroundings(folder: Path) -> dict[str, Any]:
    """Versions of the libraries, and the commit that is checked out in the folder, if it is in a git repository."""
    from saepatch.records.provenance import versions

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
