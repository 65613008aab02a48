"""Padded batches of token ids."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saepatch.errors import UserError


@dataclass(frozen=True, eq=False)
class Tokens:
    """A padded batch of prompts.

    `ordinary` is true at every position that is neither padding nor BOS; means, rankings and edits use these.
    """

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    ordinary: Bool[Tensor, "batch pos"]

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
        return Tokens(self.input_ids[index], self.attention_mask[index], self.ordinary[index])

    def columns(self, end: int) -> "Tokens":
        """The columns before `end`."""
        return Tokens(self.input_ids[:, :end], self.attention_mask[:, :end], self.ordinary[:, :end])

    def followed_by(self, other: "Tokens") -> "Tokens":
        """Each row followed by the other batch's row."""
        return Tokens(
            torch.cat([self.input_ids, other.input_ids], 1),
            torch.cat([self.attention_mask, other.attention_mask], 1),
            torch.cat([self.ordinary, other.ordinary], 1),
        )

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
