"""Prompts with pictures, and what their pictures give to a decoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saepatch.errors import UserError

UNKNOWN = -2  # number of the picture of a token, where pictures cannot be told apart
MARK = "<image>"  # stands for a picture in a prompt's text, whatever a model's own mark is


class ImagePrompt(str):
    """A prompt with pictures: its text, in which each `<image>` (or the model's own mark) stands for a picture.

    `images` are the pictures' files, in order. Prompts are equal where text and files are.
    """

    images: tuple[str, ...]
    __slots__ = ("images",)

    def __new__(cls, text: str, *images: str | Path) -> "ImagePrompt":
        made = super().__new__(cls, text)
        made.images = tuple(map(str, images))
        return made

    def __getnewargs__(self) -> tuple[str, ...]:  # type: ignore[override]
        return str(self), *self.images

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True and self.images == getattr(other, "images", ())

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((str(self), self.images))

    def __add__(self, text: str) -> "ImagePrompt":
        return ImagePrompt(str(self) + text, *self.images)

    def __radd__(self, text: str) -> "ImagePrompt":
        return ImagePrompt(text + str(self), *self.images)


@dataclass(frozen=True, eq=False)
class Images:
    """What the pictures of a batch give to the decoder, by position; zeros at text and padding.

    Attributes:
        features: What replaces the token's embedding, then what is added after each of the first blocks (none in most
            families).
        here: The image tokens.
        places: The model's position ids, where it gives the tokens of a picture positions of its own; no axes: it does
            not.
        types: The token types that the model's attention mask is made of, if it takes any.
        before: How many tokens of its block come before this one. In a block, tokens read each other in both
            directions, so the block runs whole; 0 where tokens read earlier ones alone.
        after: How many come after it.
        picture: The number of the picture in its prompt, from 0; -1 at text, `UNKNOWN` where it is not known.
        seen: The part of the picture that a token stands for: left, top, right and bottom, as shares of the picture's
            width and height (outside it: what the processor added).
    """

    features: Float[Tensor, "batch pos parts d_model"]
    here: Bool[Tensor, "batch pos"]
    places: Int[Tensor, "batch pos axes"]
    types: Int[Tensor, "batch pos"]
    before: Int[Tensor, "batch pos"]
    after: Int[Tensor, "batch pos"]
    picture: Int[Tensor, "batch pos"]
    seen: Float[Tensor, "batch pos 4"]

    def at(self, *index: Any) -> "Images":
        return Images(*(values[index] for values in vars(self).values()))

    def above(self, other: "Images") -> "Images":
        return Images(
            *(
                torch.cat([mine, theirs])
                for mine, theirs in zip(*map(dict.values, map(vars, (self, other))), strict=True)
            )
        )

    def block_start(self, column: int) -> int:
        """The last column up to this one before which no row's block is cut."""
        while column > 0 and (inside := int(self.before[:, column].max())):
            column -= inside
        return max(column, 0)

    def same_start(self, other: "Images | None", alike: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """Of positions up to which two batches' tokens are alike, those up to which their pictures are, too."""
        if other is None:
            return alike & ~self.here.cumsum(-1).bool()
        both = (self.features == other.features).flatten(2).all(-1) & (self.here == other.here)
        alike = (alike & both & (self.places == other.places).all(-1)).cumprod(-1).bool()
        starts = torch.arange(alike.shape[1], device=alike.device) - self.before
        ended = torch.where(alike, alike.shape[1], starts).amin(
            -1, keepdim=True
        )  # a block that is not alike to its end
        return alike & (starts < ended)

    def arguments(self, start: int, accepted: frozenset[str]) -> dict[str, Any]:
        """Arguments of a forward pass over the columns from `start` on.

        Raises:
            UserError: the pass begins or ends inside a block whose tokens read each other.
        """
        if bool(self.before[:, start].any()) or bool(self.after[:, -1].any()):
            raise UserError(
                "a pass begins or ends inside a picture whose tokens read each other in both directions: "
                "run prompts with pictures whole, and shorter than 4,096 tokens"
            )
        given: dict[str, Any] = {}
        here = self.here[:, start:]
        if bool(here.any()):
            given["mm_encoder_outputs"] = {"image": Encoded(self, self.features[:, start:][here])}
        if self.places.shape[-1]:
            given["position_ids"] = self.places[:, start:].permute(2, 0, 1)
        else:
            named = [name for name in ("token_type_ids", "mm_token_type_ids") if name in accepted]
            given |= dict.fromkeys(named, self.types)
        return given


def images_among(arguments: Mapping[str, Any], start: int) -> Images | None:
    """The pictures among the arguments of a pass that begins at a column, for its columns alone.

    Raises:
        UserError: pictures come as pixels, whose places are unknown.
    """
    given = (arguments.get("mm_encoder_outputs") or {}).get("image")
    if isinstance(given, Encoded):
        return given.images.at(slice(None), slice(start, None))
    return None


class _Features(tuple[Tensor]):
    """The features of all pictures in one tensor, for families that concatenate them and those that do not."""

    def to(self, *args: Any) -> Tensor:
        return self[0].to(*args)


class Encoded:
    """What a picture encoder of transformers returns, with the batch that it belongs to."""

    def __init__(self, images: Images, parts: Float[Tensor, "tokens parts d_model"]) -> None:
        self.images = images
        self.pooler_output = _Features((parts[:, 0],))
        self.deepstack_features = [(part,) for part in parts[:, 1:].unbind(1)]
