"""Figures of dictionaries that earlier versions wrote, under the names that they have now."""

from collections.abc import Mapping
from typing import Any

# Once, cross-entropy recovered was against zeroing ordinary positions alone; now it is the field's, every position.
_RENAMED = {
    "ce_zero": "ce_zero_ordinary",
    "ce_ablated": "ce_ablated_ordinary",
    "ce_recovered": "ce_recovered_ordinary",
}


def renamed_figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    """A dictionary's figures, those whose definition has changed since they were written under their present names."""
    if "ce_recovered_ordinary" in figures:
        return dict(figures)
    return {_RENAMED.get(name, name): value for name, value in figures.items()}
