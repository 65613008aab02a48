"""Prefetching: the next item is computed in a thread while the current one is in use."""

import atexit
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

import torch

JOIN_TIMEOUT = 10.0  # seconds to wait for the thread to end
Item = TypeVar("Item")


class Stopped(Exception):
    """Raised in the thread once its items are no longer needed."""


def ahead(
    items: Iterator[Item], stopping: threading.Event, enough: Callable[[Item], bool]
) -> Generator[Item, None, None]:
    """The items, each computed in a thread while the one before it is in use, so that two exist at a time.

    `enough` is asked of each item in turn, and ends them after the first for which it is true. Exceptions in the thread
    are raised here. Closing this generator sets `stopping`, which `items` should check, and waits for the thread, but
    at most `JOIN_TIMEOUT` seconds, since it may hang in a network connection.
    """
    requested: queue.SimpleQueue[bool] = queue.SimpleQueue()
    results: queue.SimpleQueue[tuple[Item | None, BaseException | None]] = queue.SimpleQueue()
    threads = torch.get_num_threads()

    def work() -> None:
        torch.set_num_threads(threads)  # a new thread has torch's default, which would change the order of sums
        try:
            while requested.get():
                go_on(stopping)
                item = next(items, None)
                results.put((item, None))
                if item is None:
                    return
        except Stopped:
            results.put((None, None))
        except BaseException as error:
            results.put((None, error))

    thread = threading.Thread(target=work, name="activations", daemon=True)

    def end() -> None:
        stopping.set()
        requested.put(False)
        if thread is not threading.current_thread():  # it is, if the garbage collector closes the generator there
            thread.join(JOIN_TIMEOUT)

    requested.put(True)
    thread.start()
    atexit.register(end)  # the interpreter must not exit while the thread is in a forward pass
    try:
        while True:
            item, error = results.get()
            if error is not None:
                raise error
            if item is None:
                return
            last = enough(item)
            requested.put(not last)
            yield item
            if last:
                return
    finally:
        end()
        atexit.unregister(end)


def go_on(stopping: threading.Event) -> None:
    """Raises Stopped once the thread should end."""
    if stopping.is_set():
        raise Stopped
