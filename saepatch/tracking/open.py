"""Experiment tracking: a local log that always works; Weights & Biases and trackio beside it when asked for.

The local log is a folder: ``metrics.jsonl`` (one line for each `Tracker.log` and `Tracker.histogram`,
flushed at once, so that a killed run keeps every line), ``metrics.summary.json``, ``artifacts.jsonl``, one
``tables/NAME.jsonl`` for each table and curve, and ``figures/``. The others are guests: each is spoken to from a thread
of its own, so that it costs the run microseconds, whatever it does. When one fails or hangs, at the start, in the
middle or at the end, that is said once through `logging`, and the run goes on with the local log.

This is the only module that knows W&B, and it imports it only once it is asked for.
"""

from __future__ import annotations

import json
import logging
import netrc
import os
import re
import secrets
import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from saepatch.errors import UserError
from saepatch.tracking.backends import About, Guest
from saepatch.tracking.logfiles import ARTIFACTS, METRICS, SUMMARY, cut
from saepatch.tracking.tracker import FINISH_TIMEOUT, Tracker

if TYPE_CHECKING:
    from saepatch.report import Chart

__all__ = ["SPECS", "Tracker", "open_tracker", "read_spec"]

logger = logging.getLogger(__name__)

SPECS = ("none", "wandb", "wandb:offline", "wandb:online", "trackio")
INIT_TIMEOUT = 20.0  # seconds; W&B's own 90 are a long silence on a machine without network
GIT_TIMEOUT = 5.0  # seconds


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
    group: str | None = None,
    job_type: str | None = None,
    axes: Mapping[str, str] | None = None,
) -> Tracker:
    """Opens the local log in `out` and, if `spec` asks for it, guests beside it.

    Use it as a context manager, so that the run is closed after an exception too::

        with open_tracker("wandb", out, run="layer-3", config=config) as tracker:
            tracker.log({"loss": 0.7}, step=10)

    A resumed W&B run keeps its id: online, the run goes on (where it was killed after its last checkpoint, W&B keeps
    the rows it has, and the resumed run repeats them); offline, another folder of the same run is begun, and one line
    uploads both.

    Args:
        spec: ``none`` for the local log alone; ``wandb`` for W&B in its configured mode, offline where there is no key;
            ``wandb:offline`` and ``wandb:online`` to say which; ``trackio`` for its local dashboard; or both, with a
            comma between.
        out: Folder of the run; made if need be. W&B's own folder goes to ``out/wandb``.
        run: Name of the run.
        config: What the run was configured with, nested as you like; values that JSON cannot hold go as text. W&B gets
            the versions of the libraries and the commit of the working directory with it.
        project: Project of W&B and trackio.
        resume: Append to the log that is there; otherwise it is begun afresh. A line cut short by a kill is taken out.
        resume_from: The same for a run that goes on from this step: lines of later steps are taken out, too.
        run_id: Guests' id of the run, as `Tracker.run_id` gave it before; a new one where there is none.
        group: Runs of one study share it, so that W&B lines them up; by default the folder that `out` is in.
        job_type: What kind of run of the study this is: train, patch, steer.
        axes: What steps count, by the names of metrics (``{"*": "tokens"}``): W&B draws these over it.

    Raises:
        UserError: The spec is unknown, or `out` cannot be written to. Nothing a guest does is raised.
    """
    wanted = read_spec(spec)
    resume = resume or resume_from is not None
    try:
        out.mkdir(parents=True, exist_ok=True)
        if resume:
            cut(out / METRICS, resume_from)
            cut(out / ARTIFACTS, resume_from)
        else:
            (out / SUMMARY).unlink(missing_ok=True)
            (out / ARTIFACTS).unlink(missing_ok=True)
        lines = (out / METRICS).open("a" if resume else "w", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write the log to {str(out)!r} ({error.strerror or error}): choose another --out"
        ) from error
    if not wanted:
        return Tracker(out, lines, run_id)
    known, run_id = run_id is not None, run_id or secrets.token_hex(4)
    settings = {**_surroundings(Path.cwd()), **json.loads(json.dumps(config, default=str))}
    about = About(
        out, run, settings, project, run_id, known, group or out.absolute().parent.name, job_type, dict(axes or {})
    )
    guests: dict[str, Callable[[], Guest]] = {}
    for one in wanted:
        if one == "trackio":
            guests["trackio"] = lambda: _trackio(about)
        else:
            guests["W&B"] = partial(lambda mode: _WandbRun(about, mode), one.partition(":")[2] or None)
    return Tracker(out, lines, run_id, guests, FINISH_TIMEOUT)


