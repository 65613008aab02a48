"""`saepatch report`."""

from pathlib import Path

from saepatch.cli.parser import CommandResult
from saepatch.settings.report import ReportConfig


def report(config: ReportConfig) -> CommandResult:
    from saepatch.pages import write_report

    out = Path(config.run)
    if config.read:
        from saepatch.pages.gather import read_again

        read_again(out)
    path = write_report(out)
    return CommandResult(f"Report: {path}", {"report": str(path)})
