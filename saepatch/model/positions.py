"""The positions of a forward pass on which an intervention acts, accounting for padding and caches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saepatch.errors import UserError
from saepatch.model.inputs.images import UNKNOWN, Images


@dataclass(frozen=True)
class At:
    """The tokens of a text in the prompt, leading space included; `occurrence` counts from 0, or from the end (-1)."""

    text: str
    occurrence: int = -1

    @staticmethod
    def image(box: tuple[float, float, float, float] | None = None, picture: int = -1) -> "AtImage":
        """The tokens of a picture; with a box, those whose part of the picture has its centre in the box.

        Args:
            box: Left, top, right and bottom in pixels of the picture.
            picture: Which picture of the prompt, from 0 or from the end (-1).
        """
        return AtImage(None if box is None else (box[0], box[1], box[2], box[3]), picture)


@dataclass(frozen=True)
class AtImage:
    """The tokens of a picture, or of a box of it: see `At.image`."""

    box: tuple[float, float, float, float] | None = None
    picture: int = -1

    def __post_init__(self) -> None:
        if self.box is not None and not (self.box[0] < self.box[2] and self.box[1] < self.box[3]):
            raise UserError(f"box {self.box} is empty: give left, top, right and bottom, in pixels")

    def __repr__(self) -> str:
        box = "" if self.box is None else ", ".join(f"{edge:g}" for edge in self.box)
        given = ([f"({box})"] if box else []) + ([] if self.picture == -1 else [f"picture={self.picture}"])
        return f"At.image({', '.join(given)})"


@dataclass(frozen=True)
class Turn:
    """The content of a turn in a chat prompt, by role: system, user or assistant.

    `occurrence` counts the role's turns from 0, or from the end (-1). What the template writes around contents, such as
    headers, is not part of a turn.
    """

    role: str
    occurrence: int = -1


# "all": prompt and generated tokens; "prompt"; "generated"; "last": the prompt's last token. None of these include
# padding or BOS. "every": all tokens, including BOS. An int, a slice or several ints are indices into the prompt's own
# tokens, from 0 or from the end (-1); BOS counts and can be selected, padding does not count. A bool tensor
# [batch, pos] is a mask over the prompt.
Positions = str | int | slice | Sequence[int] | At | AtImage | Turn | Tensor
NAMED = ("all", "prompt", "generated", "last", "every")
GROUPS = ("all", "prompt", "generated", "every")  # these select no position explicitly


@dataclass(frozen=True, eq=False)
class Pass:
    """The tokens that one forward pass processes.

    `index` numbers each row's own tokens from 0, over all passes of one generation; the first `n_prompt` of them are
    the prompt. `start` is the column of this pass' first token in the whole padded row; `width` is the number of
    columns of the padded prompts. `turns` are a chat's, as role, first token and the first after it.
    """

    input_ids: Int[Tensor, "batch pos"]
    ordinary: Bool[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    index: Int[Tensor, "batch pos"]
    n_prompt: Int[Tensor, "batch"]
    start: int
    width: int
    decode: Callable[[Sequence[int]], str]
    turns: Callable[[Sequence[int]], Sequence[tuple[str, int, int]]]
    images: Images | None

    def columns(self, first: int, end: int) -> "Pass":
        """Some columns of this pass alone; positions that name a text or a picture are chosen in the whole pass."""
        parts = {name: getattr(self, name)[:, first:end] for name in ("input_ids", "ordinary", "real", "index")}
        images = None if self.images is None else self.images.at(slice(None), slice(first, end))
        return replace(self, **parts, images=images, start=self.start + first)

    def ending(self, columns: int) -> "Pass":
        """The last columns of this pass alone."""
        width = self.input_ids.shape[1]
        return self.columns(width - columns, width)

    @property
    def in_prompt(self) -> Bool[Tensor, "batch pos"]:
        return self.real & (self.index < self.n_prompt[:, None])

    def select(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """Mask of the positions in this pass on which the intervention acts.

        Raises:
            UserError: an unknown name, a position outside a prompt, a text that a prompt does not contain, or a mask
                whose shape is not the prompt's.
        """
        if isinstance(positions, str):
            return self._named(positions)
        if isinstance(positions, At):
            return self._spans(lambda row, ids: _text_span(positions, row, ids, self.decode))
        if isinstance(positions, AtImage):
            return self._in_pictures(positions)
        if isinstance(positions, Turn):
            return self._spans(lambda row, ids: _turn_span(positions, row, self.turns(ids)))
        if isinstance(positions, Tensor):
            return self._mask(positions)
        if isinstance(positions, slice):
            return self._span(positions)
        wanted = torch.zeros_like(self.real)
        for position in [positions] if isinstance(positions, (int, np.integer)) else positions:
            wanted |= self._index(int(position))
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
        raise UserError(
            f"unknown positions {name!r}: use one of {', '.join(NAMED)}, an index, a span, At(text), At.image() or "
            "Turn(role)"
        )

    def _index(self, position: int) -> Bool[Tensor, "batch pos"]:
        shortest = int(self.n_prompt.min())
        if not -shortest <= position < shortest:
            raise UserError(f"position {position} is out of range: the shortest prompt has {shortest} tokens")
        from_end = self.n_prompt[:, None] + position
        return self.in_prompt & (self.index == (from_end if position < 0 else position))

    def _span(self, span: slice) -> Bool[Tensor, "batch pos"]:
        rows = []
        for length, index, inside in zip(self.n_prompt.tolist(), self.index, self.in_prompt, strict=True):
            chosen = torch.tensor(list(range(length))[span], device=index.device, dtype=index.dtype)
            if not len(chosen):
                raise UserError(
                    f"span {span.start}:{span.stop} is empty for a prompt of {length} tokens: give a span inside it"
                )
            rows.append(torch.isin(index, chosen) & inside)
        return torch.stack(rows)

    def _in_pictures(self, at: AtImage) -> Bool[Tensor, "batch pos"]:
        """The tokens of each row's picture, or of a box of it."""
        none = torch.zeros_like(self.real)
        if self.start >= self.width:
            return none  # a later pass of a cached generation: pictures were in the prompt
        if self.images is None:
            raise UserError(
                "positions At.image() in prompts without pictures: give ImagePrompt(text, file), and run them by "
                "model.logits or next_logits, since pictures passed as pixels are not known here"
            )
        number = self.images.picture
        if bool((number == UNKNOWN).any()):
            raise UserError(
                "the model cuts several pictures otherwise than one, so that their tokens cannot be told apart: give "
                "prompts with one picture, or positions by index"
            )
        counts = number.amax(-1) + 1
        wanted = counts + at.picture if at.picture < 0 else torch.full_like(counts, at.picture)
        if bool(((wanted < 0) | (wanted >= counts)).any()):
            raise UserError(f"there is no picture {at.picture} in a prompt of {int(counts.min())}: count from 0 or -1")
        chosen = (number == wanted[:, None]) & self.images.here
        if at.box is None:
            return chosen
        left, top, right, bottom = self.images.seen.unbind(-1)
        across, down = (left + right) / 2, (top + bottom) / 2
        inside = (at.box[0] <= across) & (across < at.box[2]) & (at.box[1] <= down) & (down < at.box[3])
        chosen = chosen & inside & (left < right)
        if bool((empty := ~chosen.any(-1)).any()):
            row = int(empty.int().argmax())
            size = (right - left)[row][self.images.here[row]].median()
            raise UserError(
                f"box {at.box} holds the centre of no part of the picture of prompt {row}, whose parts are "
                f"{float(size):.0f} pixels wide: give a larger box, inside the picture"
            )
        return chosen

    def _mask(self, mask: Tensor) -> Bool[Tensor, "batch pos"]:
        if mask.dtype != torch.bool or mask.shape != (len(self.input_ids), self.width):
            raise UserError(
                f"positions mask is {mask.dtype} {tuple(mask.shape)}: "
                f"give torch.bool {(len(self.input_ids), self.width)}"
            )
        return from_prompt(mask, self, fill=False) & self.real

    def _spans(self, span: Callable[[int, list[int]], tuple[int, int]]) -> Bool[Tensor, "batch pos"]:
        """A span of each row's prompt, found by its number and token ids."""
        wanted = torch.zeros_like(self.real)
        if self.start >= self.width:
            return wanted  # a later pass of a cached generation: the span was in the prompt
        for row, (tokens, inside) in enumerate(zip(self.input_ids, self.in_prompt, strict=True)):
            columns = inside.nonzero().flatten().tolist()
            first, end = span(row, tokens[inside].tolist())
            wanted[row, columns[first] : columns[end - 1] + 1] = True
        return wanted


