"""Turns prompts with pictures into what a vision-language model of transformers reads.

A model's own processor expands the text and prepares the pixels, and the model's encoder reads them once; passes then
get the encoded pictures (`saepatch.model.inputs.images`). How a model treats them is measured, not listed: the logits
of the first prompt are compared with those of a plain call of the model, and a change at the end of a picture, and of
the prompt, shows which tokens read later ones.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saepatch.errors import UserError, reason_of
from saepatch.model.inputs.images import MARK, UNKNOWN, ImagePrompt, Images
from saepatch.model.inputs.patches import patches_seen
from saepatch.model.inputs.token_names import token_name
from saepatch.model.inputs.tokens import Tokens, appended_tokens

NOT_PIXELS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels")
KNOWN = 4096  # prompts whose token ids are remembered


class Pictures:
    """The pictures of one model's prompts. `call` runs the model on a batch; `processor` may be missing."""

    def __init__(self, hf: Any, tokenizer: Any, processor: Any, name: str, call: Callable[[Tokens], Tensor]) -> None:
        self.hf, self.tokenizer, self.processor, self.name, self.call = hf, tokenizer, processor, name, call
        self.ids = lru_cache(KNOWN)(self._ids)
        self.blocks = ""  # tokens that read each other, once it is known: none, those of a picture, of the prompt
        self._parts: dict[tuple[int, int], Float[Tensor, "tokens 4"]] = {}

    @cached_property
    def token_id(self) -> int | None:
        """The token that stands for one part of a picture; None: the model reads no pictures."""
        config = self.hf.config
        known = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
        return next((int(token) for token in known if token is not None), None)

    @property
    def mark(self) -> str:
        """What stands for a picture in the text that the model's processor reads."""
        self._check_able()
        config, mark = self.hf.config, str(self.processor.image_token)
        around = [getattr(config, f"vision_{side}_token_id", None) for side in ("start", "end")]
        if None in around:
            return mark
        before, after = (token_name(self.tokenizer, int(token)) for token in around)  # type: ignore[arg-type]
        return f"{before}{mark}{after}"

    def refuse_mark(self, prompt: str, ids: Sequence[int]) -> None:
        """Raises UserError for a text that has the mark of a picture, but no picture."""
        if self.token_id is None or isinstance(prompt, ImagePrompt):
            return
        own = str(getattr(self.processor, "image_token", MARK))
        if self.token_id in ids or MARK in prompt or own in prompt:
            raise UserError(
                f"prompt {prompt[:40]!r} has a picture's mark but no picture: "
                'write ImagePrompt(text, file), or "image": file in a file of pairs'
            )

    def _check_able(self) -> None:
        if self.token_id is None or not hasattr(self.hf, "get_image_features"):
            raise UserError(f"model {self.name!r} reads no pictures: give prompts of text alone")
        if "mm_encoder_outputs" not in inspect.signature(self.hf.forward).parameters:
            raise UserError(
                f"the installed transformers gives {type(self.hf).__name__} no encoded pictures (mm_encoder_outputs): "
                "install a newer one"
            )
        if self.processor is None or isinstance(self.processor, str):
            raise UserError(
                f"model {self.name!r} has no processor for pictures ({self.processor or 'none was given'}): load it "
                "from a folder with its preprocessor_config.json, or give the processor to wrap_model instead of the "
                "tokenizer"
            )

    def _ids(self, prompt: ImagePrompt) -> tuple[int, ...]:
        return tuple(self._processed(prompt)[0])

    def _processed(self, prompt: ImagePrompt) -> tuple[list[int], dict[str, Any], list[Any]]:
        """Token ids of a prompt, the processor's other results, and the pictures."""
        self._check_able()
        mark = str(self.processor.image_token)
        text = str(prompt) if mark == MARK or mark in prompt else prompt.replace(MARK, self.mark)
        if text.count(mark) != len(prompt.images) or not prompt.images:
            raise UserError(
                f"prompt {prompt[:40]!r} has {text.count(mark)} marks of pictures, but {len(prompt.images)} pictures: "
                f"write {MARK} where each stands"
            )
        bos = self.tokenizer.bos_token
        pictures = [read_picture(path) for path in prompt.images]
        try:
            own = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
            out = dict(self.processor(text=[text], images=[pictures], return_tensors="pt", **own))
        except (ValueError, TypeError, RuntimeError, IndexError, KeyError) as error:
            raise UserError(f"the processor of {self.name!r} refuses {prompt[:40]!r}: {reason_of(error)}") from error
        ids = out["input_ids"][0].tolist()
        ends = appended_tokens(self.tokenizer)
        return ids[: len(ids) - len(ends)] if ends and ids[-len(ends) :] == ends else ids, out, pictures

    @torch.no_grad()
    def attach(self, tokens: Tokens, prompts: Sequence[str]) -> Tokens:
        """A batch with what its pictures give; `prompts` are its rows' texts.

        Raises:
            UserError: a picture cannot be read, or the model treats pictures in a way that is not known here.
        """
        rows = [tokens.attention_mask[number].nonzero().flatten() for number in range(len(prompts))]
        real = [tokens.input_ids[number, columns] for number, columns in enumerate(rows)]
        first = next(number for number, prompt in enumerate(prompts) if isinstance(prompt, ImagePrompt))
        example = prompts[first]
        assert isinstance(example, ImagePrompt)
        if not self.blocks:
            self.blocks = self._measured(example, tokens.alone(first))
        one = self._of_row(example, real[first])
        whole = Images(*(values.new_zeros(len(rows), tokens.width, *values.shape[1:]) for values in vars(one).values()))
        whole.picture.fill_(-1)
        for number, (columns, prompt) in enumerate(zip(rows, prompts, strict=True)):
            if isinstance(prompt, ImagePrompt):
                mine = one if number == first else self._of_row(prompt, real[number])
                for name, values in vars(whole).items():
                    values[number, columns] = getattr(mine, name)
            elif self.blocks == "prompt":
                raise UserError(f"{self.name!r} reads prompts with pictures in both directions: give no others beside")
            else:
                whole.places[number, columns] = torch.arange(len(columns), device=tokens.input_ids.device)[:, None]
        return Tokens(tokens.input_ids, tokens.attention_mask, tokens.ordinary, whole)

    def _of_row(self, prompt: ImagePrompt, row: Int[Tensor, "pos"]) -> Images:
        """What the pictures of one prompt give, by its own tokens."""
        ids, out, pictures = self._processed(prompt)
        added = len(row) - len(ids)  # a BOS in front
        if row[added:].tolist() != ids or added not in (0, 1):
            raise UserError(f"pictures of prompt {prompt[:40]!r} changed while they were in use: run again")
        here, encoded = self._here(row), self._encode(self._pixels(out))
        if len(encoded) != int(here.sum()):
            raise UserError(
                f"pictures of {prompt[:40]!r} give {len(encoded)} vectors for {int(here.sum())} image tokens: the "
                "processor does not fit the model"
            )
        features = encoded.new_zeros(len(row), *encoded.shape[1:])
        features[here] = encoded
        types = next((out[name][0] for name in ("token_type_ids", "mm_token_type_ids") if name in out), None)
        types = torch.zeros(len(ids), dtype=torch.long) if types is None else types[: len(ids)]
        types = torch.cat([types.new_zeros(added), types]).to(row.device)
        before, after = _in_block(here, self.blocks)
        number, seen = self._where(pictures, here)
        return Images(features, here, self._places(row, out, added), types, before, after, number, seen)

    def _here(self, row: Int[Tensor, "pos"]) -> Bool[Tensor, "pos"]:
        assert self.token_id is not None
        return row == torch.tensor(self.token_id, device=row.device)

    def _pixels(self, out: dict[str, Any]) -> dict[str, Any]:
        """What the processor made of the pictures, as the model takes it."""
        left_out = {*NOT_PIXELS, "num_crops", "rows", "cols", *getattr(self.processor, "unused_input_names", ())}
        return {name: _moved(value, self.hf) for name, value in out.items() if name not in left_out}

    def _encode(self, pixels: dict[str, Any]) -> Float[Tensor, "tokens parts d_model"]:
        """The encoder's vectors of all image tokens: for the embedding, then for each of the first blocks."""
        out = self.hf.get_image_features(**pixels)
        pooled = out.pooler_output
        parts = [pooled, *(getattr(out, "deepstack_features", None) or ())]
        flat = [torch.cat([x.flatten(0, -2) for x in ([p] if isinstance(p, Tensor) else p)]) for p in parts]
        return torch.stack(flat, 1)

    def _places(self, row: Int[Tensor, "pos"], out: dict[str, Any], added: int) -> Int[Tensor, "pos axes"]:
        """Position ids on several axes (rotary embeddings of rows and columns), where the model has such."""
        rope: Any = next((module for module in self.hf.modules() if hasattr(module, "get_rope_index")), None)
        if rope is None:
            return row.new_zeros(len(row), 0)
        known = inspect.signature(rope.get_rope_index).parameters
        given = {name: value.to(row.device) for name, value in out.items() if name in known and name not in NOT_PIXELS}
        types = self._here(row).int()[None]
        given |= {"mm_token_type_ids": types} if "mm_token_type_ids" in known else {}
        return rope.get_rope_index(row[None], **given)[0][:, 0].T.to(torch.long)

    def _where(self, pictures: Sequence[Any], here: Tensor) -> tuple[Int[Tensor, "pos"], Float[Tensor, "pos 4"]]:
        """The picture of each image token, and the part of it that the token stands for."""
        parts = [self._parts_of(picture.size) for picture in pictures]
        number, seen = torch.full_like(here, -1, dtype=torch.long), torch.zeros(len(here), 4, device=here.device)
        if sum(map(len, parts)) == int(here.sum()):
            counted = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([len(part) for part in parts]))
            number[here], seen[here] = counted.to(here.device), torch.cat(parts).to(here.device)
        else:  # several pictures are cut otherwise than one alone, so that they cannot be told apart
            number[here], seen[here] = 0 if len(parts) == 1 else UNKNOWN, torch.nan
        return number, seen

    def _parts_of(self, size: tuple[int, int]) -> Float[Tensor, "tokens 4"]:
        if size not in self._parts:
            self._parts[size] = patches_seen(self.processor, size, self.token_id)
        return self._parts[size]

    def _measured(self, prompt: ImagePrompt, tokens: Tokens) -> str:
        """Which tokens read later ones, after a check that the logits are those of a plain call of the model."""
        row = tokens.input_ids[0]
        own = self._of_row(prompt, row)

        def run(ids: Tensor, images: Images) -> Float[Tensor, "pos vocab"]:
            batch = Images(*(values[None] for values in vars(images).values()))
            return self.call(Tokens(ids[None], tokens.attention_mask, tokens.ordinary, batch))[0].float()

        logits = run(row, own)
        tolerance = (1e-3 if self.hf.dtype == torch.float32 else 5e-2) * float(logits.std())
        gap = float((self._plain(prompt, row) - logits).abs().max())
        if not gap <= tolerance:
            raise UserError(
                f"pictures are refused with {type(self.hf).__name__}: given encoded pictures, its logits differ by "
                f"{gap:.1e} from those of a plain call"
            )
        last = int(own.here.nonzero()[-1])
        start = last - int(_in_block(own.here, "picture")[0][last])
        other, moved = row.clone(), own.features.clone()
        other[-1] = 5 if int(row[-1]) != 5 else 6
        moved[last] = moved[last].roll(1, -1) + 1

        def changed(now: Float[Tensor, "pos vocab"]) -> int:
            far = (now - logits).abs().amax(-1) > 1e-2 * tolerance
            return int(far.nonzero()[0]) if bool(far.any()) else len(row)

        first, from_picture = changed(run(other, own)), changed(run(row, replace(own, features=moved)))
        if first < len(row) - 1:
            return "prompt"
        if from_picture < start:
            raise UserError(f"pictures are refused with {type(self.hf).__name__}: tokens before a picture read it")
        return "picture" if from_picture < last else "none"

    def _plain(self, prompt: ImagePrompt, row: Int[Tensor, "pos"]) -> Float[Tensor, "pos vocab"]:
        """Logits of a plain call of the model, on what its processor makes of a prompt."""
        ids, out, _ = self._processed(prompt)
        given = self._pixels(out)
        for name in NOT_PIXELS[1:-1]:  # all of a token's own; a BOS may stand in front
            if name in out:
                mine = out[name][0, : len(ids)].to(row.device)
                fill = mine.new_full((len(row) - len(ids),), int(name == "attention_mask"))
                given[name] = torch.cat([fill, mine])[None]
        with _own_positions_kept(self.hf):
            return self.hf(input_ids=row[None], **given).logits[0].float()


