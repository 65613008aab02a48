"""Texts to measure on: a file's, or the embedded model's own."""

import json
from pathlib import Path

from saepatch import organism
from saepatch.errors import UserError


def load_texts(spec: str, column: str = "text") -> list[str]:
    """The texts of `organism`, of a .txt file (a line each), or of a .jsonl or .json file's column.

    Raises:
        UserError: there is no such file, it cannot be read, or it holds no text.
    """
    if spec == "organism":
        return organism.texts()
    path = Path(spec)
    try:
        raw = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            # not splitlines: a text may hold a line separator of Unicode
            found = [_text(json.loads(line), column) for line in raw.split("\n") if line.strip()]
        elif path.suffix == ".json":
            found = [_text(one, column) for one in json.loads(raw)]
        else:
            found = raw.split("\n")  # read as text: the line ends of any system are this already
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot read texts from {spec!r} ({error}): give organism, a .txt file with a text a line, or a .jsonl or "
            f".json file with a column {column!r}"
        ) from error
    found = [text for text in found if text.strip()]
    if not found:
        raise UserError(f"{spec!r} holds no text: give another file")
    return found


def _text(one: object, column: str) -> str:
    value = one[column] if isinstance(one, dict) else one
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
