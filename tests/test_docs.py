"""Every docstring is rendered without a warning, as `make docs` does it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.whole

ROOT = Path(__file__).parents[1]


def test_documentation_is_rendered_without_warnings(tmp_path):
    makefile = (ROOT / "Makefile").read_text()
    (named,) = re.findall(r"^MODULES = (.*\\\n.*)$", makefile, re.M)
    modules = [word for word in named.replace("\\\n", " ").split() if re.fullmatch(r"[a-z]\w*(\.\w+)*", word)]
    modules += [f"saepatch.{path.stem}" for path in sorted((ROOT / "saepatch").glob("[a-z]*.py"))]
    assert {"saepatch", "saepatch.pages", "saepatch.splicing.splice", "training"} <= set(modules)
    command = [sys.executable, "-W", "error::UserWarning", "-m", "pdoc", "--docformat", "google"]
    done = subprocess.run(
        [*command, "--output-directory", str(tmp_path), *modules], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "splicing" in (tmp_path / "index.html").read_text()
    assert (tmp_path / "training" / "learner.html").is_file()
