"""`make mutants`: every mutant of the table, in a copy of the tree, has to make one of its tests fail.

A mutant whose text is not found exactly once, or whose tests fail without it, is refused. Exits with 1 if one survives.
Arguments choose mutants by a part of their file's path or of their text:

    python -m mutants statistics 'std('
"""

import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest
from tabulate import tabulate

from mutants.table import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
COPIED = ("saepatch", "training", "experiments", "tests", "docs", "README.md", "pyproject.toml")
# Imported once: tests run in forks of this process. Nothing of the tree itself is imported here.
HEAVY = ("datasets", "pandas", "pyarrow.parquet", "sae_lens", "scipy.stats", "torch", "transformers")
PATIENCE = 600.0  # seconds that the tests of a mutant may take
CRASHED = 64
PASSED, FAILED = pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED


def run_tests(tree: Path, tests: Sequence[str]) -> tuple[int | None, str]:
    """Exit code of pytest in a tree (None: not ready in time), and the first failure or the end of its output."""
    log = tree / "pytest.log"
    process = os.fork()
    if not process:
        code = CRASHED
        try:
            code = _in_tree(tree, tests, log)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + PATIENCE
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return None, f"not ready after {PATIENCE:.0f} s"
        time.sleep(0.05)
    said = log.read_text(encoding="utf-8", errors="replace")
    failed = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return os.waitstatus_to_exitcode(status), failed[0].partition(" - ")[0] if failed else said[-2000:]


def _in_tree(tree: Path, tests: Sequence[str], log: Path) -> int:
    os.chdir(tree)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.path[:] = [str(tree), *(path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "tests"))]
    sys.dont_write_bytecode = True  # a mutant may be as long and as old as what it replaces
    os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    return int(pytest.main(["-x", "-q", "--disable-plugin-autoload", "-p", "no:cacheprovider", *tests]))


def check(tree: Path, mutants: Sequence[Mutant]) -> None:
    """Leave with a message where a mutant's text is not found exactly once, or tests fail without any mutant."""
    for mutant in mutants:
        if (times := mutant.found(tree)) != 1:
            sys.exit(f"{mutant.file}: {mutant.old!r} is found {times} times: give a text that is found once")
    code, said = run_tests(tree, sorted({test for mutant in mutants for test in mutant.tests}))
    if code != PASSED:
        sys.exit(f"tests fail without any mutant: {said}")


def survives(tree: Path, mutant: Mutant) -> tuple[bool, str]:
    """Whether a mutant's tests pass, and else the one that failed."""
    path = tree / mutant.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        code, said = run_tests(tree, mutant.tests)
    finally:
        path.write_text(text, encoding="utf-8")
    if code not in (None, PASSED, FAILED):
        sys.exit(f"{mutant.file}: with {mutant.new!r}, the tests cannot run:\n{said}")
    return code == PASSED, "" if code == PASSED else said


def main(chosen: Sequence[str]) -> int:
    mutants = [m for m in MUTANTS if not chosen or any(part in f"{m.file} {m.old} {m.new}" for part in chosen)]
    if not mutants:
        sys.exit(f"no mutant contains {' or '.join(map(repr, chosen))}")
    for name in HEAVY:
        import_module(name)
    rows, survivors = [], 0
    with tempfile.TemporaryDirectory(prefix="mutants") as folder:
        tree = Path(folder)
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, tree / name)
        check(tree, mutants)
        for number, mutant in enumerate(mutants, 1):
            start = time.monotonic()
            survived, by = survives(tree, mutant)
            survivors += survived
            verdict = "SURVIVED" if survived else "killed"
            seconds = time.monotonic() - start
            print(f"{number}/{len(mutants)} {verdict} in {seconds:.0f} s: {mutant.file}: {mutant.new}", flush=True)
            rows.append([mutant.file, mutant.new, verdict, by.removeprefix("FAILED ")])
    print(tabulate(rows, ["file", "mutant", "verdict", "first test that failed"]))
    print(f"{len(mutants) - survivors} of {len(mutants)} mutants killed")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
