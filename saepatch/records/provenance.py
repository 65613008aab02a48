"""Where rows come from: model, dictionary, seed, versions, command."""

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

LIBRARIES = ("saepatch", "torch", "transformers", "sae-lens", "datasets", "numpy")


@dataclass(frozen=True)
class Provenance:
    """Where rows come from; every row of a file carries it."""

    model: str
    model_hash: str
    dictionary: str
    dictionary_hash: str
    seed: int
    versions: str = field(default_factory=lambda: json.dumps(versions(), sort_keys=True))
    command: str = field(default_factory=lambda: command_line())

    def facts(self) -> dict[str, str]:
        """The same, as labels and texts for a reader."""
        return {
            "model": f"{self.model} ({self.model_hash})",
            "dictionary": f"{self.dictionary} ({self.dictionary_hash})",
            "seed": str(self.seed),
            "command": self.command,
            "versions": ", ".join(f"{name} {version}" for name, version in json.loads(self.versions).items()),
        }


def command_line() -> str:
    """The command this process was started with, its interpreter's and script's folders left out."""
    if "-m" in sys.orig_argv[:3]:
        return shlex.join(["python", *sys.orig_argv[sys.orig_argv.index("-m") :]])
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def json_hash(value: Any) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a value as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries a number can depend on."""
    return {"python": platform.python_version()} | {library: _version(library) for library in LIBRARIES}


@cache  # asked for each part of a long run
def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "not installed"
