"""Renaming of dictionary figures that earlier versions wrote."""

from collections.abc import Mapping
from typing import Any

# Earlier versions measured the cross-entropy recovered against zeros at ordinary positions, not at every position.
_RENAMED = {
    "ce_zero": "ce_zero_ordinary",
    "ce_ablated": "ce_ablated_ordinary",
    "ce_recovered": "ce_recovered_ordinary",
}


def renamed_figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    """A dictionary's figures under their current names, where a definition has changed since they were written."""
    if "ce_recovered_ordinary" in figures:
        return dict(figures)
    return {_RENAMED.get(name, name): value for name, value in figures.items()}
