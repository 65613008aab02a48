"""`saepatch report`."""

from pathlib import Path

from saepatch.cli.parser import CommandResult
from saepatch.settings.finished.report import ReportConfig


def report(config: ReportConfig) -> CommandResult:
    from saepatch.pages import write_report
    from saepatch.runs.catalogue import reading

    out = Path(config.run)
    if config.read:
        from saepatch.pages.run import read_again

        read_again(out)
    with reading(out):
        write_report(out)
    path = out / "report.html"
    return CommandResult(f"Report: {path}", {"report": str(path)})
