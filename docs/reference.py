"""MkDocs hook: the pages of the reference, made from the source, so that no list of modules has to be kept.

`reference/names.md` lists the public names from `saepatch/__init__.pyi`; each room of saepatch and of training has a
page, `reference/ROOM.md`, that mkdocstrings fills from the docstrings.
"""

from __future__ import annotations

import ast
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]


def rooms(package: str) -> list[str]:
    """The modules and subpackages at the top of a package, private ones left out."""
    inside = sorted((ROOT / package).iterdir())
    named = [path.stem for path in inside if path.suffix == ".py" or (path / "__init__.py").is_file()]
    return [name for name in named if not name.startswith("_")]


def first_line(module: str, name: str) -> str:
    """The first line of the docstring of `name` as `module` defines or re-exports it."""
    path = ROOT / Path(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return (ast.get_docstring(node) or "").partition("\n\n")[0].replace("\n", " ")
        if isinstance(node, ast.ImportFrom) and name in [alias.asname or alias.name for alias in node.names]:
            source = node.module or ""
            if (ROOT / Path(*source.split(".")) / f"{name}.py").is_file():  # the name is a module
                tree = ast.parse((ROOT / Path(*source.split(".")) / f"{name}.py").read_text(encoding="utf-8"))
                return (ast.get_docstring(tree) or "").partition("\n\n")[0].replace("\n", " ")
            return first_line(source, name)
    raise LookupError(f"{module} does not define {name}")


def names_page() -> str:
    """A table of the public names, by the room that defines them."""
    text = "# Public names\n\nWhat `import saepatch as sp` gives. A name is imported on first use.\n"
    room = ""
    for node in ast.parse((ROOT / "saepatch" / "__init__.pyi").read_text(encoding="utf-8")).body:
        assert isinstance(node, ast.ImportFrom)
        assert node.module
        if node.module.split(".")[0] != room:
            room = node.module.split(".")[0]
            text += f"\n## [{room}]({room}.md)\n\n| name | what it is |\n|---|---|\n"
        for alias in node.names:
            target = f"saepatch.{node.module}"
            summary = first_line(target, alias.name).replace("|", "\\|")
            text += f"| [`{alias.name}`][{target}.{alias.name}] | {summary} |\n"
    return text


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Appends the reference to the navigation."""
    pages: list[dict[str, str]] = [{"Public names": "reference/names.md"}]
    pages += [{f"saepatch.{room}": f"reference/{room}.md"} for room in rooms("saepatch")]
    pages += [{f"training.{room}": f"reference/training.{room}.md"} for room in rooms("training")]
    assert config.nav is not None
    config.nav.append({"Reference": pages})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    files.append(File.generated(config, "reference/names.md", content=names_page()))
    for package in ("saepatch", "training"):
        for room in rooms(package):
            uri = f"reference/{room}.md" if package == "saepatch" else f"reference/{package}.{room}.md"
            options = "    options:\n      heading_level: 1\n      show_root_full_path: true\n"
            files.append(File.generated(config, uri, content=f"::: {package}.{room}\n{options}"))
    return files
