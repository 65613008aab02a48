"""The limits of the house, read from the sources."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("saepatch", "training", "experiments")
SOURCES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for room in ROOMS
    for path in sorted((ROOT / room).rglob("*.py"))
}
MODULE_LINES, FUNCTION_LINES, PARAMETERS, ENTRIES, MODULES = 400, 60, 8, 22, 12

Function = ast.FunctionDef | ast.AsyncFunctionDef


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All statements under a node; what stands inside expressions is not visited."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):
            yield child
            yield from statements(child)


@cache
def definitions() -> list[tuple[str, Function | ast.ClassDef]]:
    """Functions and classes, each with its source's path."""
    nodes = ((path, node) for path, text in SOURCES.items() for node in statements(ast.parse(text)))
    return [(path, node) for path, node in nodes if isinstance(node, Function | ast.ClassDef)]


def functions() -> list[tuple[str, Function]]:
    return [(path, node) for path, node in definitions() if isinstance(node, Function)]


def matching(pattern: str, *, outside: str, inside: str = "") -> list[str]:
    """Sources inside one folder and outside another that hold a line with a pattern."""
    line = re.compile(pattern, re.MULTILINE)
    return [
        p for p, text in SOURCES.items() if p.startswith(inside) and not p.startswith(outside) and line.search(text)
    ]


def test_no_module_is_too_long():
    lines = {path: len(text.splitlines()) for path, text in SOURCES.items()}
    assert {path: n for path, n in lines.items() if n > MODULE_LINES} == {}


def test_no_function_is_too_long():
    lines = {f"{path}:{f.name}": (f.end_lineno or 0) - f.lineno + 1 for path, f in functions()}
    assert {name: n for name, n in lines.items() if n > FUNCTION_LINES} == {}


def parameters(function: Function) -> int:
    """Number of parameters, without `self` and the value that holds options."""
    listed = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return len([argument for argument in listed if argument.arg not in ("self", "cls", "options")])


def test_no_public_function_has_too_many_parameters():
    counts = {f"{path}:{f.name}": parameters(f) for path, f in functions() if not f.name.startswith("_")}
    assert {name: n for name, n in counts.items() if n > PARAMETERS} == {}


def test_no_two_classes_share_a_name():
    names = Counter(node.name for _, node in definitions() if isinstance(node, ast.ClassDef))
    assert [name for name, n in names.items() if n > 1] == []


def test_protocols_can_be_checked_at_run_time():
    """Else `make test-typed` fails where one is a parameter's type."""
    protocols = [node for _, node in definitions() if isinstance(node, ast.ClassDef) and _bases(node) & {"Protocol"}]
    assert [node.name for node in protocols if not node.decorator_list] == []


def _bases(node: ast.ClassDef) -> set[str]:
    return {base.id for base in node.bases if isinstance(base, ast.Name)}


def test_the_packages_top_level_stays_small():
    entries = [path.name for path in (ROOT / "saepatch").iterdir() if not path.name.startswith("__")]
    assert len(entries) <= ENTRIES, entries


def modules(folder: Path) -> int:
    """Number of modules in a folder, without what Python and pytest look for by name."""
    return len([path for path in folder.glob("*.py") if path.name not in ("__init__.py", "__main__.py", "conftest.py")])


def test_no_folder_holds_too_many_modules():
    folders = {path.parent for room in (*ROOMS, "tests") for path in (ROOT / room).rglob("*.py")}
    counts = {str(folder.relative_to(ROOT)): modules(folder) for folder in folders}
    assert {folder: n for folder, n in counts.items() if n > MODULES} == {}


def test_every_folder_says_what_it_is_for():
    """And in saepatch, what it may import."""
    texts = {path: ast.get_docstring(ast.parse(text)) or "" for path, text in SOURCES.items() if "__init__" in path}
    assert [path for path, text in texts.items() if not text] == []
    inside = {path: text for path, text in texts.items() if path.startswith("saepatch/") and path.count("/") > 1}
    assert [path for path, text in inside.items() if "\n\nMay import " not in text] == []


def test_the_library_prints_nothing():
    assert matching(r"^[^#\n\"'`]*\bprint\(", inside="saepatch/", outside="saepatch/cli/") == []


def test_wandb_stays_in_tracking():
    assert matching(r"^\s*(import|from) wandb\b|import_module\(.wandb", outside="saepatch/tracking/") == []


def test_sae_lens_is_not_imported_at_the_top_of_a_module():
    assert matching(r"^(import|from) sae_lens\b", inside="saepatch/", outside="no folder") == []
