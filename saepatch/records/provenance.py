"""Provenance of rows: model, dictionary, seed, versions, command."""

import hashlib
import json
import platform
import shlex
import sys
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from saepatch.records.secrets import redacted

LIBRARIES = ("saepatch", "torch", "transformers", "sae-lens", "datasets", "numpy")


@dataclass(frozen=True)
class Provenance:
    """What produced a row; every row of a file carries these columns."""

    model: str
    model_hash: str
    dictionary: str
    dictionary_hash: str
    seed: int
    versions: str = field(default_factory=lambda: json.dumps(versions(), sort_keys=True))
    command: str = field(default_factory=lambda: command_line())

    def facts(self) -> dict[str, str]:
        """The same as labels and texts for display."""
        return {
            "model": f"{self.model} ({self.model_hash})",
            "dictionary": f"{self.dictionary} ({self.dictionary_hash})",
            "seed": str(self.seed),
            "command": self.command,
            "versions": ", ".join(f"{name} {version}" for name, version in json.loads(self.versions).items()),
        }


def command_line() -> str:
    """The command that started this process, without the folders of the interpreter and script."""
    if "-m" in sys.orig_argv[:3]:
        return redacted(shlex.join(["python", *sys.orig_argv[sys.orig_argv.index("-m") :]]))
    return redacted(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))


def json_hash(value: Any) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a value as JSON; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def versions(*others: str) -> dict[str, str]:
    """Versions of Python, of the libraries that results can depend on, and of other libraries."""
    return {"python": platform.python_version()} | {library: _version(library) for library in (*LIBRARIES, *others)}


@cache  # asked for each part of a long run
def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "not installed"
