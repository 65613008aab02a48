"""What a document may be: text, the messages of a chat, or token ids."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from saepatch.errors import UserError

Messages = Sequence[Mapping[str, str]]
Document = str | Sequence[int] | Messages
"""Text; a chat, as mappings with `role` and `content`, which the model's chat template writes out; or token ids."""


def is_chat(document: object) -> TypeGuard[Messages]:
    return isinstance(document, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in document
    )


def are_ids(document: object) -> TypeGuard[Sequence[int]]:
    return isinstance(document, list) and all(type(token) is int for token in document)


def has_content(document: object, name: str = "a document") -> TypeGuard[Document]:
    """Whether a record has a document that is not blank.

    Raises:
        UserError: its value is no document.
    """
    if document is None:
        return False
    if isinstance(document, str):
        return bool(document.strip())
    if not (is_chat(document) or are_ids(document)):
        raise UserError(
            f"{name} is {_kind(document)}, not text: give text, a list of messages with role and content, or a list of "
            "token ids; --text_column names another column"
        )
    return len(document) > 0


def _kind(value: object) -> str:
    kind = type(value).__name__
    return f"{kind} of {type(value[0]).__name__}" if isinstance(value, list | tuple) and value else kind


def characters(document: Document) -> int:
    """The size of a document in characters, or tokens."""
    if is_chat(document):
        return sum(len(turn["content"]) for turn in document)
    return len(document)


def digest(document: Any) -> int:
    """64 bits of a document's BLAKE2b hash; unlike Python's hash, it is the same in every process."""
    has_content(document)
    text = document if isinstance(document, str) else json.dumps(document, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
