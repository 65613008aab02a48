"""Measurements that a stopped experiment need not repeat: one line of JSON each, written as soon as it is known."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saepatch.errors import UserError
from saepatch.records.files import atomic

log = logging.getLogger(__name__)


class Cells:
    """A file of named measurements. The first line is a key: what decides all of them, a hash of settings and weights.

    Raises:
        UserError: the file holds measurements under another key.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.known: dict[str, Any] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        whole = list(map(_parsed, lines))
        if whole and whole[-1] is None:  # a kill cut it short
            whole.pop()
        if whole and whole[0] != {"key": key}:
            raise UserError(
                f"{str(path.parent)!r} holds measurements of other settings, prompts or weights: give another --out, "
                f"or remove {path.name} there"
            )
        for line in whole[1:]:
            if line is None:
                raise UserError(f"{str(path)!r} is damaged: remove it, to measure anew")
            self.known[line["name"]] = line["value"]
        if self.known:
            log.info("%d measurements are there already", len(self.known))
        with atomic(path) as temporary:  # without the line that was cut short
            kept = whole or [{"key": key}]
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """What is known under the name; measured, and kept, if nothing is."""
        if name not in self.known:
            value = measure()
            self._file.write(json.dumps({"name": name, "value": value}) + "\n")
            self._file.flush()
            self.known[name] = json.loads(json.dumps(value))
        return self.known[name]

    def close(self) -> None:
        self._file.close()


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
