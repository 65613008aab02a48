"""Secrets are kept out of what runs write down: configs, summaries, rows, trackers and the log."""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "[redacted]"

# Tokens of the Hugging Face hub, W&B, GitHub, OpenAI and AWS; a user and password in an address; what a name says.
_SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bwandb_v1_\w{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bsk-[\w-]{20,}"
    r"|\bAKIA[A-Z0-9]{16}\b"
    r"|(?<=://)[^\s/@:'\"]+:[^\s/@'\"]+(?=@)"
    r"|(?<=[?&]write_token=)[^\s&'\"]+"
    r"|(?:(?<=api_key=)|(?<=password=)|(?<=HF_TOKEN=)|(?<=access_token=))[^\s&'\"]+"
)


def redacted(text: str) -> str:
    """The text with every secret that is recognisable by its form replaced."""
    return _SECRET.sub(HIDDEN, text)


def redacted_values(value: Any) -> Any:
    """The same of every text inside a value."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {key: redacted_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(redacted_values, value)) if type(value) in (list, tuple) else value
    return value
