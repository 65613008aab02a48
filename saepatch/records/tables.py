"""Tables for the terminal: columns as wide as what they hold, wide characters counted as two."""

from collections.abc import Sequence

GAP = "  "


def text_table(head: Sequence[object], rows: Sequence[Sequence[object]], left: int = 1) -> str:
    """A table as text: one line for the heads, unless there are none, and one for each row.

    Args:
        head: What stands over the columns; empty: nothing.
        rows: Cells, each written as `str` writes it, None as a dash. Rows may be shorter than the longest.
        left: How many columns are flush left; the others, such as numbers, are flush right.
    """
    from tabulate import tabulate  # what `saepatch --help` loads does without it

    cells = [["–" if cell is None else str(cell) for cell in row] for row in ([head, *rows] if head else rows)]
    width = max(map(len, cells), default=0)
    if not width:
        return ""
    full = [row + [""] * (width - len(row)) for row in cells]
    sides = ["left" if column < left else "right" for column in range(width)]
    text = tabulate(full, tablefmt="plain", colalign=sides, disable_numparse=True)
    return "\n".join(line.rstrip() for line in text.splitlines())
