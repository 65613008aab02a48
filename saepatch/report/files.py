"""Files: the report's own, and the ones it writes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from saepatch.errors import UserError

SOURCES = Path(__file__).parent / "templates"


def stylesheet(*names: str) -> str:
    """The style sheets of these names, one after the other."""
    return "\n".join((SOURCES / f"{name}.css").read_text(encoding="utf-8") for name in names)


def write_whole(path: Path, text: str, what: str) -> None:
    """Writes the text to the file: whole, or not at all. Folders on the way are made.

    Raises:
        UserError: It cannot be written there; `what` says in the message what it is.
    """
    fresh = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, fresh = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(fresh, 0o644)  # mkstemp's own mode is for secrets; this is there to be read
        os.replace(fresh, path)
    except OSError as error:
        if fresh is not None:
            Path(fresh).unlink(missing_ok=True)
        reason = error.strerror or str(error)
        raise UserError(f"cannot write {what} to {str(path)!r} ({reason}): choose another --out") from error