def _text_span(at: At, row: int, ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> tuple[int, int]:
    spans = find_text(at.text, ids, decode)
    if not -len(spans) <= at.occurrence < len(spans):
        raise UserError(
            f"prompt {row} contains {at.text!r} as whole tokens {len(spans)} times, so there is no occurrence "
            f"{at.occurrence}: check the spelling, or give an index"
        )
    return spans[at.occurrence]


def _turn_span(turn: Turn, row: int, turns: Sequence[tuple[str, int, int]]) -> tuple[int, int]:
    spans = [(first, end) for role, first, end in turns if role == turn.role]
    if not -len(spans) <= turn.occurrence < len(spans):
        roles = ", ".join(role for role, _, _ in turns) or "none"
        raise UserError(
            f"prompt {row} has {len(spans)} turns of {turn.role!r}, so there is no turn {turn.occurrence}: its turns "
            f"are {roles}"
        )
    return spans[turn.occurrence]


def find_text(text: str, ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[tuple[int, int]]:
    """Spans [first, end) of whole tokens that spell `text`, ignoring leading spaces."""
    word = text.strip()
    if not word:
        raise UserError(f"positions At({text!r}) select no token: give the text of at least one token")
    ends = [len(decode(ids[: i + 1])) for i in range(len(ids))]
    starts = [0, *ends[:-1]]
    whole = decode(ids)
    spaces = [len(whole[s:e]) - len(whole[s:e].lstrip()) for s, e in zip(starts, ends, strict=True)]
    spans, offset = [], whole.find(word)
    while offset >= 0:
        first = [i for i in range(len(ids)) if starts[i] + spaces[i] == offset and ends[i] > offset]
        last = [i for i in range(len(ids)) if ends[i] == offset + len(word)]
        if first and last:
            spans.append((first[0], last[0] + 1))
        offset = whole.find(word, offset + 1)
    return spans


def from_prompt(values: Tensor, seen: Pass, fill: float | bool) -> Tensor:
    """Values at the prompt's columns, [batch, prompt, …], moved to the columns of this pass; `fill` elsewhere."""
    columns = seen.input_ids.shape[1]
    out = values.new_full((values.shape[0], columns, *values.shape[2:]), fill)
    here = max(0, min(seen.width - seen.start, columns))
    out[:, :here] = values[:, seen.start : seen.start + here]
    return out
