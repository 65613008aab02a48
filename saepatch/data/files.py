"""The one reader of data files: JSON lines, JSON, CSV, Parquet and plain text, as rows that know where they stand."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saepatch.errors import UserError

TABLES = (".jsonl", ".json", ".csv", ".parquet")  # the endings of files with columns


@dataclass(frozen=True)
class FileRow:
    """One row: a mapping of columns, or whatever stands there instead; `where` names file and line in messages."""

    value: Any
    number: int
    where: str


def read_rows(
    path: Path, what: str, needs: Sequence[str] = (), otherwise: str = ".jsonl", remedy: str = "check the path"
) -> Iterator[FileRow]:
    """Rows of a file, by its ending; a file of another kind is read as one of `otherwise` (.txt: a text a line).

    A byte order mark in front is skipped. Lines end with a line feed alone: texts may hold other separators of Unicode.

    Args:
        what: What the rows are, for messages ("pairs").
        needs: Columns that a CSV or Parquet file has to have.
        remedy: What to do where there is no such file, for messages.

    Raises:
        UserError: a file that cannot be read, or a row that is not of the file's format.
    """
    ending = path.suffix if path.suffix in TABLES else otherwise
    if ending == ".parquet":
        yield from _parquet(path, what, needs, remedy)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot read {what} from {str(path)!r} ({reason}): {remedy}") from error
    if ending == ".csv":
        yield from _csv(path, text, what, needs)
    elif ending == ".json" and text.lstrip().startswith("["):
        for number, value in enumerate(_json(text, str(path)), 1):
            yield FileRow(value, number, f"{path}, item {number}")
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                where = f"{path}, line {number}"
                yield FileRow(line if ending == ".txt" else _json(line, f"{where},"), number, where)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error}") from error


def _csv(path: Path, text: str, what: str, needs: Sequence[str]) -> Iterator[FileRow]:
    lines = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    number = 1  # of the line that a row starts on: a text in quotes may go over several
    try:
        _check_columns(path, lines.fieldnames or (), needs)
        number = lines.line_num + 1
        for value in lines:
            where = f"{path}, line {number}"
            if None in value:  # where csv puts the cells that no column is left for
                raise UserError(
                    f"{what} of {where}, has more cells than the header: put a text that holds a comma in double quotes"
                )
            yield FileRow(value, number, where)
            number = lines.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {number}, is not CSV: {error}") from error


def _parquet(path: Path, what: str, needs: Sequence[str], remedy: str) -> Iterator[FileRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
        _check_columns(path, table.schema_arrow.names, needs)
        for number, value in enumerate(row for batch in table.iter_batches() for row in batch.to_pylist()):
            yield FileRow(value, number, f"{path}, row {number}")
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {what} from {str(path)!r} ({first_line(error)}): {remedy}") from error


def _check_columns(path: Path, columns: Sequence[str], needs: Sequence[str]) -> None:
    if missing := [key for key in needs if key not in columns]:
        raise UserError(
            f"{path} has no column {', '.join(missing)} (it has {', '.join(map(str, columns)) or 'none'}): name its "
            f"columns {', '.join(needs)}"
        )
