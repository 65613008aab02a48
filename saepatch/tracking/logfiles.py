"""The files of the local log: the values of a line, and the repair of a truncated log."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS, SUMMARY, ARTIFACTS = "metrics.jsonl", "metrics.summary.json", "artifacts.jsonl"


def number(value: Any) -> float:
    """The value as a float; integers are unchanged."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    return float(value)


def plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values in a form JSON can represent: a non-finite float becomes text that ``float()`` parses."""
    return {
        name: ("NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity")
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for name, value in values.items()
    }


def plain_name(name: str) -> str:
    """The name as a valid file name."""
    return re.sub(r"[^\w.-]+", "_", name).strip(".") or "table"


def contents(folder: Path) -> dict[str, Any]:
    """Number of files and bytes in a folder, and the SHA-256 over their paths and contents."""
    digest, count, size = hashlib.sha256(), 0, 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        length = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {length}\n".encode())
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        count, size = count + 1, size + length
    return {"files": count, "bytes": size, "sha256": digest.hexdigest()}


def cut(path: Path, last: int | None) -> None:
    """Keep only the complete lines of a log, and only those up to step `last` where it is given.

    A killed run may have truncated the last line, or have logged steps after its last checkpoint.
    """
    if not path.exists():
        return
    fresh = path.with_name(f"{path.name}.tmp")
    with path.open("rb") as old, fresh.open("wb") as new:
        for line in old:
            try:
                row = json.loads(line)
                step = row["step"]
            except (ValueError, TypeError, KeyError):
                continue
            if last is None or step <= last:
                new.write(line.rstrip(b"\n") + b"\n")
    fresh.replace(path)


def read_summary(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
