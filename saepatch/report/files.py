"""Files that a report is made from, and how reports are written."""

from __future__ import annotations

from pathlib import Path

from saepatch.errors import UserError
from saepatch.records.files import atomic

SOURCES = Path(__file__).parent / "templates"


def stylesheet(*names: str) -> str:
    """The style sheets of these names, one after the other."""
    return "\n".join((SOURCES / f"{name}.css").read_text(encoding="utf-8") for name in names)


def write_whole(path: Path, text: str, what: str) -> None:
    """Writes the text to the file: whole, or not at all. Folders on the way are made.

    Raises:
        UserError: It cannot be written there; `what` says in the message what it is.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as fresh:
            fresh.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write {what} to {str(path)!r} ({reason}): choose another --out") from error
