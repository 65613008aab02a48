"""Results as flat rows with provenance, in parquet."""

import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from saepatch.errors import UserError

ABOUT = b"saepatch"  # key of the metadata of a parquet file
LIBRARIES = ("saepatch", "torch", "transformers", "sae-lens", "datasets", "numpy")


@dataclass(frozen=True)
class Row:
    """One measured value: one edit of one example.

    `component` says what was patched: "latent", "error", "stream", "head", "query", "key", "value", or what kind of
    direction ("direction", "dimension", "principal component", "mean difference"). `latent` names its units and
    `position` the place, as texts ("417", "3,17", "all"); `token` is the text at a single position. `role` says why
    these units: "single" (all are swept, and those that differ between a pair's runs have a row), "given", "top",
    "random", "matched", "differing" or "every". `effect` is normalised (0: base run, 1:
    source run) and NaN where the clean and corrupted runs are too close to divide by. `corruption` is what made the
    corrupted run where it is not the pair's corrupted prompt.
    """

    task: str
    example: str
    site: str
    component: str
    latent: str
    role: str
    position: str
    token: str
    direction: str
    metric: str
    method: str
    clean: float
    corrupted: float
    patched: float
    effect: float
    corruption: str = ""


@dataclass(frozen=True)
class AnswerRow:
    """What a model answered to one prompt under one condition.

    `setting` says who restores whom, `condition` what was restored ("bare": nothing), `latents` how many; `draw` counts
    random sets of latents. `outcome` is refuse, comply or degenerate; `score` is the refusal score (nats) after the
    prompt, NaN where it was not taken.
    """

    setting: str
    example: str
    prompt: str
    harmful: str
    condition: str
    latents: int
    draw: int
    answer: str
    outcome: str
    score: float


@dataclass(frozen=True)
class Provenance:
    """Where rows come from; every row of a file carries it."""

    model: str
    model_hash: str
    dictionary: str
    dictionary_hash: str
    seed: int
    versions: str = field(default_factory=lambda: json.dumps(versions(), sort_keys=True))
    command: str = field(default_factory=lambda: command_line())

    def facts(self) -> dict[str, str]:
        """The same, as labels and texts for a reader."""
        return {
            "model": f"{self.model} ({self.model_hash})",
            "dictionary": f"{self.dictionary} ({self.dictionary_hash})",
            "seed": str(self.seed),
            "command": self.command,
            "versions": ", ".join(f"{name} {version}" for name, version in json.loads(self.versions).items()),
        }


def command_line() -> str:
    """The command this process was started with, its interpreter's and script's folders left out."""
    if "-m" in sys.orig_argv[:3]:
        return shlex.join(["python", *sys.orig_argv[sys.orig_argv.index("-m") :]])
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries a number can depend on."""
    return {"python": platform.python_version()} | {library: _version(library) for library in LIBRARIES}


@cache  # asked for each part of a long run
def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "not installed"


def write_rows(
    parts: Iterable[tuple[Iterable[Row], Provenance]] | Iterable[tuple[Iterable[AnswerRow], Provenance]],
    path: Path,
    about: Mapping[str, Any] | None = None,
    kind: type[Row] | type[AnswerRow] = Row,
) -> int:
    """Write rows, each part with its own provenance, to one parquet file; the file appears whole or not at all.

    One part is held in memory at a time. `about`, anything that JSON holds, goes into the file's metadata: `read_about`
    finds it without reading a row. All rows are of one `kind`. Returns how many there were.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [f.name for f in (*fields(kind), *fields(Provenance))]
    arrow = {str: pa.string(), float: pa.float64(), int: pa.int64()}  # said, since no rows would say nothing
    schema = pa.schema([(f.name, arrow[f.type]) for f in (*fields(kind), *fields(Provenance))])  # type: ignore[index]
    if about is not None:
        schema = schema.with_metadata({ABOUT: json.dumps(about)})
    total = 0
    with atomic(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for rows, provenance in parts:
            constants = asdict(provenance)
            columns: dict[str, list[Any]] = {name: [] for name in names}
            for row in rows:
                for name, value in (vars(row) | constants).items():
                    columns[name].append(value)
            if columns["example"]:
                writer.write_table(pa.table(columns, schema=schema))
            total += len(columns["example"])
    return total


def write_records(parts: Iterable[tuple[Sequence[Mapping[str, Any]], Provenance]], path: Path) -> int:
    """Write flat records that are no edits of pairs (texts that were generated, say), each part with its provenance.

    All records have the same keys. The file appears whole or not at all. Returns how many there were.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{**record, **asdict(provenance)} for records, provenance in parts for record in records]
    with atomic(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary)
    return len(rows)


def read_about(path: Path) -> dict[str, Any] | None:
    """What was written about the rows; None where the file is missing, damaged or says nothing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        said = (pq.read_schema(path).metadata or {}).get(ABOUT)
    except (OSError, pa.ArrowException):
        return None
    return None if said is None else json.loads(said)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a parquet file as dictionaries, provenance included."""
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


def write_json(value: Any, path: Path) -> None:
    """Write JSON atomically. NaN is not JSON: missing values are written as null."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_yaml(value: Mapping[str, Any], path: Path) -> None:
    """Write settings atomically, in their order."""
    import yaml

    with atomic(path) as temporary:
        temporary.write_text(yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True), encoding="utf-8")


def plain(value: Any) -> Any:
    """The value as JSON can hold it: NumPy's numbers as Python's, NaN as null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and value != value:
        return None
    return value


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """`with atomic(path) as temporary:` write to `temporary`; it replaces `path` when the block ends without error.

    It is on the disk by then: a machine that fails right after leaves the old file or the new one, whole.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        _to_disk(temporary)
        os.replace(temporary, path)
        with suppress(OSError):  # not every file system syncs folders
            _to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(out: str | Path) -> None:
    """See that a folder can be written, or made; nothing is left behind.

    Raises:
        UserError: it cannot.
    """
    folder = Path(out)
    made = [part for part in (folder, *folder.parents) if not part.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
        for part in made:  # from the inside out; they come back when there is something to put there
            part.rmdir()
    except OSError as error:
        raise UserError(f"cannot write to {str(out)!r} ({error.strerror}): give another folder with --out") from error


def output_folder(out: str | Path) -> Path:
    """The folder results go to, made if need be.

    Raises:
        UserError: it cannot be written.
    """
    check_writable(out)
    Path(out).mkdir(parents=True, exist_ok=True)
    return Path(out)
