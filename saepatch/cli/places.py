"""The place in a YAML file of the setting that an error names."""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from saepatch.errors import UserError


def with_place(error: UserError, given: Sequence[str]) -> UserError:
    """The error, with the file and line of the setting it names if a config file sets it last."""
    if "(set in " in str(error):  # said already, where the settings were read
        return error
    places = {name: place for path in config_files(given) for name, place in _settings(path).items()}
    overridden = {word.removeprefix("--").partition("=")[0] for word in given if word.startswith("--")}
    said = [word.partition("=")[2] if word.startswith("--") else word for word in given]
    message = str(error)
    for name, (where, value) in places.items():
        # A value that the command line has, too, does not tell which of both is meant.
        if name not in overridden and _names(message, name, None if value in said else value):
            return UserError(f"{message} (set in {where})")
    return error


def config_files(given: Sequence[str]) -> list[Path]:
    """The config files among the arguments, in order."""
    named = [word.partition("=")[2] for word in given if word.startswith("--config=")]
    named += [path for word, path in pairwise(given) if word == "--config"]
    return [Path(name) for name in named if Path(name).is_file()]


def _settings(path: Path) -> dict[str, tuple[str, Any]]:
    """Each setting of a YAML file, those of a section as `section.key`: its place, and its value as written."""
    import yaml

    places: dict[str, tuple[str, Any]] = {}

    def walk(node: Any, before: str) -> None:
        for key, value in node.value:
            name = f"{before}{key.value}"
            places[name] = (f"{path}, line {key.start_mark.line + 1}", getattr(value, "value", None))
            if isinstance(value, yaml.MappingNode):
                walk(value, f"{name}.")

    try:
        root = yaml.compose(path.read_text(encoding="utf-8-sig"), yaml.SafeLoader)
    except (yaml.YAMLError, OSError, UnicodeDecodeError, RecursionError):  # reported by the code that reads the file
        return {}
    if isinstance(root, yaml.MappingNode):
        walk(root, "")
    return places


def _names(message: str, name: str, value: Any) -> bool:
    """Whether a message names a setting: as an option, with a value, as its subject, or by its value in quotes."""
    own, word = re.escape(name), re.escape(name.rpartition(".")[2])
    if re.search(rf"--{own}(?![\w.])|(?<![\w.-]){word} = |^{own} (is|has|takes)\b|^'{word}' is not a setting", message):
        return True
    if re.search(rf"^{own} \S+ is ", message):
        return True
    # A value such as resid_post.9 says by itself what is meant.
    if isinstance(value, str) and re.fullmatch(r"(?=.*\d)\w+\.[\w.]+", value):
        return re.search(rf"(?<![\w.]){re.escape(value)}(?![\w.])", message) is not None
    quoted = isinstance(value, str) and value != "" and repr(value) in message
    return quoted and (len(value) > 2 or re.search(rf"(?<![\w.-]){word}(?![\w.])", message) is not None)
