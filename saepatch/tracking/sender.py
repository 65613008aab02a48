"""The thread that calls a backend, so that the backend can neither stop nor slow the run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from queue import Full, Queue

from saepatch.tracking.backends import Backend

QUEUE_SIZE = 10_000  # calls that may wait for a backend: minutes of logging, at most about 50 MB
CALL_TIMEOUT = 60.0  # seconds after which a call that has not returned counts as hanging
START_TIMEOUT = 20.0  # seconds that a backend may take to start; without a network, W&B would take minutes
FINISH_TIMEOUT = 60.0  # seconds; without a limit, a lost connection would block a finished run for ever


@dataclass(frozen=True)
class Starter:
    """How a backend is started, and what else is to be done where it does not start, or not in time."""

    start: Callable[[], Backend]
    give_up: Callable[[], None] = lambda: None


class BackgroundSender:
    """Calls a backend from a daemon thread, in order; `send` only queues the call.

    A backend that raises is closed. A backend that does not respond for `CALL_TIMEOUT`, or is `QUEUE_SIZE` calls
    behind, is abandoned. Both are reported once, through `complain`.
    """

    def __init__(self, starter: Starter, complain: Callable[[str], None]) -> None:
        self._starter, self._complain = starter, complain
        self._calls: Queue[tuple[str, Callable[[Backend], None]] | None] = Queue(QUEUE_SIZE)
        self._backend: Backend | None = None
        self._calling_since: float | None = None
        self._started = threading.Event()
        self._closed = self._abandoned = False
        self._exit_code, self._began = 0, time.monotonic()
        self._thread = threading.Thread(target=self._work, name="saepatch tracker", daemon=True)
        self._thread.start()

    @property
    def sync_command(self) -> str | None:
        """The backend's `sync_command`; waits until the backend has started."""
        self._started.wait(START_TIMEOUT)
        return self._backend.sync_command if self._backend is not None else None

    def send(self, what: str, call: Callable[[Backend], None]) -> None:
        """Queue a call; `what` completes the sentence "could not …" in a warning."""
        since = self._calling_since
        if self._closed:
            return
        if since is not None and time.monotonic() - since > CALL_TIMEOUT:
            self._abandon(f"has not answered for {CALL_TIMEOUT:.0f} seconds")
            return
        try:
            self._calls.put_nowait((what, call))
        except Full:
            self._abandon(f"is {QUEUE_SIZE:,} messages behind")

    def finish(self, exit_code: int) -> bool:
        """Make the queued calls and close the backend; False if it was abandoned, earlier or for taking too long."""
        if not self._closed:
            self._closed, self._exit_code = True, exit_code
            try:
                self._calls.put_nowait(None)
            except Full:
                self._abandon(f"is {QUEUE_SIZE:,} messages behind")
        if not self._abandoned and not self._started.wait(max(0.0, START_TIMEOUT - (time.monotonic() - self._began))):
            self._abandon(f"did not start within {START_TIMEOUT:.0f} seconds")
        if not self._abandoned:
            self._thread.join(FINISH_TIMEOUT)
            if self._thread.is_alive():
                self._abandon(f"did not finish within {FINISH_TIMEOUT:.0f} seconds")
        return not self._abandoned

    def _work(self) -> None:
        began = self._succeeds("could not start", self._begin)
        if not began:
            self._closed = True
            self._starter.give_up()
        self._started.set()
        if not began:
            return
        assert self._backend is not None
        if self._abandoned:
            self._backend.abandon()
        while not self._abandoned and (queued := self._calls.get()) is not None:
            what, call = queued
            if not self._succeeds(f"could not {what}", partial(call, self._backend)):
                self._closed, self._exit_code = True, 1
                break
        self._succeeds("did not finish cleanly", partial(self._backend.finish, self._exit_code))

    def _begin(self) -> None:
        self._backend = self._starter.start()

    def _succeeds(self, complaint: str, call: Callable[[], None]) -> bool:
        self._calling_since = time.monotonic()
        try:
            call()
        except Exception as error:
            if not self._abandoned:
                self._complain(f"{complaint} ({reason(error)})")
            return False
        finally:
            self._calling_since = None
        return True

    def _abandon(self, why: str) -> None:
        self._closed = self._abandoned = True
        self._complain(why)
        if self._backend is not None:
            self._backend.abandon()
        else:
            self._starter.give_up()


def reason(error: Exception) -> str:
    """The first line of an error's message, or its class where there is no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
