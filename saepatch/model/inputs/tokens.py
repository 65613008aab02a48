"""Padded batches of token ids."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saepatch.errors import UserError
from saepatch.model.inputs.images import Images

_TENSORS = ("input_ids", "attention_mask", "ordinary")


@dataclass(frozen=True, eq=False)
class Tokens:
    """A padded batch of prompts.

    `ordinary` is true at every position that is neither padding nor BOS; means, rankings and edits use these. `images`
    is what the prompts' pictures give to the model, if they have any.
    """

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    ordinary: Bool[Tensor, "batch pos"]
    images: Images | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def lengths(self) -> Int[Tensor, "batch"]:
        """Number of tokens of each prompt, including BOS, without padding."""
        return self.attention_mask.sum(-1)

    @property
    def last(self) -> Int[Tensor, "batch"]:
        """Index of each prompt's last token in the padded row."""
        width = self.attention_mask.shape[1]
        return width - 1 - self.attention_mask.flip(-1).argmax(-1)

    @property
    def width(self) -> int:
        """Number of columns of the batch, including padding."""
        return self.input_ids.shape[1]

    @property
    def padded(self) -> bool:
        return not bool(self.attention_mask.all())

    def without(self, excluded: Collection[int]) -> "Tokens":
        """The same batch, with these tokens no longer ordinary."""
        if not excluded:
            return self
        return replace(self, ordinary=without_tokens(self.input_ids, self.ordinary, excluded))

    def after(self, first: int) -> "Tokens":
        """The same batch, with the first tokens of each row, BOS included, no longer ordinary."""
        if first <= 0:
            return self
        return replace(self, ordinary=self.ordinary & (self.attention_mask.cumsum(-1) > first))

    def rows(self, index: Sequence[int] | Int[Tensor, "n"] | slice) -> "Tokens":
        return self.at(index)

    def columns(self, end: int) -> "Tokens":
        """The columns before `end`."""
        return self.at(slice(None), slice(end))

    def followed_by(self, other: "Tokens") -> "Tokens":
        """Each row followed by the other batch's row.

        Raises:
            UserError: the prompts have pictures.
        """
        if self.images is not None or other.images is not None:
            raise UserError("prompts with pictures are not continued: use the logits after the prompt")
        return Tokens(
            torch.cat([self.input_ids, other.input_ids], 1),
            torch.cat([self.attention_mask, other.attention_mask], 1),
            torch.cat([self.ordinary, other.ordinary], 1),
        )

    def at(self, *index: Any) -> "Tokens":
        """The batch at an index of its rows, or of rows and columns."""
        ids, mask, plain = (values[index] for values in (self.input_ids, self.attention_mask, self.ordinary))
        return Tokens(ids, mask, plain, None if self.images is None else self.images.at(*index))

    def above(self, other: "Tokens") -> "Tokens":
        """The rows of this batch, then those of another of the same width; both have pictures, or none has."""
        ids, mask, plain = (torch.cat([getattr(t, name) for t in (self, other)]) for name in _TENSORS)
        both = None if self.images is None or other.images is None else self.images.above(other.images)
        return Tokens(ids, mask, plain, both)

    def alone(self, row: int) -> "Tokens":
        """One row, without padding."""
        real = self.attention_mask[row].bool()
        return self.at(slice(row, row + 1), real)

    def block_start(self, column: int) -> int:
        """The last column up to this one from which a pass may start: no tokens before it read later ones."""
        return column if self.images is None else self.images.block_start(column)

    def same_start(self, other: "Tokens") -> Bool[Tensor, "batch pos"]:
        """Positions whose values are the same in both batches, since tokens up to there, and pictures, are."""
        alike = (self.input_ids == other.input_ids) & (self.attention_mask == other.attention_mask)
        alike = alike.cumprod(-1).bool()
        first, second = (self, other) if self.images is not None else (other, self)
        return alike if first.images is None else first.images.same_start(second.images, alike)

    def batches(self, size: int) -> Iterator["Tokens"]:
        for start in range(0, len(self), size):
            yield self.rows(slice(start, start + size))


def ordinary(
    input_ids: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], bos_id: int | None
) -> Bool[Tensor, "batch pos"]:
    """True where a token is neither padding nor BOS."""
    real = mask.bool()
    return real if bos_id is None else real & (input_ids != bos_id)


def without_tokens(
    input_ids: Int[Tensor, "batch pos"], chosen: Bool[Tensor, "batch pos"], excluded: Collection[int]
) -> Bool[Tensor, "batch pos"]:
    """The chosen positions, except those that hold an excluded token."""
    if not excluded:
        return chosen
    ids = torch.tensor(sorted(excluded), dtype=torch.long, device=input_ids.device)
    return chosen & ~torch.isin(input_ids, ids)


def refuse_pictures(tokens: Tokens, where: str) -> None:
    """Raises UserError for prompts with pictures."""
    if tokens.images is not None:
        raise UserError(f"prompts with pictures are for patching, attribution and splices, not for {where}")


def check_lengths(text: str, ids: Sequence[int], bos_id: int | None, context: int | None) -> None:
    """Raises UserError for a prompt that is empty or longer than the model's context."""
    if not any(token != bos_id for token in ids):
        raise UserError(f"empty prompt {text!r}: a prompt needs at least one token besides BOS")
    if context is not None and len(ids) > context:
        raise UserError(f"prompt of {len(ids)} tokens is longer than the context of {context}: shorten {text[:40]!r}…")


def padded_rows(
    ids: Sequence[Sequence[int]], pad: int, side: str, device: torch.device
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Rows of token ids as one tensor, and the mask of what is not padding."""
    width, rows, masks = max(map(len, ids)), [], []
    for row in ids:
        fill = width - len(row)
        left, right = (fill, 0) if side == "left" else (0, fill)
        rows.append([pad] * left + list(row) + [pad] * right)
        masks.append([0] * left + [1] * len(row) + [0] * right)
    return torch.tensor(rows, device=device), torch.tensor(masks, device=device)


def appended_tokens(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer appends to every text."""
    text, whole = (list(tokenizer("a", add_special_tokens=add, verbose=False)["input_ids"]) for add in (False, True))
    starts = (start for start in range(len(whole)) if whole[start : start + len(text)] == text)
    return whole[next(starts, len(whole)) + len(text) :]


def name_bos(tokenizer: Any, token: str) -> None:
    """Set a token of the vocabulary as the BOS of a tokenizer that has none.

    Raises:
        UserError: the token is not in the vocabulary, or the tokenizer has another BOS.
    """
    if token not in tokenizer.get_vocab():
        raise UserError(f"prepend_bos {token!r} is not in the vocabulary: name a token, such as the end of text")
    if tokenizer.bos_token not in (None, token):
        raise UserError(f"the tokenizer's BOS is {tokenizer.bos_token!r}, not {token!r}: use prepend_bos=True")
    tokenizer.bos_token = token
