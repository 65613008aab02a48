"""The tutorials run, from the first cell to the checks of their exercises, and open as notebooks."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("[0-9]*.md"))


def hook():
    spec = importlib.util.spec_from_file_location("executed", ROOT / "docs" / "executed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(path):
    outputs = list(hook().run_cells(path.read_text(encoding="utf-8"), path.name))
    assert sum(value is not None or bool(printed) for printed, value in outputs) >= 4


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_is_a_notebook_in_text_form_with_exercises_that_are_checked(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("---\njupyter:\n  jupytext:\n")
    exercises = text.partition("\n## Exercises\n")[2]
    assert exercises.count("```python\n") == exercises.count("\n**") == 2
    assert all("assert " in cell for cell in hook().CELL.findall(exercises))
    assert f"({path.name})" in (path.parent / "index.md").read_text(encoding="utf-8")


def test_outputs_stand_below_their_cells():
    executed, page = hook(), SimpleNamespace(file=SimpleNamespace(src_uri="tutorials/x.md"))
    text = 'Words.\n\n```python\nprint("<b>")\nx = 3\n```\n\n```python\nx + 1\n```\n'
    marked = executed.on_page_markdown(text, page)
    assert marked.count("```\n\n<div data-output=") == 2
    shown = executed.on_page_content(marked, page)
    assert shown.count('<div class="output" style="overflow-x: auto"><pre') == 2
    assert ">&lt;b&gt;\n</pre>" in shown
    assert ">4</pre>" in shown
    with pytest.raises(ZeroDivisionError):
        executed.on_page_markdown("```python\n1 / 0\n```\n", page)
