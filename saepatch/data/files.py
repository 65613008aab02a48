"""The one reader of data files: JSON lines, JSON, CSV, Parquet and plain text, as rows with their line numbers."""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saepatch.errors import UserError
from saepatch.records.documents import parse_json

TABLES = (".jsonl", ".json", ".csv", ".parquet")  # extensions of files with columns


@dataclass(frozen=True)
class FileRow:
    """One row: a mapping of columns, or another JSON value or text; `where` names file and line in messages."""

    value: Any
    number: int
    where: str


def read_rows(
    path: Path, what: str, needs: Sequence[str] = (), otherwise: str = ".jsonl", remedy: str = "check the path"
) -> Iterator[FileRow]:
    """Rows of a file, in the format given by its extension.

    A leading byte order mark is skipped. Only a line feed ends a line: texts may contain other Unicode separators.

    Args:
        path: The file.
        what: What the rows are, for messages ("pairs").
        needs: Required columns of a CSV or Parquet file.
        otherwise: Format of files with an unknown extension (".txt": one text per line).
        remedy: Remedy in the message for a file that cannot be read.

    Raises:
        UserError: the file cannot be read, or a row does not match the file's format.
    """
    ending = path.suffix if path.suffix in TABLES else otherwise
    if ending == ".parquet":
        yield from _parquet(path, what, needs, remedy)
        return
    text = read_text(path, what, remedy)
    if ending == ".csv":
        yield from _csv(path, text, what, needs)
    elif ending == ".json" and text.lstrip().startswith("["):
        for number, value in enumerate(parse_json(text, str(path)), 1):
            yield FileRow(value, number, f"{path}, item {number}")
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                where = f"{path}, line {number}"
                yield FileRow(line if ending == ".txt" else parse_json(line, f"{where},"), number, where)


def read_text(path: Path, what: str, remedy: str) -> str:
    """The text of a file in UTF-8, without a leading byte order mark.

    Raises:
        UserError: the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} in {str(path)!r} are not UTF-8 ({error.reason}): save the file as UTF-8") from error
    except (OSError, ValueError) as error:  # such as a path that holds NUL
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot read {what} from {str(path)!r} ({reason}): {remedy}") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class where there is no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _csv(path: Path, text: str, what: str, needs: Sequence[str]) -> Iterator[FileRow]:
    lines = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    number = 1  # line on which a row starts: a quoted text may span several lines
    try:
        _check_columns(path, lines.fieldnames or (), needs)
        number = lines.line_num + 1
        for value in lines:
            where = f"{path}, line {number}"
            if None in value:  # csv's key for surplus cells
                raise UserError(
                    f"{what} of {where}, has more cells than the header: put texts with commas in double quotes"
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
    except UserError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"cannot read {what} from {str(path)!r} ({first_line(error)}): {remedy}") from error


def _check_columns(path: Path, columns: Sequence[str], needs: Sequence[str]) -> None:
    if repeated := [key for key, times in Counter(columns).items() if times > 1]:
        raise UserError(f"{path} has several columns {repeated[0]!r}: give each a name of its own, or take one out")
    if missing := [key for key in needs if key not in columns]:
        raise UserError(
            f"{path} has no column {', '.join(missing)} (it has {', '.join(map(str, columns)) or 'none'}): name its "
            f"columns {', '.join(needs)}"
        )
