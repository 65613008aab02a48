"""Texts to measure on, from a file or the embedded model's own."""

from pathlib import Path

from saepatch import organism
from saepatch.data.files import TABLES, FileRow, read_rows
from saepatch.errors import UserError


def load_texts(spec: str, column: str = "text") -> list[str]:
    """Texts of `organism`, of a column of a .jsonl, .json, .csv or .parquet file, or of any other file, one per line.

    Raises:
        UserError: the file does not exist, cannot be read, or contains no text.
    """
    if spec == "organism":
        return organism.texts()
    remedy = (
        f"give organism, a .txt file with one text per line, or a file ({', '.join(TABLES)}) with a column {column!r}"
    )
    rows = read_rows(Path(spec), "texts", [column], ".txt", remedy)
    texts = [text for text in (_text(row, column) for row in rows) if text.strip()]
    if not texts:
        raise UserError(f"{spec!r} contains no text: give another file")
    return texts


def _text(row: FileRow, column: str) -> str:
    text = row.value.get(column) if isinstance(row.value, dict) else row.value
    if not isinstance(text, str):
        raise UserError(
            f"{row.where}, has no text in a column {column!r}: rename the column, or give one text per line"
        )
    return text
