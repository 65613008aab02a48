"""What README and docs/ tell a reader to run does run, and what they name exists.

A Python block below `<!-- python: compile -->`, which readers do not see, is compiled only: it needs a hub or a GPU.
"""

import contextlib
import io
import re
import runpy
import sys
import warnings
from functools import cache
from pathlib import Path
from pkgutil import resolve_name

import pytest

from saepatch.cli.main import main

pytestmark = pytest.mark.whole

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TEXTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [README, ROOT / "training" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
BLOCK = re.compile(r"^(?P<only><!-- python: compile -->\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
PLAIN = re.compile(r"^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
FOREIGN = (
    "jupytext ",
    "make ",
    "pip ",
    "torchrun ",
    "sbatch ",
    "wandb ",
    "trackio ",
)  # commands with settings of their own


def blocks(text: str) -> list[tuple[bool, str, int]]:
    """Of each Python block: whether it is run, its code, and the line it begins on."""
    return [
        (match["only"] is None, match["code"], text.count("\n", 0, match.start("code")) + 1)
        for match in BLOCK.finditer(text)
    ]


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if blocks(text) and "/tutorials/" not in name])
def test_the_python_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    assert TEXTS[name].count("```python") == len(blocks(TEXTS[name]))
    for is_run, code, line in blocks(TEXTS[name]):
        compiled = compile("\n" * (line - 1) + code, ROOT / name, "exec")
        if is_run:
            exec(compiled, namespace)
    printed = capsys.readouterr().out
    assert printed.count("[' I cannot help with that.']") == TEXTS[name].count("# [' I cannot help with that.']")
    if name in ("README.md", "docs/python.md"):
        assert re.search(r"^resid_post.3 \d+ +all +-?\d\.\d+ \[", printed, re.MULTILINE)  # effects
    if name == "docs/python.md":
        assert "Pearson" in printed  # of the screen against exact runs
        assert printed.index("Sure, here is") < printed.index("I cannot help with that.")


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 150
    ((_, code, _),) = blocks(TEXTS["README.md"])
    assert len(code.splitlines()) <= 16


@pytest.mark.parametrize("name", TEXTS)
def test_files_targets_and_python_names_exist(name):
    text = TEXTS[name]
    for path in re.findall(r"(?<![\w/.])((?!\S*NAME)(?:saepatch|training|experiments|docs|tests)/[\w/.-]*[\w/])", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\(([\w/.-]+)(?:#[\w-]*)?\)", text) if "docs/" not in name else []:
        assert ((ROOT / name).parent / path).exists(), path  # MkDocs checks the links inside docs/
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake ([a-z-]+)", " ".join([*SPAN.findall(text), *PLAIN.findall(text)])):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for dotted in re.findall(r"`((?:saepatch|training|experiments)(?:\.\w+)+)`", text):
        resolve_name(dotted)
    import saepatch

    for public in re.findall(r"`sp\.(\w+)", text):
        assert hasattr(saepatch, public), public


@cache
def help_of(program: str) -> str:
    """What `saepatch COMMAND --help` or `python -m MODULE --help` prints; empty where there is no such program."""
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.suppress(SystemExit),
    ):
        if program.startswith("saepatch "):
            main([*program.split()[1:], "--help" if "experiment" in program or "train" in program else "--help_all"])
        else:
            argv, sys.argv = sys.argv, [program, "--help_all" if program == "training" else "--help"]
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)  # its help does no harm
                    runpy.run_module(program, run_name="__main__", alter_sys=False)
            finally:
                sys.argv = argv
    return printed.getvalue()


def settings_of(program: str) -> set[str]:
    return set(re.findall(r"--[a-z][\w.]*", help_of(program)))


def programs_in(text: str) -> list[tuple[str, str]]:
    """Each program that the code of a text runs, and what follows it."""
    code = "\n".join([*PLAIN.findall(text.replace("\\\n", " ")), *SPAN.findall(text)]).replace("&&", "\n")
    runs = re.findall(r"(?:^|[\s`'(])(saepatch (?:experiment )?[a-z]+|python -m [\w.]+|-m training)\b([^`\n']*)", code)
    runs = [(program.removeprefix("python ").removeprefix("-m "), rest.split(" #")[0]) for program, rest in runs]
    return [(program, rest) for program, rest in runs if not program.endswith((".NAME", "experiment"))]


@pytest.mark.parametrize("name", TEXTS)
def test_commands_and_their_settings_exist(name):
    for program, rest in programs_in(TEXTS[name]):
        assert help_of(program).startswith("usage:"), program
        unknown = set(re.findall(r"(?<!\S)--[a-z][\w.]*", rest)) - settings_of(program)
        assert not unknown, f"{program}: {unknown}"


def test_settings_that_the_text_names_exist():
    programs = {program for text in TEXTS.values() for program, _ in programs_in(text)}
    known = set().union(*map(settings_of, programs)) | {"--help", "--help_all", "--version", "--print_completion"}
    for name, text in TEXTS.items():
        for span in SPAN.findall(PLAIN.sub("", text)):
            if not span.startswith(FOREIGN):
                assert set(re.findall(r"(?<!\S)--[a-z][\w.]*", span)) <= known, f"{name}: {span}"
