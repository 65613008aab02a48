"""`saepatch runs`."""

from pathlib import Path

from saepatch.cli.parser import CommandResult
from saepatch.settings.finished.runs import RunsConfig


def runs(config: RunsConfig) -> CommandResult:
    from saepatch.runs.catalogue import runs_facts, runs_table

    return CommandResult(runs_table(Path(config.root)), runs_facts(Path(config.root)))
