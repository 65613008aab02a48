"""The documentation is built without a warning, as `make docs` does it, and its pages load nothing from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import saepatch

pytestmark = pytest.mark.whole

ROOT = Path(__file__).parents[1]


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
