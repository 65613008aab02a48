"""JSON and YAML from users and files, read strictly.

Repeated keys, aliases that multiply, deep nesting, and numbers and characters that nothing later could take are errors.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from saepatch.errors import UserError

MAX_NODES = 100_000  # of a YAML document, each alias counted with all that it stands for
MAX_DEPTH = 40


def parse_json(text: str, where: str, remedy: str = "") -> Any:
    """A JSON value; `where` begins messages.

    Raises:
        UserError: it is not JSON, repeats a key, is nested too deep, or holds half of a surrogate pair.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise UserError(f"{where} is not JSON: it is nested too deep{remedy}") from error
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is not text: it holds half of a surrogate pair{remedy}") from error
    except ValueError as error:  # a repeated key and a number of thousands of digits among them
        raise UserError(f"{where} is not JSON: {error}{remedy}") from error
    return value


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise ValueError(f"key {key!r} stands twice in one object")
        value[key] = item
    return value


def load_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        UserError: it cannot be read, or is not YAML as `check_yaml` allows it.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
        return bounded_yaml(text, yaml.safe_load)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML ({' '.join(str(error).split())}): mend it, or make it anew") from error


def bounded_yaml(text: str, load: Callable[[str], Any]) -> Any:
    """What a loader makes of a document that `check_yaml` allows.

    Raises:
        yaml.YAMLError: it is not allowed, or the loader fails, which it does in many ways on tags that do not fit.
    """
    import yaml

    check_yaml(text)
    try:
        return load(text)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise yaml.YAMLError(str(error) or type(error).__name__) from error


def check_yaml(text: str) -> None:
    """See, before anything is built from it, that a document is no larger with its aliases written out than it may be.

    Raises:
        yaml.YAMLError: it is not YAML, has more than `MAX_NODES` values or `MAX_DEPTH` levels, an alias inside what it
            stands for, or a key twice in one mapping.
    """
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    sizes: dict[str, int] = {}
    open_nodes: list[_Node] = []
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise yaml.YAMLError(f"alias *{event.anchor} stands for nothing before it, or for what it is in")
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
            raise yaml.YAMLError(f"it holds more than {MAX_NODES:,} values once its aliases are written out")


class _Node:
    """A mapping or a sequence whose end has not come yet."""

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
                raise yaml.YAMLError(f"key {text!r} stands twice in one mapping")
            self._keys.add(text)
