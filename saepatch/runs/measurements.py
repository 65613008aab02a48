"""Named measurements of an experiment, stored as they are made, so that a stopped experiment resumes from them.

Which measurements an experiment needs depends on earlier ones, so they have names instead of numbers known beforehand,
as the parts of `saepatch.runs.driver.drive` have. The file holds one line of JSON per measurement, after a first line
with everything that determines their values.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saepatch.errors import UserError
from saepatch.records.files import atomic
from saepatch.runs.driver import locked
from saepatch.runs.parts import refuse_if_other
from saepatch.runs.progress import stoppable

log = logging.getLogger(__name__)


@contextmanager
def measurements(path: Path, decides: Mapping[str, Any], key: str = "") -> Iterator["Measurements"]:
    """Open the measurements in a file; its folder is locked meanwhile.

    Args:
        path: The file; created if missing.
        decides: Values, by name, that must agree for measurements to belong to one run.
        key: Hash that files of earlier versions have in place of `decides`.

    Raises:
        UserError: the file belongs to another run or is damaged, or another process works in its folder.
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM; the message says how to resume.
    """
    with stoppable(), locked(path.parent):
        kept = Measurements(path, decides, key)
        try:
            yield kept
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{len(kept.known)} measurements are stored; the same command resumes from them"
            ) from None


class Measurements:
    """See `measurements`."""

    def __init__(self, path: Path, decides: Mapping[str, Any], key: str = "") -> None:
        self.known: dict[str, Any] = {}
        self._path, beside = path, path.with_suffix(".json")  # `decides` in earlier versions
        self._decides: dict[str, Any] = json.loads(json.dumps(decides))
        lines = list(map(_parsed, path.read_text(encoding="utf-8").split("\n")[:-1])) if path.is_file() else []
        if lines and lines[-1] is None:  # truncated when the process was killed
            lines.pop()
        if None in lines:
            raise UserError(f"{str(path)!r} is damaged: remove it to measure again")
        stored: dict[str, Any] = (
            json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else lines.pop(0) if lines else {}
        )
        refuse_if_other(path.parent, stored, {"key": key} if "key" in stored else self._decides)
        for line in lines:
            name = line.pop("name" if "name" in line else "key")
            self.known[name] = line.get("value", line)
        if self.known:
            log.info("resuming from %d measurements", len(self.known))
            self._rewrite()  # in this version's format, without a truncated line
        beside.unlink(missing_ok=True)

    def _rewrite(self) -> None:
        kept = [self._decides, *({"name": name, "value": value} for name, value in self.known.items())]
        with atomic(self._path) as temporary:
            temporary.write_text("".join(map(_line, kept)), encoding="utf-8")

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """The stored measurement of this name; if there is none, call `measure` and store its result."""
        if name not in self.known:
            value = measure()
            if not self.known:  # only now: settings that fail before the first measurement leave no file
                self._rewrite()
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line({"name": name, "value": value}))
            self.known[name] = json.loads(json.dumps(value))
        return self.known[name]

    def forget(self) -> None:
        """Remove the file once the run is finished."""
        self._path.unlink(missing_ok=True)


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
