"""The driver of long runs: writes parts atomically, records which run they belong to, locks the folder, resumes.

A run's folder holds one folder per shard, in which one process works at a time (`locked`). A kind of run implements
`Work`: its record, and how to run one part. `saepatch.runs.parts` describes the files.
"""

import json
import logging
import os
import shlex
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from saepatch.errors import UserError
from saepatch.records.files import check_writable, output_folder, write_json, write_yaml
from saepatch.records.provenance import Provenance
from saepatch.records.rows import AnswerRow, CircuitRow, EditRow, Row, RowKind, read_about, write_rows
from saepatch.records.secrets import redacted_values
from saepatch.runs.interpret import read_shard
from saepatch.runs.parts import (
    Record,
    deciding,
    keep_run,
    known_run,
    part_file,
    parts_name,
    read_records,
    refuse_if_other,
    refuse_other_command,
    shard_folder,
)
from saepatch.runs.progress import Check, Meter, messages_once, stoppable
from saepatch.settings.checks import current_names
from saepatch.settings.circuit import CircuitConfig
from saepatch.settings.edit import EditConfig
from saepatch.settings.mixins import FREE
from saepatch.settings.restore import RestoreConfig
from saepatch.settings.sweeps import SweepConfig
from saepatch.tracking.open import RunDescription, Tracker, open_tracker

log = logging.getLogger(__name__)

LOCK = "lock"

RunConfig = SweepConfig | RestoreConfig | CircuitConfig | EditConfig
Config = TypeVar("Config", SweepConfig, RestoreConfig, CircuitConfig, EditConfig)


@dataclass(frozen=True, eq=False)
class PartContent:
    """Content of a part's file: rows with their provenance, produced while they are written, and facts for merging."""

    rows: Iterable[tuple[Sequence[Row | AnswerRow | CircuitRow | EditRow], Provenance]]
    about: dict[str, Any]
    kind: RowKind = Row


Count = Callable[[int], None]
"""Called with the number of edits, answers, runs or questions just finished; raises KeyboardInterrupt once the run
should stop."""


@runtime_checkable
class Work(Protocol):
    """A shard of a run, with the model and everything else needed to run its parts."""

    @property
    def record(self) -> Record: ...
    @property
    def place(self) -> "Place": ...
    @property
    def source(self) -> str:
        """Short name of the prompts' source."""
        ...

    @property
    def unit(self) -> str:
        """What progress counts: edits, answers, runs or questions."""
        ...

    def run_part(self, number: int, count: Count) -> PartContent: ...


SomeWork = TypeVar("SomeWork", bound=Work)


