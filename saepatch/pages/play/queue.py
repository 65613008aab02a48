"""Visitors of one model wait in line: one job runs at a time, and each learns how many are before it."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Event
from typing import Any

from saepatch.errors import UserError

log = logging.getLogger(__name__)

Message = Mapping[str, Any]
LONGEST = 100  # visitors in line


class Queue:
    """Runs jobs in the order in which they came, all in one thread: a splice belongs to the thread that made it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "model")
        self._jobs: list[_Job] = []

    async def run(self, steps: Callable[[], Iterator[Message]]) -> AsyncIterator[Message]:
        """What a job yields, and before it `{"place": n}` whenever its place changes, n being the jobs before it.

        A mistake of the visitor's becomes `{"error": …}`. A job whose visitor has gone ends at its next step.
        """
        if len(self._jobs) >= LONGEST:
            yield {"error": f"{LONGEST} requests are waiting already: try again later"}
            return
        job = _Job(asyncio.get_running_loop())
        self._jobs.append(job)
        self._tell_places()
        work = self._thread.submit(self._work, job, steps)
        try:
            while (message := await job.inbox.get()) is not None:
                yield message
        finally:
            job.left.set()
            if work.cancel():
                self._end(job)

    def close(self) -> None:
        """End the job that runs at its next step, and all others before they begin."""
        for job in self._jobs:
            job.left.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _work(self, job: "_Job", steps: Callable[[], Iterator[Message]]) -> None:
        try:
            if not job.left.is_set():
                for message in steps():
                    if job.left.is_set():
                        break
                    job.tell(message)
        except UserError as error:
            job.tell({"error": str(error)})
        except Exception:
            log.exception("a request of the page failed")
            job.tell({"error": "this failed in saepatch itself: the terminal of saepatch play says how"})
        finally:
            with suppress(RuntimeError):  # the loop has ended, and nobody waits any more
                job.loop.call_soon_threadsafe(self._end, job)

    def _end(self, job: "_Job") -> None:
        if job in self._jobs:
            self._jobs.remove(job)
        job.inbox.put_nowait(None)
        self._tell_places()

    def _tell_places(self) -> None:
        for place, job in enumerate(self._jobs):
            if job.place != place:
                job.place = place
                job.inbox.put_nowait({"place": place})


class _Job:
    """A visitor's job: its messages, its place in line, and whether its visitor has gone."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.inbox: asyncio.Queue[Message | None] = asyncio.Queue()
        self.place = -1
        self.left = Event()

    def tell(self, message: Message) -> None:
        with suppress(RuntimeError):  # as above
            self.loop.call_soon_threadsafe(self.inbox.put_nowait, message)
