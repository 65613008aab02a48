"""Named measurements of an experiment, kept as they come: a stopped one goes on from them when it is started again.

An experiment decides what to measure next from what it has measured, so its parts cannot be numbered beforehand, as
those of `saepatch.runs.driver.drive` are: they have names. The file has one line of JSON each, after a first one with
all that decides them.
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
    """The measurements in a file, whose folder is locked meanwhile.

    Args:
        path: The file; made if need be.
        decides: By name, what has to be the same for measurements to belong to one run.
        key: What stands in the first line of files of earlier versions in place of all that.

    Raises:
        UserError: the file is of another run or damaged, or another process is at work in its folder.
        KeyboardInterrupt: stopped, by Ctrl-C or SIGTERM; the message says how to resume.
    """
    with stoppable(), locked(path.parent):
        kept = Measurements(path, decides, key)
        try:
            yield kept
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{len(kept.known)} measurements are kept; the same command goes on from there"
            ) from None


class Measurements:
    """See `measurements`."""

    def __init__(self, path: Path, decides: Mapping[str, Any], key: str = "") -> None:
        self.known: dict[str, Any] = {}
        self._path, beside = path, path.with_suffix(".json")  # where earlier versions kept what decides
        self._decides: dict[str, Any] = json.loads(json.dumps(decides))
        lines = list(map(_parsed, path.read_text(encoding="utf-8").split("\n")[:-1])) if path.is_file() else []
        if lines and lines[-1] is None:  # a kill cut it short
            lines.pop()
        if None in lines:
            raise UserError(f"{str(path)!r} is damaged: remove it, to measure anew")
        there: dict[str, Any] = (
            json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else lines.pop(0) if lines else {}
        )
        refuse_if_other(path.parent, there, {"key": key} if "key" in there else self._decides)
        for line in lines:
            name = line.pop("name" if "name" in line else "key")
            self.known[name] = line.get("value", line)
        if self.known:
            log.info("%d measurements are there already", len(self.known))
            self._rewrite()  # without a line that was cut short, in this version's form
        beside.unlink(missing_ok=True)

    def _rewrite(self) -> None:
        kept = [self._decides, *({"name": name, "value": value} for name, value in self.known.items())]
        with atomic(self._path) as temporary:
            temporary.write_text("".join(map(_line, kept)), encoding="utf-8")

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """What is known under the name; measured, and kept, if nothing is."""
        if name not in self.known:
            value = measure()
            if not self.known:  # with the first one: settings that turn out not to work leave nothing behind
                self._rewrite()
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line({"name": name, "value": value}))
            self.known[name] = json.loads(json.dumps(value))
        return self.known[name]

    def forget(self) -> None:
        """Remove the file: the run is finished."""
        self._path.unlink(missing_ok=True)


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
