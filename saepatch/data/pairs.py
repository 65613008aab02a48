"""Clean/corrupted prompt pairs, and the aligned batches that patching runs on."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from saepatch.errors import UserError


@dataclass(frozen=True)
class PromptPair:
    """Two prompts that differ where it matters: `answer` is right after `clean`, `counter` after `corrupted`.

    Answers are the text that follows the prompt, leading space included, one token each. `example` names the pair.
    """

    clean: str
    corrupted: str
    answer: str
    counter: str
    example: str = ""


def load_pairs(source: str, split: str = "report", n: int = 200, seed: int = 0) -> list[PromptPair]:
    """At most `n` pairs (0: all of a file or dataset): of one of the embedded model's tasks, or with the columns
    `clean, corrupted, answer, counter` (`example`, a name, if you like) of

    - a file: `.jsonl`, `.json`, `.csv` (with a header) or `.parquet`;
    - a folder that `datasets` saved with `save_to_disk`;
    - a dataset of the Hugging Face hub, as OWNER/NAME or OWNER/NAME:CONFIGURATION.

    Files have no splits, and neither files nor datasets have a seed: their first `n` pairs are returned.

    Raises:
        UserError: an unknown task or split, a source that cannot be read, or a line that lacks a column.
    """
    if n < 0:
        raise UserError(f"n = {n} asks for no pairs: give 1 or more, or 0 for all of a file or dataset")
    path = Path(source)
    if path.suffix in _READERS:
        return list(islice(_READERS[path.suffix](path), n or None))
    if path.is_dir() or "/" in source:
        rows = _saved_dataset(path, split) if path.is_dir() else _hub_dataset(source, split)
        name = path.name.partition(":")[0]
        return [_pair(row, f"{i} of {source!r}", f"{name}-{i}") for i, row in enumerate(islice(rows, n or None))]
    from saepatch.organism import tasks

    if source not in tasks.TASKS:
        if source.partition(":")[0] in tasks.TASKS:
            raise UserError(
                f"unknown task {source!r}: the split has a setting of its own, as in split='report' (--split)"
            )
        raise UserError(
            f"unknown task {source!r}: use one of {', '.join(tasks.TASKS)}, a file ({', '.join(_READERS)}) of pairs, "
            "a folder saved by `datasets`, or OWNER/NAME of a dataset"
        )
    return pairs_of(tasks.TASKS[source](split, n, seed))


def pairs_of(rows: Any) -> list[PromptPair]:
    """Pairs from any iterable of mappings with `clean, corrupted, answer, counter` (a `datasets.Dataset`, say)."""
    return [_pair(row, str(number), str(number)) for number, row in enumerate(rows)]


COLUMNS = ("clean", "corrupted", "answer", "counter")


def _pair(row: Mapping[str, Any], where: str, name: str) -> PromptPair:
    """`where` is said of a row that will not do; `name` is the pair's where it has none of its own."""
    if missing := [key for key in COLUMNS if not isinstance(row.get(key), str)]:
        raise UserError(f"pair {where} lacks text for {', '.join(missing)}: each needs {', '.join(COLUMNS)}")
    own = row.get("example")
    named = name if own is None or own == "" else str(own)
    return PromptPair(row["clean"], row["corrupted"], row["answer"], row["counter"], named)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets put a mark in front
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot read pairs from {str(path)!r} ({reason}): check the path") from error


def _read_json(path: Path) -> Iterator[PromptPair]:
    text = _text(path)
    if not text.lstrip().startswith("["):
        yield from _json_lines(path, text)
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    for number, row in enumerate(rows, 1):
        yield _json_pair(path, f"item {number}", number, row)


def _read_jsonl(path: Path) -> Iterator[PromptPair]:
    return _json_lines(path, _text(path))


def _json_lines(path: Path, text: str) -> Iterator[PromptPair]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a text may hold a line separator of Unicode
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}, is not JSON: {error}") from error
        yield _json_pair(path, f"line {number}", number, row)


def _json_pair(path: Path, where: str, number: int, row: Any) -> PromptPair:
    if not isinstance(row, dict):
        raise UserError(f"{path}, {where}, is not a JSON object with {', '.join(COLUMNS)}")
    return _pair(row, f"{path}, {where}", f"{path.stem}-{number}")


def _read_csv(path: Path) -> Iterator[PromptPair]:
    lines = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    number = 1  # of the line that a row starts on: a text in quotes may go over several
    try:
        _check_columns(path, lines.fieldnames or ())
        number = lines.line_num + 1
        for row in lines:
            if None in row:  # where csv puts the cells that no column is left for
                raise UserError(
                    f"pair {path}, line {number}, has more cells than the header: put a text that holds a comma in "
                    "double quotes"
                )
            yield _pair(row, f"{path}, line {number}", f"{path.stem}-{number}")
            number = lines.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {number}, is not CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[PromptPair]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
        _check_columns(path, table.schema_arrow.names)
        for number, row in enumerate(row for batch in table.iter_batches() for row in batch.to_pylist()):
            yield _pair(row, f"{path}, row {number}", f"{path.stem}-{number}")
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read pairs from {str(path)!r}: {_first_line(error)}") from error


_READERS: Mapping[str, Callable[[Path], Iterator[PromptPair]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    if missing := [key for key in COLUMNS if key not in columns]:
        raise UserError(
            f"{path} has no column {', '.join(missing)} (it has {', '.join(map(str, columns)) or 'none'}): name its "
            f"columns {', '.join(COLUMNS)}"
        )


def _saved_dataset(folder: Path, split: str) -> Any:
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(str(folder))
    except Exception as error:  # damaged files fail in many ways inside the loader; all are bad input
        raise UserError(
            f"folder {str(folder)!r} is no dataset that `datasets` saved with save_to_disk ({_first_line(error)}): "
            "save it so, or give a file of pairs"
        ) from error
    if not isinstance(found, DatasetDict):
        return found
    if split not in found:
        raise UserError(
            f"{str(folder)!r} has no split {split!r}: give one of {', '.join(map(str, found))} with --split"
        )
    return found[split]


def _hub_dataset(source: str, split: str) -> Any:
    from datasets import load_dataset

    name, _, configuration = source.partition(":")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        if Path(source).is_file():
            raise UserError(
                f"{source!r} is no kind of file that pairs are read from: use .jsonl, .json, .csv or .parquet"
            )
        raise UserError(f"there is no {source!r} here, and that is no OWNER/NAME of a dataset: check the path")
    try:
        return load_dataset(name, configuration or None, split=split)
    except Exception as error:  # whatever the hub's client raises: no network, no such dataset, no such split
        raise UserError(
            f"cannot load dataset {source!r}, split {split!r} ({_first_line(error)}): check its name and split, or "
            "fetch it where there is a network and give the folder or file"
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
