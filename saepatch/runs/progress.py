"""Progress of a long run, and requests to stop it."""

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from tqdm import tqdm

from saepatch.settings.circuit import CircuitConfig
from saepatch.settings.edit import EditConfig
from saepatch.settings.restore import RestoreConfig
from saepatch.settings.sweeps import SweepConfig
from saepatch.tracking.open import Tracker

log = logging.getLogger(__name__)

LOG_EVERY = 30.0  # seconds


class Check:
    """Raises KeyboardInterrupt at every call after a stop signal, in case a library swallowed the first one."""

    def __init__(self) -> None:
        self.stop_requested = False

    def __call__(self) -> None:
        if self.stop_requested:
            raise KeyboardInterrupt

    def hear(self, number: int, frame: FrameType | None) -> None:
        self.stop_requested = True
        raise KeyboardInterrupt


@contextmanager
def messages_once(*loggers: str) -> Iterator[None]:
    """Let each message of these loggers pass once, whatever its arguments: every part would repeat it."""
    logged: set[object] = set()

    def is_new(record: logging.LogRecord) -> bool:
        new = record.levelno > logging.WARNING or record.msg not in logged
        logged.add(record.msg)
        return new

    filtered = [logging.getLogger(name) for name in loggers]
    for logger in filtered:
        logger.addFilter(is_new)
    try:
        yield
    finally:
        for logger in filtered:
            logger.removeFilter(is_new)


@contextmanager
def stoppable() -> Iterator[Check]:
    """Make SIGTERM (from a scheduler) stop the run as Ctrl-C does. Only in the main thread."""
    check = Check()
    try:
        with stop_signals(check.hear):
            yield check
    except Exception as error:
        if check.stop_requested:  # a library may turn an interrupt into an error of its own
            raise KeyboardInterrupt from error
        raise


@contextmanager
def stop_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle SIGINT and SIGTERM unless they are ignored, as SIGINT is in background jobs. Only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number, previous in before.items():
            if previous is not signal.SIG_IGN:
                signal.signal(number, handler)
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous if previous is not None else signal.SIG_DFL)


def shows_bar(config: SweepConfig | RestoreConfig | CircuitConfig | EditConfig) -> bool:
    """Whether to show a progress bar; by default only on a terminal, since in a log file each step is a new line."""
    wanted = config.progress == "bar" or (config.progress == "auto" and sys.stderr.isatty())
    return wanted and not (config.quiet or config.json)


class Meter:
    """Progress of a run: a bar on a terminal, or else a log line every half minute; logged to the tracker as well."""

    def __init__(
        self,
        parts: int,
        done: int,
        edits: int,
        config: SweepConfig | RestoreConfig | CircuitConfig | EditConfig,
        tracker: Tracker,
        unit: str = "edits",
    ) -> None:
        self.edits, self._unit = edits, unit
        self._parts, self._done, self._at_start = parts, done, (done, edits)
        self._tracker = tracker
        self._start = self._last_line = time.monotonic()
        self._lines = not (config.quiet or config.json) and not shows_bar(config)
        self._bar = tqdm(total=parts, initial=done, unit="part", disable=not shows_bar(config))

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    @property
    def rate(self) -> float:
        """Edits per second since this process started."""
        return (self.edits - self._at_start[1]) / max(time.monotonic() - self._start, 1e-9)

    def ran(self, edits: int) -> None:
        self.edits += edits
        self._bar.set_postfix_str(f"{self.edits:,} {self._unit}, {self.rate:,.0f}/s", refresh=False)
        self._bar.update(0)
        now = time.monotonic()
        if self._lines and now - self._last_line >= LOG_EVERY:
            self._last_line = now
            log.info("%s", self._line(now))

    def part_done(self) -> None:
        self._done += 1
        self._bar.update(1)
        values = {self._unit: self.edits, f"{self._unit}_per_second": self.rate, "parts": self._done}
        self._tracker.log(values, self.edits)

    def _line(self, now: float) -> str:
        done = self._done - self._at_start[0]
        remaining = f", about {_span((now - self._start) / done * (self._parts - self._done))} left" if done else ""
        return (
            f"{self._done} of {self._parts} parts, {self.edits:,} {self._unit}, {self.rate:,.0f} per second{remaining}"
        )


def _span(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )
