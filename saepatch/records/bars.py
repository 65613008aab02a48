"""Progress: a bar on a terminal and in a notebook, lines in a log file."""

import io
import sys
from typing import Any

from tqdm.auto import tqdm as automatic
from tqdm.std import tqdm

EVERY = 30.0  # seconds between lines


class _Lines(io.TextIOBase):
    """Standard error for a bar, with each redrawing on a line of its own."""

    def write(self, text: str) -> int:
        if drawn := text.strip("\r\n\x1b[A "):
            sys.stderr.write(drawn + "\n")
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(shown: bool, **options: Any) -> "tqdm[Any]":
    """A bar of tqdm with these options, hidden unless `shown`; in a log file, a line every half minute."""
    if not shown or sys.stderr.isatty() or automatic.__module__ == "tqdm.notebook":
        return automatic(disable=not shown, leave=False, **options)
    return tqdm(file=_Lines(), mininterval=EVERY, maxinterval=EVERY, leave=False, ascii=True, ncols=100, **options)
