"""How far a long run is, and how it is asked to stop."""

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from tqdm import tqdm

from saepatch.settings.restore import RestoreConfig
from saepatch.settings.sweeps import SweepConfig
from saepatch.tracking.open import Tracker

log = logging.getLogger(__name__)

LOG_EVERY = 30.0  # seconds


class Check:
    """Raises KeyboardInterrupt once a signal asked for it: one that was swallowed on its way up is raised again."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> None:
        if self.asked:
            raise KeyboardInterrupt

    def hear(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        raise KeyboardInterrupt


@contextmanager
def said_once(*loggers: str) -> Iterator[None]:
    """What these loggers have said they do not say again, whatever numbers stand in it: parts are much alike."""
    said: set[object] = set()

    def first(record: logging.LogRecord) -> bool:
        new = record.levelno > logging.WARNING or record.msg not in said
        said.add(record.msg)
        return new

    there = [logging.getLogger(name) for name in loggers]
    for logger in there:
        logger.addFilter(first)
    try:
        yield
    finally:
        for logger in there:
            logger.removeFilter(first)


@contextmanager
def stoppable() -> Iterator[Check]:
    """SIGTERM (of a scheduler) stops like Ctrl-C, and leaves no half of anything. Only where there is a main thread."""
    check = Check()
    try:
        with stop_signals(check.hear):
            yield check
    except Exception as error:
        if check.asked:  # libraries turn an interrupt that comes in their midst into errors of their own
            raise KeyboardInterrupt from error
        raise


@contextmanager
def stop_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle SIGINT and SIGTERM, unless they are ignored (SIGINT in the background); only in the main thread."""
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


def shows_bar(config: SweepConfig | RestoreConfig) -> bool:
    """Where nobody watches, each step of a bar would be one more line of a log file."""
    wanted = config.progress == "bar" or (config.progress == "auto" and sys.stderr.isatty())
    return wanted and not (config.quiet or config.json)


class Meter:
    """How far a run is: a bar on a terminal, else a line in the log every half minute; and in the tracker."""

    def __init__(
        self,
        parts: int,
        done: int,
        edits: int,
        config: SweepConfig | RestoreConfig,
        tracker: Tracker,
        unit: str = "edits",
    ) -> None:
        self.edits, self._unit = edits, unit
        self._parts, self._done, self._at_start = parts, done, (done, edits)
        self._tracker = tracker
        self._start = self._said = time.monotonic()
        self._lines = not (config.quiet or config.json) and not shows_bar(config)
        self._bar = tqdm(total=parts, initial=done, unit="part", disable=not shows_bar(config))

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    @property
    def rate(self) -> float:
        """Edits a second since this process started."""
        return (self.edits - self._at_start[1]) / max(time.monotonic() - self._start, 1e-9)

    def ran(self, edits: int) -> None:
        self.edits += edits
        self._bar.set_postfix_str(f"{self.edits:,} {self._unit}, {self.rate:,.0f}/s", refresh=False)
        self._bar.update(0)
        now = time.monotonic()
        if self._lines and now - self._said >= LOG_EVERY:
            self._said = now
            log.info("%s", self._line(now))

    def part_done(self) -> None:
        self._done += 1
        self._bar.update(1)
        values = {self._unit: self.edits, f"{self._unit}_per_second": self.rate, "parts": self._done}
        self._tracker.log(values, self.edits)

    def _line(self, now: float) -> str:
        done = self._done - self._at_start[0]
        left = f", about {_span((now - self._start) / done * (self._parts - self._done))} left" if done else ""
        return f"{self._done} of {self._parts} parts, {self.edits:,} {self._unit}, {self.rate:,.0f} a second{left}"


def _span(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )
