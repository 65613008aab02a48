"""Which positions of a forward pass an intervention acts on, padding and caches accounted for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saepatch.errors import UserError


@dataclass(frozen=True)
class At:
    """The tokens of a text inside the prompt, leading space included; `occurrence` counts from 0, or back from -1."""

    text: str
    occurrence: int = -1


# "all": prompt and generated tokens. "prompt", "generated", and "last" (the prompt's last token). None of these holds
# padding or BOS. "every": all tokens, BOS among them. An int, a span (slice) or several ints count the prompt's own
# tokens from 0 (a BOS counts, padding does not) or back from -1, and reach the BOS when they name it. A bool tensor
# [batch, pos] is taken as it is.
Positions = str | int | slice | Sequence[int] | At | Tensor
NAMED = ("all", "prompt", "generated", "last", "every")


@dataclass(frozen=True, eq=False)
class Pass:
    """What one forward pass is looking at.

    `index` counts each row's own tokens from 0, over all passes of one generation; `n_prompt` is how many of them are
    prompt. `start` is the column of this pass' first token in the whole padded row, `width` the prompt's columns.
    """

    input_ids: Int[Tensor, "batch pos"]
    ordinary: Bool[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    index: Int[Tensor, "batch pos"]
    n_prompt: Int[Tensor, "batch"]
    start: int
    width: int
    decode: Callable[[Sequence[int]], str]

    @property
    def in_prompt(self) -> Bool[Tensor, "batch pos"]:
        return self.real & (self.index < self.n_prompt[:, None])

    def select(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """Where the intervention acts in this pass.

        Raises:
            UserError: an unknown name, a position outside a prompt, a text that a prompt does not hold, or a mask whose
                shape is not the prompt's.
        """
        if isinstance(positions, str):
            return self._named(positions)
        if isinstance(positions, At):
            return self._text(positions)
        if isinstance(positions, Tensor):
            return self._mask(positions)
        if isinstance(positions, slice):
            return self._span(positions)
        wanted = torch.zeros_like(self.real)
        for position in [positions] if isinstance(positions, (int, np.integer)) else positions:
            wanted |= self._one(int(position))
        return wanted

    def _named(self, name: str) -> Bool[Tensor, "batch pos"]:
        if name == "all":
            return self.ordinary
        if name == "prompt":
            return self.ordinary & self.in_prompt
        if name == "generated":
            return self.ordinary & ~self.in_prompt
        if name == "every":
            return self.real
        if name == "last":
            return self.in_prompt & (self.index == self.n_prompt[:, None] - 1)
        raise UserError(f"unknown positions {name!r}: use one of {', '.join(NAMED)}, an index, a span, or At(text)")

    def _one(self, position: int) -> Bool[Tensor, "batch pos"]:
        shortest = int(self.n_prompt.min())
        if not -shortest <= position < shortest:
            raise UserError(f"position {position} is out of range: the shortest prompt has {shortest} tokens")
        at = self.n_prompt[:, None] + position if position < 0 else torch.full_like(self.n_prompt, position)[:, None]
        return self.in_prompt & (self.index == at)

    def _span(self, span: slice) -> Bool[Tensor, "batch pos"]:
        rows = []
        for length, index, inside in zip(self.n_prompt.tolist(), self.index, self.in_prompt, strict=True):
            chosen = torch.tensor(list(range(length))[span], device=index.device, dtype=index.dtype)
            if not len(chosen):
                raise UserError(f"span {span.start}:{span.stop} holds no position of a prompt of {length} tokens")
            rows.append(torch.isin(index, chosen) & inside)
        return torch.stack(rows)

    def _mask(self, mask: Tensor) -> Bool[Tensor, "batch pos"]:
        if mask.dtype != torch.bool or mask.shape != (len(self.input_ids), self.width):
            raise UserError(
                f"positions mask is {mask.dtype} {tuple(mask.shape)}, "
                f"not torch.bool {(len(self.input_ids), self.width)}"
            )
        return from_prompt(mask, self, fill=False) & self.real

    def _text(self, at: At) -> Bool[Tensor, "batch pos"]:
        wanted = torch.zeros_like(self.real)
        if self.start >= self.width:
            return wanted  # a later pass of a cached generation: the text was in the prompt
        for row, (tokens, inside) in enumerate(zip(self.input_ids, self.in_prompt, strict=True)):
            columns = inside.nonzero().flatten().tolist()
            spans = find_text(at.text, tokens[inside].tolist(), self.decode)
            if not -len(spans) <= at.occurrence < len(spans):
                raise UserError(
                    f"prompt {row} holds {at.text!r} as whole tokens {len(spans)} times, so there is no occurrence "
                    f"{at.occurrence}: check the spelling, or give an index"
                )
            first, end = spans[at.occurrence]
            wanted[row, columns[first] : columns[end - 1] + 1] = True
        return wanted


def find_text(text: str, ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[tuple[int, int]]:
    """Token spans [first, end) that spell `text`, a leading space aside; parts of tokens do not count."""
    word = text.strip()
    if not word:
        raise UserError(f"positions At({text!r}) name no token: give the text of at least one token")
    ends = [len(decode(ids[: i + 1])) for i in range(len(ids))]
    starts = [0, *ends[:-1]]
    whole = decode(ids)
    spaces = [len(whole[s:e]) - len(whole[s:e].lstrip()) for s, e in zip(starts, ends, strict=True)]
    spans, at = [], whole.find(word)
    while at >= 0:
        first = [i for i in range(len(ids)) if starts[i] + spaces[i] == at and ends[i] > at]
        last = [i for i in range(len(ids)) if ends[i] == at + len(word)]
        if first and last:
            spans.append((first[0], last[0] + 1))
        at = whole.find(word, at + 1)
    return spans


def from_prompt(values: Tensor, seen: Pass, fill: float | bool) -> Tensor:
    """Values of the prompt's columns, [batch, prompt, …], laid onto the columns of this pass; `fill` elsewhere."""
    columns = seen.input_ids.shape[1]
    out = values.new_full((values.shape[0], columns, *values.shape[2:]), fill)
    here = max(0, min(seen.width - seen.start, columns))
    out[:, :here] = values[:, seen.start : seen.start + here]
    return out
