"""Named measurements of an experiment, stored as they are made, so that a stopped experiment resumes from them.

Which measurements an experiment needs depends on earlier ones, so they have names instead of numbers known beforehand,
as the parts of `saepatch.runs.driver.drive` have. `measurements.jsonl` holds one line of JSON per measurement, after a
first line with everything that determines their values.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saepatch.errors import UserError
from saepatch.records.files import atomic
from saepatch.runs.catalogue import MEASUREMENTS
from saepatch.runs.driver import locked
from saepatch.runs.parts import refuse_if_other
from saepatch.runs.progress import stoppable

log = logging.getLogger(__name__)


@contextmanager
def measurements(
    out: Path, experiment: str, decides: Mapping[str, Any], earlier: str = "", key: str = ""
) -> Iterator["Measurements"]:
    """The measurements of an experiment, whose folder is locked meanwhile.

    Args:
        out: The experiment's folder; created if needed.
        experiment: The name that `saepatch runs` lists it under.
        decides: Settings and facts, by name, that must agree for measurements to belong to one run; a warning is
            logged if only the `versions` of libraries differ.
        earlier: Name of the file in earlier versions, which is read too.
        key: The first line of that file in still earlier versions, in place of `decides`.

    Raises:
        UserError: the measurements are of another run or damaged, or another process works in the folder.
        KeyboardInterrupt: stopped, by Ctrl-C or SIGTERM; the message says how to resume.
    """
    path = out / MEASUREMENTS
    with stoppable(), locked(out):
        if earlier and (out / earlier).exists() and not path.exists():
            path = out / earlier
        kept = Measurements(path, {"experiment": experiment, **decides}, key)
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
        self._path, beside = path.with_name(MEASUREMENTS), path.with_suffix(".json")  # `beside`: of earlier versions
        self._decides = _by_name(json.loads(json.dumps(decides)))
        lines = list(map(_parsed, path.read_text(encoding="utf-8").split("\n")[:-1])) if path.is_file() else []
        if lines and lines[-1] is None:  # truncated when the process was killed
            lines.pop()
        if None in lines:
            raise UserError(f"{str(path)!r} is damaged: remove it to measure again")
        recorded: dict[str, Any] = (
            json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else lines.pop(0) if lines else {}
        )
        first, now = recorded.get("versions"), self._decides.get("versions")
        if first and now and first != now:
            log.warning("library versions have changed since this run was started: see %s", self._path)
            self._decides["versions"] = first
        refuse_if_other(path.parent, _by_name(recorded), {"key": key} if "key" in recorded else self._decides)
        for line in lines:
            name = line.pop("name" if "name" in line else "key")
            self.known[name] = line.get("value", line)
        if self.known:
            log.info("resuming from %d measurements", len(self.known))
            self._rewrite()  # in this version's format, without a truncated line
            if path != self._path:
                path.unlink()
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
        """Remove the file, once what the measurements were for is stored elsewhere."""
        self._path.unlink(missing_ok=True)


def _by_name(decides: Mapping[str, Any]) -> dict[str, Any]:
    """With each setting under its own name, so that a refusal names the settings that differ."""
    return {**decides.get("settings", {}), **{name: value for name, value in decides.items() if name != "settings"}}


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
