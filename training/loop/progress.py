"""Progress of a training run, and requests to stop it."""

import logging
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from tqdm import tqdm

from saepatch.runs.progress import LOG_EVERY, stop_signals

log = logging.getLogger(__name__)


@dataclass
class StopRequest:
    """Whether a signal asked the run to stop."""

    stop: bool = False


@contextmanager
def deferred_signals() -> Iterator[StopRequest]:
    """Record SIGTERM (from a scheduler) and SIGINT, to stop after the current step; a second SIGINT interrupts it."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if request.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.stop = True

    with stop_signals(note):
        yield request


class ProgressBar:
    """A progress bar on a terminal; elsewhere a log line at intervals."""

    def __init__(self, total: int, done: int, shown: bool) -> None:
        self._shown, self._total, self._done = shown, total, done
        self._at_start, self._start = done, time.monotonic()
        self._last_line = self._start
        bar = shown and sys.stderr.isatty()
        self._lines = shown and not bar
        self._bar = tqdm(
            total=total, initial=done, unit="tok", unit_scale=True, desc="training", mininterval=0.5, disable=not bar
        )

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    @property
    def rate(self) -> float:
        """Tokens per second since this process started."""
        return (self._done - self._at_start) / max(time.monotonic() - self._start, 1e-9)

    def add(self, tokens: int) -> None:
        self._done += tokens
        self._bar.update(tokens)

    def show(self, figures: dict[str, float]) -> None:
        texts = {name: f"{value:.3g}" for name, value in figures.items()}
        self._bar.set_postfix(texts, refresh=False)
        now = time.monotonic()
        if self._lines and now - self._last_line >= LOG_EVERY:
            self._last_line = now
            remaining = (self._total - self._done) / max(self.rate, 1e-9)
            line = ", ".join(f"{name} {value}" for name, value in texts.items())
            log.info(
                "%s of %s tokens, %.0f per second, %.0f s left: %s",
                *(f"{n:,}" for n in (self._done, self._total)),
                self.rate,
                remaining,
                line,
            )
