"""Values that no setting may have: missing ones, and ones that no library accepts."""

import math
from collections.abc import Container, Mapping
from dataclasses import is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from saepatch.errors import UserError

LARGEST = 2**63 - 1  # whole numbers beyond it fit no tensor


# Former names of settings, each with the name that another command has for the same thing.
RENAMED: Mapping[str, str] = {"data": "reference", "tokens": "max_new_tokens", "random": "controls", "latents": "d_sae"}


def current_names(config: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an earlier version's run, under the names they have now."""
    return under_current_names(values, _hints(config))


def under_current_names(values: Mapping[str, Any], known: Container[str]) -> dict[str, Any]:
    """Values with former names replaced where the new name is known and the former one is not."""
    return {
        RENAMED[name] if name not in known and RENAMED.get(name) in known else name: value
        for name, value in values.items()
    }


def check_values(config: type, values: Mapping[str, Any], prefix: str = "") -> None:
    """Check settings by name, before they become a `config`.

    Raises:
        UserError: a value is missing (a key without a value in a YAML file), a number is not finite or beyond 64 bits,
            a seed is negative, or a text contains characters that cannot be written to a file.
    """
    hints = _hints(config)
    for name, value in values.items():
        hint = hints.get(name)
        if hint is None:
            continue
        if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
            check_values(hint, value, f"{prefix}{name}.")
        elif value is None:
            if not _optional(hint):
                raise UserError(f"{prefix}{name} has no value: give one, or leave the setting out for its default")
        else:
            _check_value(f"{prefix}{name}", value)
            if name == "seed" and isinstance(value, int) and value < 0:
                raise UserError(f"{prefix}seed is {value}: use 0 or more")


@cache
def _hints(config: type) -> dict[str, Any]:
    return get_type_hints(config)


def _optional(hint: Any) -> bool:
    return hint is Any or (get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint))


def _check_value(name: str, value: Any) -> None:
    if isinstance(value, int) and abs(value) > LARGEST:
        raise UserError(f"{name} is a whole number of {value.bit_length()} bits: use one below 2^63")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} is {value}: use a finite number")
    if isinstance(value, str):
        if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
            raise UserError(f"{name} is {value!r}: remove the NUL or lone surrogate in it")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_value(name, key)
            _check_value(f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_value(name, item)
