"""Guests beside the local log, and the thread that speaks to one so that it can neither stop nor slow a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Full, Queue
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from saepatch.report import Chart

WAITING = 10_000  # messages that may wait for a guest: minutes of any sensible logging, and some 50 MB at most
CALL_TIMEOUT = 60.0  # seconds after which a call that has not returned counts as hanging


@dataclass(frozen=True)
class About:
    """What a guest is told of a run when it starts; `saepatch.tracking.open.open_tracker` says what each means."""

    out: Path
    run: str
    config: Mapping[str, Any]
    project: str
    run_id: str
    resumed: bool
    group: str
    job_type: str | None
    axes: Mapping[str, str]


@runtime_checkable
class Guest(Protocol):
    """An experiment tracker beside the local log. Any method may raise anything, or hang; all but `abandon` are called
    from one thread, in the order of the run.

    Attributes:
        sync_command: The shell line that uploads what the guest keeps offline; None where there is nothing to upload.
    """

    sync_command: str | None

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def histogram(self, name: str, counts: Sequence[float], edges: Sequence[float], step: int) -> None: ...

    def summarise(self, values: Mapping[str, float]) -> None: ...

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None: ...

    def curve(self, name: str, x: str, points: Sequence[tuple[float, Mapping[str, float]]]) -> None: ...

    def figure(self, name: str, chart: Chart, step: int) -> None: ...

    def page(self, name: str, path: Path, step: int) -> None: ...

    def configure(self, settings: Mapping[str, Any]) -> None: ...

    def artifact(self, name: str, folder: Path, about: Mapping[str, Any], upload: bool) -> None: ...

    def finish(self, exit_code: int) -> None: ...

    def abandon(self) -> None:
        """See that the interpreter does not wait for the guest when it exits; called while another call hangs."""


class Courier:
    """Takes messages to a guest, from a daemon thread and in their order; `send` only puts them into a queue.

    A guest that raises is closed. One that does not answer for `CALL_TIMEOUT`, or is `WAITING` messages behind, is left
    alone from then on. Either is said once, to `complain`.
    """

    def __init__(self, start: Callable[[], Guest], complain: Callable[[str], None]) -> None:
        self._start, self._complain = start, complain
        self._messages: Queue[tuple[str, Callable[[Guest], None]] | None] = Queue(WAITING)
        self._guest: Guest | None = None
        self._calling_since: float | None = None
        self._started = threading.Event()
        self._closed = self._abandoned = False
        self._exit_code = 0
        self._thread = threading.Thread(target=self._work, name="saepatch tracker", daemon=True)
        self._thread.start()

    @property
    def sync_command(self) -> str | None:
        """The guest's, once it has started: waits for that."""
        self._started.wait(CALL_TIMEOUT)
        return self._guest.sync_command if self._guest is not None else None

    def send(self, what: str, say: Callable[[Guest], None]) -> None:
        """Have the guest told something, some time; `what` completes "could not"."""
        since = self._calling_since
        if self._closed:
            return
        if since is not None and time.monotonic() - since > CALL_TIMEOUT:
            self._abandon(f"has not answered for {CALL_TIMEOUT:.0f} seconds")
            return
        try:
            self._messages.put_nowait((what, say))
        except Full:
            self._abandon(f"is {WAITING:,} messages behind")

    def finish(self, exit_code: int, timeout: float) -> bool:
        """Deliver what waits and close the guest; False where it was left alone, now or after `timeout` seconds."""
        if not self._closed:
            self._closed, self._exit_code = True, exit_code
            try:
                self._messages.put_nowait(None)
            except Full:
                self._abandon(f"is {WAITING:,} messages behind")
        if not self._abandoned:
            self._thread.join(timeout)
            if self._thread.is_alive():
                self._abandon(f"did not finish within {timeout:.0f} seconds")
        return not self._abandoned

    def _work(self) -> None:
        began = self._succeeds("could not start", self._begin)
        self._started.set()
        if not began:
            self._closed = True
            return
        assert self._guest is not None
        if self._abandoned:
            self._guest.abandon()
        while not self._abandoned and (message := self._messages.get()) is not None:
            what, say = message
            if not self._succeeds(f"could not {what}", partial(say, self._guest)):
                self._closed, self._exit_code = True, 1
                break
        self._succeeds("did not finish cleanly", partial(self._guest.finish, self._exit_code))

    def _begin(self) -> None:
        self._guest = self._start()

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
        if self._guest is not None:
            self._guest.abandon()


def reason(error: Exception) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
