"""Atomic writes: a file appears whole or not at all."""

import fcntl
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saepatch.errors import UserError
from saepatch.records.secrets import redacted_values

if TYPE_CHECKING:
    from torch import Tensor


def write_json(value: Any, path: Path) -> None:
    """Write JSON atomically. NaN is not JSON: missing values are written as null."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_yaml(value: Mapping[str, Any], path: Path) -> None:
    """Write settings atomically, keeping their order."""
    import yaml

    with atomic(path) as temporary:
        text = yaml.safe_dump(redacted_values(dict(value)), sort_keys=False, allow_unicode=True)
        temporary.write_text(text, encoding="utf-8")


def write_tensors(tensors: Mapping[str, "Tensor"], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically. Raises OSError where it cannot be written, as other writers do."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic(path) as temporary:
        try:
            save_file(dict(tensors), temporary, dict(metadata))
        except SafetensorError as error:  # its text alone says which error of the system it was
            if number := re.search(r"\(os error (\d+)\)", str(error)):
                code = int(number[1])
                raise OSError(code, os.strerror(code), str(path)) from error
            raise


def plain(value: Any) -> Any:
    """Convert a value to plain JSON types: NumPy scalars to Python numbers, NaN to None."""
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

    The data is synced to disk first, so that a crash leaves either the old file or the new one, complete. Files that
    processes left behind when they were killed while writing `path` are removed.
    """
    handle, temporary = _temporary(path)
    try:
        yield temporary
        temporary.chmod(0o644)
        to_disk(temporary)
        os.replace(temporary, path)
        with suppress(OSError):  # not every file system syncs folders
            to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


def _temporary(path: Path) -> tuple[int, Path]:
    """A new file beside `path` and its handle, which holds a lock for as long as its process writes."""
    prefix = f".{path.name}."
    mine = re.compile(re.escape(prefix) + "[a-z0-9_]{8}")  # as mkstemp names them
    for name in filter(mine.fullmatch, os.listdir(path.parent)):
        with suppress(OSError):
            _remove_unlocked(path.parent / name)
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix)
        with suppress(OSError):  # not every file system has locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.exists(name):  # another process may have come in before the lock, and removed it
            return handle, Path(name)
        os.close(handle)


def _remove_unlocked(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        os.close(handle)


def to_disk(path: Path) -> None:
    """Sync a file or folder to disk, so that a power cut does not leave it empty."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(out: str | Path, setting: str = "out") -> None:
    """Check that a folder, given by a setting, can be written to or created; leaves nothing behind.

    Raises:
        UserError: it cannot.
    """
    folder = Path(out)
    made = [part for part in (folder, *folder.parents) if not part.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # without a name where the system can: a killed process leaves nothing
            pass
        for part in made:  # innermost first; created again once there is something to write
            part.rmdir()
    except OSError as error:
        raise UserError(
            f"cannot write to {str(out)!r} ({error.strerror}): give another folder with --{setting}"
        ) from error


def output_folder(out: str | Path, setting: str = "out") -> Path:
    """The folder for results, created if needed.

    Raises:
        UserError: it cannot be written.
    """
    check_writable(out, setting)
    Path(out).mkdir(parents=True, exist_ok=True)
    return Path(out)
