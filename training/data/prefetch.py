"""Prefetching: the next item is made in a thread while the current one is in use."""

import atexit
import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

import torch

PATIENCE = 10.0  # seconds to wait for a thread to end
Item = TypeVar("Item")


class Stopped(Exception):
    """Raised in the thread when nobody wants what it makes any more."""


def ahead(items: Iterator[Item], stopping: threading.Event) -> Generator[Item, None, None]:
    """The items, each made in a thread while the one before it is in use: two exist at a time.

    An exception of the thread is raised here. Closing this generator sets `stopping`, which `items` is to look at, and
    waits for the thread; not for ever, as a connection may keep it.
    """
    wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
    made: queue.SimpleQueue[tuple[Item | None, BaseException | None]] = queue.SimpleQueue()
    threads = torch.get_num_threads()

    def work() -> None:
        torch.set_num_threads(threads)  # a new thread has the library's default, and sums in another order with it
        try:
            while wanted.get():
                go_on(stopping)
                item = next(items, None)
                made.put((item, None))
                if item is None:
                    return
        except Stopped:
            made.put((None, None))
        except BaseException as error:
            made.put((None, error))

    thread = threading.Thread(target=work, name="activations", daemon=True)

    def end() -> None:
        stopping.set()
        wanted.put(False)
        if thread is not threading.current_thread():  # where the garbage collector closes the generator
            thread.join(PATIENCE)

    wanted.put(True)
    thread.start()
    atexit.register(end)  # the interpreter must not end under a thread that is in the midst of a forward
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is None:
                return
            wanted.put(True)
            yield item
    finally:
        end()
        atexit.unregister(end)


def go_on(stopping: threading.Event) -> None:
    if stopping.is_set():
        raise Stopped
