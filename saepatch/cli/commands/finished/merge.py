"""`saepatch merge`, and the report of a finished run."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from saepatch.cli.parser import CommandResult
from saepatch.settings.finished.merge import MergeConfig

if TYPE_CHECKING:
    from saepatch.tracking.open import Tracker


def merge(config: MergeConfig) -> CommandResult:
    from saepatch.runs.catalogue import read_json, reading
    from saepatch.tracking.open import RunDescription, open_tracker

    out = Path(config.out)
    if config.track == "none":
        with reading(out):
            return merge_and_report(out, None)
    about = RunDescription(out, run=f"merge-{out.name}", config=asdict(config), job_type="merge")
    with open_tracker(config.track, about) as tracker, reading(out):
        result = merge_and_report(out, tracker)
        tracker.configure(read_json(out / "summary.json")["settings"])
    return result


def merge_and_report(out: Path, tracker: "Tracker | None", before: Callable[[], None] = lambda: None) -> CommandResult:
    """Merge a run's parts, write its report, and log both to a tracker."""
    from saepatch.pages import track_run, write_report
    from saepatch.runs.merge import merge_run

    table = merge_run(out).table()
    before()
    page = write_report(out)
    if tracker is not None:
        track_run(out, page, tracker)
    return run_result(out, table)


def run_result(out: Path, table: str) -> CommandResult:
    """Result of a finished run: its table, its summary and the paths of its files."""
    from saepatch.runs.catalogue import read_json

    files = {"Report": "report.html", "Figures": "summary.json", "Rows": "results.parquet", "Pairs": "pairs.parquet"}
    files |= {"Circuit": "circuit.json", "Delta": "delta.safetensors"}
    paths = "   ".join(f"{name}: {out / file}" for name, file in files.items() if (out / file).exists())
    facts = {"out": str(out), "report": str(out / "report.html"), "summary": read_json(out / "summary.json")}
    return CommandResult(f"{table}\n{paths}", facts)
