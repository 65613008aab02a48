"""Tables for the terminal, aligned by display width (wide characters count as two)."""

from collections.abc import Sequence

GAP = "  "


def text_table(head: Sequence[object], rows: Sequence[Sequence[object]], left: int = 1) -> str:
    """A table as text: a header line, if there are headers, and one line per row.

    Args:
        head: Column headers; empty: no header line.
        rows: Cells, written with `str`, None as a dash. Rows may be shorter than the longest.
        left: Number of left-aligned columns; the others, such as numbers, are right-aligned.
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
