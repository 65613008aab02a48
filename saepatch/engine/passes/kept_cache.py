"""Keys and values of a kept run, as caches of transformers for passes that start later."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class Before(DynamicLayer):
    """Some rows of a kept run's keys and values before a column, as a layer of a transformers cache.

    They are copied only while the block that needs them runs.
    """

    def __init__(self, kept: Any, rows: Int[Tensor, "edits"] | slice, first: int | None = None) -> None:
        super().__init__()
        assert kept.keys is not None, "the kept run filled its cache"
        assert kept.values is not None
        self.lazy_initialization(kept.keys, kept.values)
        self.keys, self.values = kept.keys[:, :, :first], kept.values[:, :, :first]
        if isinstance(rows, slice):
            self.keys, self.values = self.keys[rows], self.values[rows]
            rows = torch.arange(len(self.keys))
        self._before = self.keys, self.values
        self._rows, self._same_row = rows, bool((rows == rows[0]).all())
        self._every_row = torch.equal(rows.cpu(), torch.arange(len(self.keys)))

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._before
        return self._with(keys, key_states), self._with(values, value_states)

    def _with(self, before: Tensor, new: Tensor) -> Tensor:
        if self._every_row:
            return torch.cat([before, new], -2)
        mine = before[self._rows[:1]].expand(len(new), -1, -1, -1) if self._same_row else before[self._rows]
        return torch.cat([mine, new], -2)


def cache_before(caches: Sequence[Any], rows: Int[Tensor, "edits"], first: int, kind: type[Before] = Before) -> Cache:
    """A cache of the columns before `first`, each layer's from the first of the caches that holds it.

    `caches` are of transformers, or hold `layers` like theirs.
    """
    layers: list[Any] = []
    for number in range(max(len(cache.layers) for cache in caches)):
        held: list[Any] = [cache.layers[number] for cache in caches if number < len(cache.layers)]
        layers.append(kind(next(layer for layer in held if layer.is_initialized), rows, first))
    return Cache(layers=layers)
