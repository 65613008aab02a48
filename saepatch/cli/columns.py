"""Texts in columns on a terminal, redrawn while they grow."""

import textwrap
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from saepatch.report.text import visible

GAP = " │ "
LEAST = 24  # minimal width of a column in characters


def columns(texts: Sequence[str], titles: Sequence[str], width: int) -> list[str]:
    """Texts side by side under their titles, wrapped; non-printable characters are made visible."""
    each = max(LEAST, (width - len(GAP) * (len(texts) - 1)) // len(texts))
    wrapped = [_wrapped(text, each) for text in texts]
    rows = max(map(len, wrapped))
    lines = [GAP.join(title[:each].ljust(each) for title in titles).rstrip()]
    lines.append("─┼─".join("─" * each for _ in texts))
    for row in range(rows):
        lines.append(GAP.join((text[row] if row < len(text) else "").ljust(each) for text in wrapped).rstrip())
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    lines = []
    for line in text.strip().split("\n"):
        lines += textwrap.wrap(visible(line), width, break_long_words=True) or [""]
    return lines


@runtime_checkable
class TextOutput(Protocol):
    """A terminal or file that text is written to."""

    def write(self, text: str, /) -> int: ...
    def flush(self) -> None: ...
    def isatty(self) -> bool: ...


class Live:
    """A block of lines that is redrawn in place on a terminal; elsewhere only its last state is written."""

    def __init__(self, out: TextOutput, width: int, height: int) -> None:
        self._out, self.width, self._height = out, width, height
        self._terminal, self._drawn = out.isatty(), 0

    def show(self, lines: Sequence[str], last: bool = False) -> None:
        if not self._terminal:
            if last:
                self._out.write("\n".join(lines) + "\n")
            return
        # no more lines than the screen holds, since the cursor cannot move above its top
        shown = list(lines) if last else list(lines)[-(self._height - 2) :]
        if self._drawn:
            self._out.write(f"\x1b[{self._drawn}A\r\x1b[J")
        self._out.write("\n".join(shown) + "\n")
        self._out.flush()
        self._drawn = 0 if last else len(shown)
