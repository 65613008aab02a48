"""The names that `import saepatch` gives: written once, in the stub, and resolved on first use."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import saepatch

STUB = Path(saepatch.__file__).with_suffix(".pyi")


def in_the_stub() -> dict[str, str]:
    """The module of each name."""
    nodes = ast.parse(STUB.read_text(encoding="utf-8")).body
    assert all(isinstance(node, ast.ImportFrom) and node.level == 1 for node in nodes)
    pairs = [(alias, node.module) for node in nodes for alias in node.names]
    # `import a as a` is what makes a stub's name public to type checkers.
    assert all(alias.asname == alias.name for alias, _ in pairs)
    assert len({alias.name for alias, _ in pairs}) == len(pairs)
    return {alias.name: f"saepatch.{module}" for alias, module in pairs}


def test_every_name_of_the_stub_resolves_to_what_it_says():
    assert sorted(saepatch.__all__) == sorted(dir(saepatch)) == sorted(in_the_stub())
    for name, module in in_the_stub().items():
        value = getattr(saepatch, name)
        if inspect.ismodule(value):
            assert value.__name__ == f"{module}.{name}"
        else:
            assert value.__name__ == name
            assert value is getattr(sys.modules[module], name)
            assert value.__doc__, name
    with pytest.raises(AttributeError, match="nosuch"):
        _ = saepatch.nosuch


def test_no_public_name_is_that_of_a_room():
    """Importing the room would put the module in the name's place."""
    rooms = {path.stem for path in STUB.parent.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert not rooms & set(saepatch.__all__)


def test_names_resolve_in_a_fresh_process():
    code = "import sys, saepatch as sp; assert 'torch' not in sys.modules; print(sp.metrics, sp.Effects)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "saepatch.engine.metrics" in done.stdout, done.stderr
    assert "saepatch.measure.results.effects.Effects" in done.stdout, done.stderr
