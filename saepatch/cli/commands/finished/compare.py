"""`saepatch compare`."""

from pathlib import Path

from saepatch.cli.parser import CommandResult
from saepatch.settings.finished.compare import CompareConfig


def compare(config: CompareConfig) -> CommandResult:
    from saepatch.runs.catalogue import read_run, reading
    from saepatch.runs.comparison import compare_runs

    path, other = Path(config.one), Path(config.other)
    with reading(path):
        first = read_run(path)
    with reading(other):
        comparison = compare_runs(first, read_run(other))
        text = comparison.table()
    if config.html:
        from saepatch.pages import compare_page
        from saepatch.report import write_page

        text += f"\n\nPage: {write_page(compare_page(comparison), Path(config.html))}"
    return CommandResult(text, comparison.facts())
