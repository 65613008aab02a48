"""Pages as JSON, so that a report can be written again from its run's folder alone."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saepatch.errors import UserError
from saepatch.report import blocks
from saepatch.report.blocks import Page
from saepatch.report.files import write_whole
from saepatch.report.text import NUMBER_FORMAT

KEPT = "page.json"
_KIND = "block"  # the key that holds an object's class
_NAMES: dict[Any, str] = {  # names in the files, which predate a renaming of these classes
    blocks.EstimateCell: "Interval",
    blocks.ColouredTokens: "Tokens",
    blocks.Details: "Card",
}
_KINDS: dict[str, Any] = {
    _NAMES.get(kind, name): kind for name, kind in vars(blocks).items() if dataclasses.is_dataclass(kind)
}


def keep_page(page: Page, path: Path) -> Path:
    """Write the page's values as JSON, atomically.

    Raises:
        UserError: the file cannot be written there.
    """
    # As ASCII: texts may contain lone surrogates, which only JSON's escapes can represent.
    write_whole(path, json.dumps(_plain(page), allow_nan=False) + "\n", "the page")
    return path


def read_page(content: Any) -> Page:
    """The page that `keep_page` wrote, from its decoded JSON.

    Raises:
        UserError: it does not describe a page of this version.
    """
    try:
        page = _value(content)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the page is of another version of saepatch ({error}): run its command again") from error
    if not isinstance(page, Page):
        raise UserError("the file contains no report page: run its command again")
    return page


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {
            _KIND: _NAMES.get(type(value), type(value).__name__),
            **{field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)},
        }
    if isinstance(value, Mapping):  # as a list: a label may equal `_KIND`, and the order matters
        return {_KIND: "mapping", "items": [[str(key), _plain(item)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):  # JSON has no NaN or infinity
        return {_KIND: "number", "is": str(value)}
    return value


def _value(content: Any) -> Any:
    if isinstance(content, list):
        return tuple(_value(item) for item in content)
    if not isinstance(content, dict):
        return content
    fields = dict(content)
    kind = fields.pop(_KIND)
    if kind == "mapping":
        return {key: _value(item) for key, item in fields["items"]}
    if kind == "number":
        return float(fields["is"])
    values = {name: _value(item) for name, item in fields.items()}
    for name in [name for name in values if name.endswith(("format", "formats"))]:
        formats = values[name].values() if isinstance(values[name], Mapping) else [values[name]]
        if odd := [spec for spec in formats if not (isinstance(spec, str) and NUMBER_FORMAT.fullmatch(spec))]:
            raise ValueError(f"{name} {odd[0]!r} is no number format")
    return _KINDS[kind](**values)
