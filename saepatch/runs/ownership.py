"""Ownership of folders: results of one command or experiment never overwrite those of another."""

from pathlib import Path

from saepatch.errors import UserError
from saepatch.records.files import check_writable
from saepatch.runs.catalogue import MEASUREMENTS, read_run, started_experiment
from saepatch.runs.kinds import SUMMARIES

FOREIGN = ("parts", "answers", "checkpoints")  # of patch and attribute, of restore, of training


def check_owner(out: Path, kind: str, own: str = MEASUREMENTS) -> None:
    """Check that a folder can be written to and holds no run of another kind, finished or not.

    Args:
        out: The folder; it need not exist.
        kind: Name of the run's kind, as `saepatch runs` lists it.
        own: A file that unfinished runs of this kind leave beside their results.

    Raises:
        UserError: the folder cannot be written to, or holds a run of another kind.
    """
    check_writable(out)
    experiment = started_experiment(out)
    foreign = any((out / name).exists() for name in FOREIGN) or (experiment is not None and experiment != kind)
    if any((out / name).exists() for name in SUMMARIES):
        foreign = foreign or _summarised(out) != kind
    elif (out / "results.parquet").exists():
        foreign = foreign or not (out / own).exists()
    if foreign:
        raise UserError(
            f"{str(out)!r} holds a run of another command or experiment: give another --out, or remove that folder"
        )


def _summarised(out: Path) -> str:
    """The kind of run whose summary is in a folder; empty where it cannot be read."""
    try:
        return read_run(out).work
    except UserError:
        return ""
