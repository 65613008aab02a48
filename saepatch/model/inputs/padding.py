"""How padding affects a model's results: probed once on load, since families differ and do not declare it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saepatch.errors import UserError
from saepatch.model.inputs.tokens import Tokens


@dataclass(frozen=True)
class Padding:
    """The sides on which a row may be padded without changing the results at its tokens.

    `first` is the position id of a row's first token in padded batches; None: no explicit position ids are passed.
    `cached`: rows that are padded on the left may also be continued by generation, from a cache if the model has one.
    """

    left: bool = True
    right: bool = True
    first: int | None = 0
    cached: bool = True

    def allows(self, mask: Int[Tensor, "batch pos"], cached: bool = False) -> bool:
        """Whether a batch's results at every token equal those of its row alone (`cached`: on a cache, too)."""
        on_left, on_right = (not bool(mask[:, column].all()) for column in (0, -1))
        return ((self.left and (self.cached or not cached)) or not on_left) and (self.right or not on_right)

    def check(self, mask: Int[Tensor, "batch pos"], cached: bool = False) -> None:
        """Raises UserError for a batch that is padded on a side where padding changes the results."""
        if not self.allows(mask):
            raise UserError(
                f"padding on the {self._wrong} changes this model's results: give it prompts of one length at a time "
                "(and pairs of equal lengths)"
            )
        if not self.allows(mask, cached):
            raise UserError(
                "padding on the left changes what this model generates (from a cache, if it has one): give it prompts "
                "of one length at a time"
            )

    @property
    def _wrong(self) -> str:
        return "left or right" if not (self.left or self.right) else "right" if self.left else "left"

    def __str__(self) -> str:
        text = "either side" if self.left and self.right else f"not on the {self._wrong}"
        return text if self.cached or not self.left else f"{text}, not in generation"


def positions_of(tokens: Tokens, first: int) -> Int[Tensor, "batch pos"]:
    """Position ids that count each row's own tokens."""
    return (tokens.attention_mask.cumsum(-1) - 1).clamp(min=0) + first


def by_length(tokens: Tokens) -> Iterator[tuple[Int[Tensor, "rows 1"], Int[Tensor, "rows pos"], Tokens]]:
    """The batch in groups of equal length, without padding: row indices, columns in the batch, and the rows."""
    for length in tokens.lengths.unique().tolist():
        rows = (tokens.lengths == length).nonzero()
        columns = tokens.attention_mask[rows[:, 0]].nonzero()[:, 1].reshape(len(rows), length)
        yield rows, columns, tokens.at(rows, columns)


def spread(
    tokens: Tokens, run: Callable[[Tokens], dict[Any, Float[Tensor, "rows pos width"]]]
) -> dict[Any, Float[Tensor, "batch pos width"]]:
    """Results of `run` on groups of rows of equal length, put back into the batch's columns; zeros at padding."""
    whole: dict[Any, Tensor] = {}
    for rows, columns, part in by_length(tokens):
        for name, value in run(part).items():
            if name not in whole:
                whole[name] = value.new_zeros(len(tokens), tokens.width, *value.shape[2:])
            whole[name][rows.to(value.device), columns.to(value.device)] = value
    return whole


FAILURES = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, NotImplementedError)


@torch.no_grad()
def probe_padding(
    logits: Callable[[Padding, Tokens], Float[Tensor, "batch pos vocab"]], probe: Tokens, pad: int, firsts: set[int]
) -> Padding:
    """Compare a short row padded on either side with the row alone.

    Args:
        logits: A forward pass under a candidate `Padding`.
        probe: One row without padding.
        pad: The padding token's id.
        firsts: Position ids that a row's first token may have in this family, besides 0.
    """
    width, padded = probe.width, _padded(probe, pad)
    alone = logits(Padding(), probe)[0]
    tolerance = (1e-3 if alone.dtype == torch.float32 else 5e-2) * float(alone.float().std())
    alone = alone.float()
    best = Padding(False, False, None)
    for first in (0, *sorted(firsts - {0}), None):
        try:
            both = logits(Padding(first=first), padded).float()
        except FAILURES:
            continue
        gaps = (float((part - alone).abs().amax()) for part in (both[0, 3:], both[1, :width]))
        left, right = (gap <= tolerance for gap in gaps)
        if (left + right, left) > (best.left + best.right, best.left):
            best = Padding(left, right, first)
        if left and right:
            break
    return best


def _padded(probe: Tokens, pad: int) -> Tokens:
    """A row padded on the left, and the same row padded on the right."""
    ids = probe.input_ids
    fill, none = ids.new_full((1, 3), pad), ids.new_zeros(1, 3)
    rows = torch.cat([torch.cat([fill, ids], 1), torch.cat([ids, fill], 1)])
    masks = torch.cat([torch.cat([none, ids * 0 + 1], 1), torch.cat([ids * 0 + 1, none], 1)])
    return Tokens(rows, masks, masks.bool())


@torch.no_grad()
def probe_padded_steps(
    call: Callable[[Tokens, int, Any], Float[Tensor, "batch pos vocab"]],
    new_cache: Callable[[], Any],
    probe: Tokens,
    pad: int,
    steps: tuple[int, ...],
) -> bool:
    """Whether a row padded on the left continues from a cache as the row alone does.

    Args:
        call: A forward pass of (tokens, first column, cache).
        new_cache: Makes an empty cache.
        probe: One row without padding.
        pad: The padding token's id.
        steps: How many columns each pass after the first processes.
    """
    whole = call(probe, 0, None)[0]
    tolerance = (1e-3 if whole.dtype == torch.float32 else 5e-2) * float(whole.float().std())
    ids = probe.input_ids
    padded = _padded(probe, pad).rows([0])
    longer = torch.cat([ids, ids[:, :3]], 1)  # a batch has a row without padding, too
    mask = torch.cat([padded.attention_mask, torch.ones_like(longer)])
    tokens = Tokens(torch.cat([padded.input_ids, longer]), mask, mask.bool())
    cache, start, parts = new_cache(), 0, []
    try:
        for end in accumulate((tokens.width - sum(steps), *steps)):
            parts.append(call(tokens.columns(end), start, cache))
            start = end
    except (*FAILURES, UserError):
        return False
    return float((torch.cat(parts, 1)[0, 3:].float() - whole.float()).abs().amax()) <= tolerance
