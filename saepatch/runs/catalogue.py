"""Run folders: the command that ran and its results, read from their JSON. Light: no model, no torch."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from saepatch.errors import UserError, reason_of
from saepatch.records.documents import load_yaml, parse_json
from saepatch.records.tables import text_table
from saepatch.runs.kinds import SUMMARIES, Kind, kind_of

log = logging.getLogger(__name__)


def read_json(path: Path) -> Any:
    """Read a JSON file of a run.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): {_remedy(path.parent)}") from error
    except ValueError as error:
        raise UserError(f"{path} is not text ({error}): {DAMAGED}") from error
    return parse_json(text, str(path), f": {DAMAGED}")


DAMAGED = "it was damaged; run again or merge again"


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Context for code that uses the content of a run's files: turns errors from damaged files into a UserError.

    Raises:
        UserError: a value is missing or of another kind than saepatch writes.
    """
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        log.debug("while reading %s", folder, exc_info=True)
        raise UserError(
            f"the files of the run in {str(folder)!r} are damaged or of another version ({reason_of(error)}): merge it "
            "again, or run it again"
        ) from error


def _remedy(folder: Path) -> str:
    """What to do about a folder without a summary: the command that resumes its run, if one was started."""
    for record in _started(folder):
        with suppress(OSError, ValueError, KeyError, TypeError):
            work = json.loads(record.read_text(encoding="utf-8"))["work"]
            return f"the run is not finished; resume it with saepatch {work} --config {record.with_name('config.yaml')}"
    if (experiment := started_experiment(folder)) is not None:
        return f"the {experiment} experiment in it is not finished; give its command again to resume it"
    return "give the folder of a finished run"


MEASUREMENTS = "measurements.jsonl"  # in the folder of an experiment: see `saepatch.runs.measurements`


def started_experiment(folder: Path) -> str | None:
    """The name of the experiment whose measurements are in a folder; None where there are none."""
    with suppress(OSError, ValueError), (folder / MEASUREMENTS).open(encoding="utf-8") as file:
        first = json.loads(file.readline())
        return str(first.get("experiment", "")) if isinstance(first, dict) else None
    return None


def _started(root: Path) -> list[Path]:
    """Records of all runs started in a folder or below it."""
    return sorted([*root.rglob("parts/shard-*/run.json"), *root.rglob("answers/**/run.json")])


@dataclass(frozen=True)
class RunFolder:
    """A finished run: its folder and its summary."""

    path: Path
    summary: dict[str, Any]

    @property
    def kind(self) -> Kind:
        return kind_of(self.summary)

    @property
    def work(self) -> str:
        """The command or experiment that ran; empty for an unknown kind of summary."""
        return self.kind.name

    @property
    def settings(self) -> dict[str, Any]:
        """Settings from the summary, or else from `config.yaml`."""
        own = self.summary.get("settings") or self.summary.get("config")
        if own is None and self.kind.name and (self.path / "config.yaml").exists():
            with suppress(UserError):
                own = load_yaml(self.path / "config.yaml")
        return dict(own) if isinstance(own, dict) else {}

    @property
    def finished(self) -> str:
        """When the summary was written, in local time."""
        written = (self.path / self.kind.file).stat().st_mtime
        return datetime.fromtimestamp(written).strftime("%Y-%m-%d %H:%M")

    @property
    def model(self) -> str:
        model = self.summary.get("model", "")
        return str(model.get("name", "") if isinstance(model, dict) else model)

    @property
    def task(self) -> str:
        settings = self.settings
        if prompts := settings.get("prompts") or settings.get("requests"):
            return Path(prompts).name if isinstance(prompts, str) else ""
        pairs = settings.get("pairs")
        return pairs if isinstance(pairs, str) and pairs else "inline" if settings.get("clean") else ""

    @property
    def count(self) -> int | None:
        """Number of pairs or prompts; None where the summary has none."""
        if "conditions" in self.summary:
            return max((row["prompts"] for row in self.summary["conditions"]), default=None)
        count = self.summary.get("pairs")
        return count if isinstance(count, int) else None

    @property
    def hashes(self) -> dict[str, str]:
        """Hashes of the run's dictionaries, by site."""
        return {site: each["hash"] for site, each in (self.summary.get("dictionaries") or {}).items()}

    @property
    def sites(self) -> str:
        named = ", ".join(self.hashes) or str(self.settings.get("site", ""))
        return named or "all"

    @property
    def headline(self) -> str:
        """The main result in a few words."""
        return self.kind.headline(self.summary)


def read_run(path: Path) -> RunFolder:
    """Read the finished run in a folder.

    Raises:
        UserError: it holds no summary that can be read.
    """
    file = next((path / name for name in SUMMARIES if (path / name).exists()), path / SUMMARIES[0])
    summary = read_json(file)
    if not isinstance(summary, dict):
        raise UserError(f"{file} holds no summary of a run: give the folder of a finished run")
    return RunFolder(path, summary)


def find_runs(root: Path) -> list[RunFolder]:
    """All finished runs in a folder and below it, sorted by path; unreadable ones are left out.

    Raises:
        UserError: there is no such folder.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {str(root)!r}: give the folder that holds your runs")
    runs = []
    for folder in sorted({path.parent for name in SUMMARIES for path in root.rglob(name)}):
        with suppress(UserError), reading(folder):
            run = read_run(folder)
            _ = (
                run.model,
                run.task,
                run.count,
                run.sites,
                run.headline,
                run.finished,
            )  # so that an unreadable value shows here
            runs.append(run)
    return runs


def unfinished(root: Path, runs: Sequence[RunFolder]) -> list[Path]:
    """Folders of runs that have parts or measurements and no summary yet."""
    done = {run.path for run in runs}
    started = {next(f.parent for f in path.parents if f.name in ("parts", "answers")) for path in _started(root)}
    experiments = {path.parent for path in root.rglob(MEASUREMENTS) if started_experiment(path.parent) is not None}
    return sorted((started | experiments) - done)


def runs_table(root: Path) -> str:
    """Table of the runs in a folder, one line each."""
    runs = find_runs(root)
    head = ["run", "command", "model", "pairs", "sites", "finished", "headline"]
    rows = []
    for run in runs:
        pairs = run.task if run.count is None else f"{run.task} × {run.count}"
        headline = _short(run.headline, 200)
        rows.append([str(run.path), run.work or "?", run.model, pairs, _short(run.sites), run.finished, headline])
    for path in unfinished(root, runs):
        rows.append([str(path), started_experiment(path) or "", "", "", "", "not finished", ""])
    return text_table(head, rows, left=len(head)) if rows else f"no runs in {root}"


def runs_facts(root: Path) -> dict[str, Any]:
    """The runs in a folder as JSON values."""
    runs = find_runs(root)
    return {
        "runs": [
            {
                "path": str(run.path),
                "command": run.work,
                "model": run.model,
                "task": run.task,
                "sites": run.sites,
                "finished": run.finished,
                "headline": run.headline,
                "settings": run.settings,
            }
            for run in runs
        ],
        "unfinished": [str(path) for path in unfinished(root, runs)],
    }


def _short(text: str, width: int = 28) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