def read_spec(spec: str) -> tuple[str, ...]:
    """The guests that a `--track` names, none or several with commas between.

    Raises:
        UserError: one is unknown, or two are of a kind.
    """
    wanted = [one.strip() for one in spec.split(",")]
    if unknown := [one for one in wanted if one not in SPECS]:
        raise UserError(
            f"unknown tracker {unknown[0]!r}: use one of {', '.join(SPECS)}, or several with commas between"
        )
    named = tuple(one for one in wanted if one != "none")
    if len({one.partition(":")[0] for one in named}) < len(named):
        raise UserError(f"trackers {spec!r} name one of them twice: name each once")
    return named


def _trackio(about: About) -> Guest:
    from saepatch.tracking.trackio import TrackioRun

    return TrackioRun(about)


class _WandbRun:
    """One W&B run; every method may raise whatever W&B raises."""

    def __init__(self, about: About, mode: str | None) -> None:
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
            resume="allow" if about.resumed else None,
            group=about.group,
            job_type=about.job_type,
        )
        self._axes = about.axes
        self._step: int | None = None  # of the run, whose row is open
        # W&B's own step of that row, and its next one: a run that goes on has steps already, and none may go back.
        self._at = self._free = int(getattr(self._run, "step", 0) or 0)
        for axis in dict.fromkeys(self._axes.values()):
            self._run.define_metric(axis, hidden=True)
        for metrics, axis in self._axes.items():
            self._run.define_metric(metrics, step_metric=axis)
        self.sync_command: str | None = None
        if self._run.offline and not self._run.disabled:
            # A resumed run has a folder for each part of it; W&B uploads them as one.
            folders = Path(self._run.dir).parents[1].glob(f"offline-run-*-{about.run_id}*")
            self.sync_command = shlex.join(["wandb", "sync", *map(str, sorted(folders))])

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**dict.fromkeys(self._axes.values(), step), **values}, step=self._row(step))

    def curve(self, name: str, x: str, points: Sequence[tuple[float, Mapping[str, float]]]) -> None:
        self._run.define_metric(x, hidden=True)
        self._run.define_metric(f"{name}/*", step_metric=x)
        for place, values in points:  # a row each: the axis is another than the run's
            self._run.log({**values, x: place}, step=self._free)
            self._free, self._step = self._free + 1, None

    def histogram(self, name: str, counts: Sequence[float], edges: Sequence[float], step: int) -> None:
        import numpy as np
        import wandb

        histogram = wandb.Histogram(np_histogram=(np.array(counts), np.array(edges)))
        self._run.log({name: histogram}, step=self._row(step))

    def summarise(self, values: Mapping[str, float]) -> None:
        self._run.summary.update(dict(values))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        import wandb

        table = wandb.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)
        with self._staged_with_the_run():
            self._run.log({name: table}, step=self._row(step))  # without a step, W&B would move its own on by one

    def _row(self, step: int) -> int:
        """W&B's own step for a step of the run: the same, or the next one where a curve's rows have gone past it.

        W&B drops a row that goes back, and what is logged at one of its steps twice is one row.
        """
        if step != self._step:
            self._step, self._at = step, max(step, self._free)
            self._free = self._at + 1
        return self._at

    def figure(self, name: str, chart: Chart, step: int) -> None:
        import wandb

        from saepatch.tracking.plots import plotly_figure, svg_page

        figure = plotly_figure(chart)
        with self._staged_with_the_run():
            media = wandb.Plotly(figure) if figure is not None else wandb.Html(svg_page(chart))
            self._run.log({name: media}, step=self._row(step))

    def page(self, name: str, path: Path, step: int) -> None:
        import wandb

        with self._staged_with_the_run():
            self._run.log({name: wandb.Html(path.read_text(encoding="utf-8"), inject=False)}, step=self._row(step))

    def configure(self, settings: Mapping[str, Any]) -> None:
        self._run.config.update(dict(settings), allow_val_change=True)

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
