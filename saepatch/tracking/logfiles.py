"""The files of the local log: what a line may hold, and how a log that was cut short is mended."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS, SUMMARY, ARTIFACTS = "metrics.jsonl", "metrics.summary.json", "artifacts.jsonl"


def number(value: Any) -> float:
    """The value as one float; integers stay what they are."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    return float(value)


def plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can hold: a float that is not finite becomes text that ``float()`` reads back."""
    return {
        name: ("NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity")
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for name, value in values.items()
    }


def plain_name(name: str) -> str:
    """The name as one that a file can have."""
    return re.sub(r"[^\w.-]+", "_", name).strip(".") or "table"


def contents(folder: Path) -> dict[str, Any]:
    """How many files and bytes are in a folder, and the SHA-256 over their paths and bytes."""
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
    """Leave the whole lines of a log, those up to a step where one is given.

    A killed run may have cut the last line short, or have gone on after its last checkpoint.
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