@dataclass(frozen=True)
class Place:
    """The folder of one shard, and the records of all shards started so far."""

    config: RunConfig
    out: Path
    shard: int
    shards: int
    records: Sequence[Record]

    @classmethod
    def of(cls, config: RunConfig) -> "Place":
        """Check, before anything is loaded, that the folder can hold a run with these settings.

        Raises:
            UserError: the folder cannot be written, or holds another run.
        """
        shard, shards = read_shard(config.shard)
        out = Path(config.out)
        check_writable(out)
        refuse_other_command(out, parts_name(config.command))
        place = cls(config, out, shard, shards, read_records(out))
        place.refuse_others(deciding(config.command, place.settings, shards))
        return place

    @property
    def folder(self) -> Path:
        return shard_folder(self.out, self.shard, self.shards, self.config.command)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that determine the results."""
        return {name: redacted_values(value) for name, value in asdict(self.config).items() if name not in FREE}

    @property
    def edits(self) -> list[dict[str, Any]] | None:
        """Edits recorded by the first shard. Others reuse them, since near ties may rank differently elsewhere."""
        return self.records[0].edits if self.records else None

    def refuse_others(self, decides: dict[str, Any]) -> None:
        """Raises UserError where an existing record differs; settings it predates count as their defaults."""
        defaults = {f.name: f.default for f in fields(self.config) if f.default is not MISSING and f.name not in FREE}
        for record in self.records:
            refuse_if_other(self.out, defaults | current_names(type(self.config), record.decides), decides)

    def agreed(self, here: Record) -> Record:
        """The record that this shard wrote when it was started, else `here` with the first shard's edits.

        Raises:
            UserError: the folder holds another run.
        """
        self.refuse_others(here.decides)
        own = [record for record in self.records if record.shard == self.shard]
        if own and own[0].versions != here.versions:
            log.warning("library versions have changed since this shard was started: see %s/run.json", self.folder)
        return own[0] if own else replace(here, edits=self.edits)


@dataclass(frozen=True)
class Finished:
    """A shard with all its parts written."""

    out: Path
    shard: int
    shards: int
    parts: int
    count: int  # edits or answers, earlier starts included


def drive(
    config: Config,
    prepare: Callable[[Config], SomeWork],
    conclude: Callable[[SomeWork, Tracker], None] | None = None,
) -> Finished:
    """Run the missing parts of a shard.

    `conclude` is called at the end of an unsharded run, while its tracker is still open.

    Raises:
        UserError: the settings are invalid, or the folder holds another run or is in use by another process.
        KeyboardInterrupt: the run was stopped by Ctrl-C or SIGTERM. Finished parts stay; the message has the command to
            resume it.
    """
    with stoppable() as check:
        torch.manual_seed(config.seed)
        with locked(Place.of(config).folder):
            work = prepare(config)
            try:
                return _run_parts(work, check, conclude)
            except KeyboardInterrupt:
                record, folder = work.record, work.place.folder
                resume = f"saepatch {record.work} --config {shlex.quote(str(folder / 'config.yaml'))}"
                raise KeyboardInterrupt(
                    f"{record.parts - len(missing_parts(work))} of {record.parts} parts are written; "
                    f"to resume: {resume}"
                ) from None


def missing_parts(work: Work) -> list[int]:
    """Numbers of the parts that are missing or damaged.

    Raises:
        UserError: a part belongs to another run.
    """
    missing = []
    for number in range(work.record.parts):
        path = part_file(work.place.folder, number)
        about = read_about(path)
        if about is None:
            missing.append(number)
        elif about["run"] != work.record.key:
            raise UserError(f"{path} belongs to another run: remove {work.place.folder}")
    return missing


def _run_parts(work: SomeWork, check: Check, conclude: Callable[[SomeWork, Tracker], None] | None) -> Finished:
    record, place = work.record, work.place
    config, folder = place.config, output_folder(place.folder)
    write_yaml(asdict(config) | {"shard": f"{place.shard}/{place.shards}"}, folder / "config.yaml")
    missing = missing_parts(work)
    done = record.parts - len(missing)
    before = sum((read_about(part_file(folder, n)) or {}).get(work.unit, 0) for n in range(record.parts))
    if done and not config.quiet:
        log.info("resuming: %d of %d parts are done", done, record.parts)
    description = RunDescription(
        place.out if place.shards == 1 else folder,
        run=f"{config.command}-{work.source}",
        config=asdict(config),
        run_id=known_run(folder),
        group=place.out.absolute().parent.name,
        job_type=config.command,
        axes={"*": work.unit},
    )
    tracker = open_tracker(config.track, description, resume=done > 0)
    keep_run(folder, tracker.run_id)
    with tracker:
        noted = ("saepatch.engine.sweep", "saepatch.measure.results.screen", "saepatch.circuits.node_runs")
        without_repeats = messages_once(*noted)
        with without_repeats, Meter(record.parts, done, before, config, tracker, work.unit) as meter:
            for number in missing:
                _write_part(work, number, meter, check)
                meter.part_done()
        write_record(record, folder)
        if conclude is not None and place.shards == 1:
            conclude(work, tracker)
    return Finished(place.out, place.shard, place.shards, record.parts, meter.edits)


def _write_part(work: Work, number: int, meter: Meter, check: Check) -> None:
    before = meter.edits

    def count(done: int) -> None:
        check()
        meter.ran(done)

    check()
    content = work.run_part(number, count)
    about = {"run": work.record.key, work.unit: meter.edits - before} | content.about
    write_record(work.record, work.place.folder)
    write_rows(content.rows, part_file(work.place.folder, number), about, content.kind)


def write_record(record: Record, folder: Path) -> None:
    """Called with the first part: settings that fail before it leave no record to conflict with corrected ones."""
    path = output_folder(folder) / "run.json"
    if not path.exists():
        write_json(asdict(record), path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes. It is created if missing, and removed at the end if nothing was written.

    The lock is an flock, which the kernel releases when the process ends in any way; the file names the holder. On a
    file system without flock, the lock counts as held while that process exists, or if it is on another host.

    Raises:
        UserError: another process works in the folder.
    """
    made = [part for part in (folder, *folder.parents) if not part.exists()]
    handle = _lock(output_folder(folder) / LOCK)
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(handle)
        for part in made:  # innermost first; those that are not empty stay
            with suppress(OSError):
                part.rmdir()


def _lock(path: Path) -> int:
    import fcntl

    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        holder = os.read(handle, 4096).decode(errors="replace")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        except OSError:  # no flock on this file system
            free = not _alive(holder)
        if not free:
            os.close(handle)
            raise UserError(_refusal(path, holder))
        try:
            current = path.stat().st_ino == os.fstat(handle).st_ino
        except FileNotFoundError:
            current = False
        if current:
            break
        os.close(handle)  # the holder removed the file in between, so this lock is on a deleted file
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
    return handle


def _read_holder(text: str) -> tuple[int, str] | None:
    try:
        holder = json.loads(text)
        return int(holder["pid"]), str(holder["host"])
    except (ValueError, KeyError, TypeError):
        return None


def _alive(text: str) -> bool:
    """Whether the lock's holder may still be running; assumed so on another host."""
    holder = _read_holder(text)
    if holder is None:
        return False
    pid, host = holder
    if host != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _refusal(path: Path, text: str) -> str:
    holder = _read_holder(text)
    who = "another process" if holder is None else f"process {holder[0]} on {holder[1]}"
    return (
        f"{who} is working in {str(path.parent)!r}: wait for it or stop it, or give another --out or --shard "
        f"(if it is certainly gone, remove {path})"
    )
