"""Template files of reports, and how reports are written to disk."""

from __future__ import annotations

from pathlib import Path

from saepatch.errors import UserError
from saepatch.records.files import atomic

SOURCES = Path(__file__).parent / "templates"


def stylesheet(*names: str) -> str:
    """The named style sheets, concatenated."""
    return "\n".join((SOURCES / f"{name}.css").read_text(encoding="utf-8") for name in names)


def write_whole(path: Path, text: str, what: str) -> None:
    """Writes a text file atomically, creating missing parent folders.

    Raises:
        UserError: The file cannot be written; `what` names it in the message.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as fresh:
            fresh.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write {what} to {str(path)!r} ({reason}): choose another place") from error
