"""MkDocs hook: the tutorials with the output of their cells, as a notebook shows it.

Tutorials are jupytext notebooks in Markdown (`docs/tutorials/*.md`). Their cells run when the documentation is built,
and in the slow tests (`tests/test_tutorials.py`).
"""

from __future__ import annotations

import ast
import contextlib
import html
import io
import os
import re
import tempfile
from collections.abc import Iterator
from typing import Any

CELL = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_cells(text: str, name: str) -> Iterator[tuple[str, Any]]:
    """Run the cells of a tutorial in an empty folder; of each, what it prints and the value of its last line."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for match in CELL.finditer(text):
                line = text.count("\n", 0, match.start(1))
                tree, printed, value = ast.parse("\n" * line + match[1]), io.StringIO(), None
                last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
                with contextlib.redirect_stdout(printed):
                    exec(compile(tree, name, "exec"), namespace)  # noqa: S102 (our own tutorials)
                    if isinstance(last, ast.Expr):
                        expression = compile(ast.Expression(last.value), name, "eval")
                        value = eval(expression, namespace)  # noqa: S307 (our own tutorials)
                yield printed.getvalue(), value
        finally:
            os.chdir(before)


def output(printed: str, value: Any) -> str:
    """HTML of a cell's output."""
    shown = _text(printed) if printed else ""
    if value is not None:
        own = getattr(value, "_repr_html_", None)
        shown += own() if own is not None else _text(repr(value))
    return f'<div class="output" style="overflow-x: auto">{shown}</div>' if shown else ""


def _text(text: str) -> str:
    return f'<pre style="white-space: pre-wrap; font-size: 0.85em">{html.escape(text)}</pre>'


_OUTPUTS: dict[str, list[str]] = {}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Runs the cells of a tutorial, and marks where their outputs go."""
    uri = page.file.src_uri
    if not uri.startswith("tutorials/") or not CELL.search(markdown):
        return markdown
    _OUTPUTS[uri] = [output(*each) for each in run_cells(markdown, uri)]
    numbers = iter(range(len(_OUTPUTS[uri])))
    return CELL.sub(lambda match: f'{match[0]}\n\n<div data-output="{next(numbers)}"></div>\n', markdown)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Puts the outputs in their places."""
    for number, shown in enumerate(_OUTPUTS.get(page.file.src_uri, ())):
        content = content.replace(f'<div data-output="{number}"></div>', shown)
    return content
