"""What the README tells a reader to run does run."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.whole

README = Path(__file__).parents[1] / "README.md"


def test_the_python_in_the_readme_runs(capsys):
    first, *more = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(first.splitlines()) <= 10
    exec(compile("\n".join([first, *more]), "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert re.search(r"^resid_post.3 \d+ +all +-?\d\.\d+ \[", printed, re.MULTILINE)  # effects
    assert "Pearson" in printed  # of the screen against exact runs
    assert printed.index("Sure, here is") < printed.index("I cannot help with that.")
    assert printed.rstrip().endswith("[' I cannot help with that.']")


def test_paths_and_make_targets_in_the_readme_exist():
    text = README.read_text(encoding="utf-8")
    root = README.parent
    for path in re.findall(r"(?:training|experiments)/[\w/.-]+\.(?:yaml|md|png|svg|py)", text):
        assert (root / path).is_file(), path
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