def _in_block(here: Tensor, blocks: str) -> tuple[Int[Tensor, "pos"], Int[Tensor, "pos"]]:
    """Of each token, how many of its block come before and after it."""
    n = len(here)
    index = torch.arange(n, device=here.device)
    if blocks == "prompt":
        return index, n - 1 - index
    if blocks == "none":
        return torch.zeros_like(index), torch.zeros_like(index)
    last_text = torch.where(here, -1, index).cummax(0).values
    next_text = torch.where(here, n, index).flip(0).cummin(0).values.flip(0)
    return torch.where(here, index - last_text - 1, 0), torch.where(here, next_text - index - 1, 0)


@contextmanager
def _own_positions_kept(hf: nn.Module) -> Iterator[None]:
    """Leave no trace of a plain call: some models keep the offset of the last picture's positions for later passes."""
    before = {module: module.rope_deltas for module in hf.modules() if hasattr(module, "rope_deltas")}
    try:
        yield
    finally:
        for module, value in before.items():
            module.rope_deltas = value


def _moved(value: Any, hf: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.to(hf.device)
    return value.to(hf.dtype) if value.is_floating_point() else value


def read_picture(path: str) -> Any:
    """An RGB picture, upright.

    Raises:
        UserError: the package pillow is missing, or the file is missing or no picture.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise UserError("reading pictures needs the package pillow: pip install pillow") from error
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read picture {path!r} ({reason_of(error)}): give a PNG or JPEG file") from error
