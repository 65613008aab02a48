"""Timing of the stages of a run."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stage(name: str, clock: dict[str, float], log: logging.Logger) -> Iterator[None]:
    """Log the name of a stage and record its duration in seconds in `clock`."""
    log.info("%s …", name)
    start = time.monotonic()
    yield
    clock[name] = round(time.monotonic() - start, 2)
