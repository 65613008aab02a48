"""JSON and YAML from users and files, read strictly.

Errors: repeated keys, aliases that expand without bound, deep nesting, oversized numbers, text that cannot be encoded.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from saepatch.errors import UserError

MAX_NODES = 100_000  # in a YAML document, with its aliases expanded
MAX_DEPTH = 40


def parse_json(text: str, where: str, remedy: str = "") -> Any:
    """A JSON value; `where` begins messages.

    Raises:
        UserError: it is not JSON, repeats a key, is nested too deeply, or contains a lone surrogate.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise UserError(f"{where} is not JSON: it is nested too deeply{remedy}") from error
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is not text: it contains a lone surrogate{remedy}") from error
    except ValueError as error:  # including a repeated key, and a number of thousands of digits
        raise UserError(f"{where} is not JSON: {error}{remedy}") from error
    return value


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise ValueError(f"key {key!r} appears twice in one object")
        value[key] = item
    return value


def load_yaml(path: Path) -> Any:
    """The contents of a YAML file.

    Raises:
        UserError: it cannot be read, or `check_yaml` rejects it.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
        return bounded_yaml(text, yaml.safe_load)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML ({' '.join(str(error).split())}): correct it or write it again") from error


def bounded_yaml(text: str, load: Callable[[str], Any]) -> Any:
    """Load a document, after `check_yaml`.

    Raises:
        yaml.YAMLError: it is rejected, or the loader fails, as it does in many ways on mismatched tags.
    """
    import yaml

    check_yaml(text)
    try:
        return load(text)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise yaml.YAMLError(str(error) or type(error).__name__) from error


def check_yaml(text: str) -> None:
    """Check the size of a document with its aliases expanded, before anything is built from it.

    Raises:
        yaml.YAMLError: it is not YAML, has more than `MAX_NODES` values or `MAX_DEPTH` levels, an alias inside its own
            anchor, or a key twice in one mapping.
    """
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    sizes: dict[str, int] = {}
    open_nodes: list[_Node] = []
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise yaml.YAMLError(f"alias *{event.anchor} refers to no earlier anchor, or to one that contains it")
            size = sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            if open_nodes:
                open_nodes[-1].take_key(event.value)
            if event.anchor:
                sizes[event.anchor] = size
        elif isinstance(event, yaml.CollectionStartEvent):
            if len(open_nodes) >= MAX_DEPTH:
                raise yaml.YAMLError(f"it is nested deeper than {MAX_DEPTH} levels")
            open_nodes.append(_Node(event.anchor, isinstance(event, yaml.MappingStartEvent)))
            continue
        elif isinstance(event, yaml.CollectionEndEvent):
            node = open_nodes.pop()
            size = node.size
            if node.anchor:
                sizes[node.anchor] = size
        else:
            continue
        if open_nodes:
            open_nodes[-1].add(size)
            size = open_nodes[-1].size
        if size > MAX_NODES:
            raise yaml.YAMLError(f"it has more than {MAX_NODES:,} values once aliases are expanded")


class _Node:
    """A mapping or sequence that is still open."""

    def __init__(self, anchor: str | None, mapping: bool) -> None:
        self.anchor, self.size = anchor, 1
        self._mapping, self._items = mapping, 0
        self._keys: set[str] = set()

    def add(self, size: int) -> None:
        self.size += size
        self._items += 1

    def take_key(self, text: str) -> None:
        import yaml

        if self._mapping and self._items % 2 == 0:
            if text in self._keys:
                raise yaml.YAMLError(f"key {text!r} appears twice in one mapping")
            self._keys.add(text)
