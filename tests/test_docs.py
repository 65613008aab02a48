"""The documentation is built without a warning, as `make docs` does it, and its pages load nothing from elsewhere."""

import ast
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import saepatch

pytestmark = pytest.mark.whole

ROOT = Path(__file__).parents[1]


@pytest.mark.slow  # `make docs` fails on the same warnings
def test_the_site_is_built_without_warnings(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    names = (tmp_path / "reference" / "names.html").read_text(encoding="utf-8")
    assert all(f"<code>{name}</code></a>" in names for name in saepatch.__all__)  # each leads to its documentation
    rooms = {path.parent.name for path in (ROOT / "saepatch").glob("[a-z]*/__init__.py")}
    assert rooms <= {path.stem for path in (tmp_path / "reference").glob("*.html")}
    for page in tmp_path.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?(https?:|//)|<link[^>]*\shref=\"?(https?:|//)", text)
        assert not fetched, page


def layers(container: str) -> list[str]:
    """The layers that import-linter holds a package to, from the top."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (listed,) = re.findall(rf'^containers = \["{container}"\]$.*?^layers = (\[.*?\])$', text, re.MULTILINE | re.DOTALL)
    return ast.literal_eval(listed)


def test_the_rooms_in_the_architecture_are_those_that_the_linter_knows():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", text.partition("## The way of the data")[0], re.MULTILINE) == layers(
        "saepatch"
    )
    (training,) = re.findall(r"`training/` has the rooms (.*?),\s+with the same rule", text, re.DOTALL)
    assert re.findall(r"`(\w+)`", training) == layers("training")


@pytest.mark.parametrize("package", ["saepatch", "training"])
def test_each_room_says_in_a_line_what_it_is_for_and_what_it_may_import(package):
    below = dict(pairwise(layers(package)))
    for room in (ROOT / package).glob("[a-z]*/__init__.py"):
        summary, *paragraphs = (ast.get_docstring(ast.parse(room.read_text(encoding="utf-8"))) or "").split("\n\n")
        assert len(summary.splitlines()) == 1, room
        (named,) = [re.match(r"May import (\w+)", paragraph) for paragraph in paragraphs if "May import" in paragraph]
        assert named[1] == below[room.parent.name], room
