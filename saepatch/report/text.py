"""Formatting of numbers and of untrusted text for display."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable
from numbers import Real
from typing import TypeGuard

MISSING = "–"
NUMBER_FORMAT = re.compile(r"\+?,?(\.\d{1,2})?[defg%]?")  # the Python formats that pages use
_NAMED = {"\n": "↵\n", "\t": "⇥\t"}
# Characters that would move, hide or reorder their neighbours: bidirectional controls, zero-width marks, separators.
_FORMAT = re.compile("[\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb]")


def visible(text: str) -> str:
    """The text with every invisible or formatting character replaced by a visible sign.

    Line breaks stay, preceded by ↵; control, bidirectional and zero-width characters become ``⟨U+202E⟩``; lone
    surrogates, which no encoding can represent, become the replacement character.
    """
    if text.isascii() and text.isprintable():
        return text
    out = []
    for char in text:
        kind = unicodedata.category(char)
        if char in _NAMED:
            out.append(_NAMED[char])
        elif kind == "Cs":
            out.append("\ufffd")
        elif kind == "Cc" or _FORMAT.match(char):
            out.append(f"⟨U+{ord(char):04X}⟩")
        else:
            out.append(char)
    return "".join(out)


def token_text(text: str) -> str:
    """A token as a label: leading and trailing spaces as ␣, so that ` a` and `a` differ; the empty token as ∅."""
    body = text.strip(" ")
    if not body:
        return "␣" * len(text) or "∅"
    before, after = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
    return "␣" * before + visible(body).replace("\n", "").replace("\t", "") + "␣" * after


def finite(value: object) -> TypeGuard[float]:
    """Whether the value is a finite number, of Python or NumPy."""
    return (type(value) is float or isinstance(value, Real)) and math.isfinite(value)


def number(value: float | int | None, spec: str = "") -> str:
    """A number for display: about three figures, thousands grouped, a true minus sign; a dash where it is missing.

    Args:
        value: The number.
        spec: Python format; empty: chosen by the number's size.
    """
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if spec == "d" and not float(value).is_integer():  # in columns of means
        spec = ""
    text = format(value, spec or _spec(value))
    if re.fullmatch(r"-0(\.0*)?%?", text):  # no sign on a number that rounds to 0
        text = text[1:]
    if "e" in text:
        mantissa, exponent = text.split("e")
        text = f"{mantissa}e{int(exponent)}"
    return re.sub(r"%$", "\u00a0%", text).replace("-", "−")


def with_interval(
    value: float | int | None, low: float | int | None, high: float | int | None, spec: str = "", reason: str = ""
) -> str:
    """A value with its interval, ``0.83 [0.79, 0.87]``, or with the reason for having none."""
    text = number(value, spec)
    if finite(low) and finite(high):
        return f"{text} [{number(low, spec)}, {number(high, spec)}]"
    return f"{text} ({reason})" if reason else text


def common_format(values: Iterable[float | int | None]) -> str:
    """A common format for the numbers of a column; empty where their sizes differ too much."""
    sizes = [abs(value) for value in values if finite(value)]
    if not sizes or max(sizes) == 0:
        return ""
    if all(float(size).is_integer() for size in sizes):
        return ",.0f"
    largest, smallest = max(sizes), min((size for size in sizes if size), default=0.0)
    if largest < 1e-3:
        return ".1e"
    decimals = max(0, 2 - math.floor(math.log10(largest)))
    return f",.{decimals}f" if smallest >= 0.5 * 10**-decimals else ""


def _spec(value: float | int) -> str:
    size = abs(value)
    if size == 0 or (float(value).is_integer() and size < 1e15):
        return ",.0f"
    if size >= 1e7 or size < 1e-3:
        return ".2e"
    return ",.0f" if size >= 1000 else ".1f" if size >= 100 else ".2f" if size >= 1 else ".3f"


def folded(columns: Iterable[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """Names, outcome and text of columns of answers; those of equal text and outcome are one, under all their names."""
    named: dict[tuple[str, str], list[str]] = {}
    for column, text in columns:
        name, _, outcome = column.rpartition(": ") if ": " in column else (column, "", "")
        named.setdefault((outcome, text), []).append(name)
    return [(", ".join(names), outcome, text) for (outcome, text), names in named.items()]
