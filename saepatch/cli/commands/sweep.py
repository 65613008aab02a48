"""Commands that run in parts and shards: `saepatch patch`, `attribute`, `circuit`, `edit` and `restore`."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from saepatch.cli.commands.finished.merge import merge_and_report, run_result
from saepatch.cli.parser import CommandResult
from saepatch.settings.circuit import CircuitConfig
from saepatch.settings.edit import EditConfig
from saepatch.settings.restore import RestoreConfig
from saepatch.settings.sweeps import SweepConfig

if TYPE_CHECKING:
    from saepatch.runs.commands.answers import Answers
    from saepatch.runs.commands.circuits import CircuitRun
    from saepatch.runs.commands.fact_edits import FactEdits
    from saepatch.runs.commands.restorations import RestorePlan
    from saepatch.runs.commands.sweeps import Sweep
    from saepatch.runs.driver import Finished
    from saepatch.tracking.open import Tracker


def sweep(config: SweepConfig) -> CommandResult:
    from saepatch.pages.gather import try_reading
    from saepatch.runs.commands.sweeps import run_sweep

    results: list[CommandResult] = []

    def conclude(work: "Sweep", tracker: "Tracker") -> None:
        out = Path(config.out)
        results.append(merge_and_report(out, tracker, lambda: try_reading(work, out)))

    return _finished(run_sweep(config, conclude), results)


def circuit(config: CircuitConfig) -> CommandResult:
    from saepatch.pages.commands.circuit import try_reading_circuit
    from saepatch.runs.commands.circuits import run_circuit

    results: list[CommandResult] = []

    def conclude(work: "CircuitRun", tracker: "Tracker") -> None:
        out = Path(config.out)
        results.append(merge_and_report(out, tracker, lambda: try_reading_circuit(work, out)))

    return _finished(run_circuit(config, conclude), results)


def edit(config: EditConfig) -> CommandResult:
    from saepatch.runs.commands.fact_edits import run_fact_edits

    results: list[CommandResult] = []

    def conclude(work: "FactEdits", tracker: "Tracker") -> None:
        results.append(merge_and_report(Path(config.out), tracker))

    return _finished(run_fact_edits(config, conclude), results)


def restore(config: RestoreConfig) -> CommandResult:
    from saepatch.pages.commands.answered import show_answers
    from saepatch.runs.commands.restorations import run_restore

    results: list[CommandResult] = []

    def conclude(plan: "RestorePlan", answers: "Answers", tracker: "Tracker") -> None:
        show_answers(plan, answers, tracker)
        results.append(run_result(Path(config.out), answers.table()))

    return _finished(run_restore(config, conclude), results)


def _finished(done: "Finished", results: Sequence[CommandResult]) -> CommandResult:
    """Result of an unsharded run; for one of several shards, the command to run once all are finished."""
    if results:
        return results[0]
    from saepatch.runs.parts import read_records

    unit = {"restore": "answers", "circuit": "runs", "edit": "questions"}.get(read_records(done.out)[0].work, "edits")
    lines = [
        f"shard {done.shard} of {done.shards} is finished ({done.parts} parts, {done.count:,} {unit})",
        f"When all shards are finished: saepatch merge {shlex.quote(str(done.out))}",
    ]
    return CommandResult(
        "\n".join(lines), {"out": str(done.out), "shard": done.shard, "shards": done.shards, unit: done.count}
    )
