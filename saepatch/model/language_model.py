"""A causal language model and its tokenizer: prompts in, logits and text out."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saepatch.errors import UserError
from saepatch.model.families import Layout
from saepatch.model.fingerprint import fingerprint, weights_of
from saepatch.model.greedy import end_tokens, greedy_options
from saepatch.model.sites import Site


@dataclass(frozen=True, eq=False)
class Tokens:
    """A padded batch of prompts.

    `ordinary` is true at every position that is neither padding nor BOS: where means, rankings and edits act.
    """

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    ordinary: Bool[Tensor, "batch pos"]

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def lengths(self) -> Int[Tensor, "batch"]:
        """Number of tokens of each prompt, BOS included, padding not."""
        return self.attention_mask.sum(-1)

    @property
    def last(self) -> Int[Tensor, "batch"]:
        """Index of each prompt's last token in the padded row."""
        width = self.attention_mask.shape[1]
        return width - 1 - self.attention_mask.flip(-1).argmax(-1)

    @property
    def padded(self) -> bool:
        return not bool(self.attention_mask.all())

    def rows(self, index: Sequence[int] | Int[Tensor, "n"] | slice) -> "Tokens":
        return Tokens(self.input_ids[index], self.attention_mask[index], self.ordinary[index])

    def batches(self, size: int) -> Iterator["Tokens"]:
        for start in range(0, len(self), size):
            yield self.rows(slice(start, start + size))


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A Hugging Face causal LM, its tokenizer and the layout of its sites. `hf` stays the plain library object."""

    hf: nn.Module
    tokenizer: Any
    name: str
    layout: Layout
    prepend_bos: bool = False  # put a BOS in front of texts whose tokenizer does not

    @property
    def config(self) -> Any:
        return self.hf.config

    @property
    def n_layers(self) -> int:
        return len(self.layout.blocks)

    @property
    def d_model(self) -> int:
        return int(self.config.get_text_config().hidden_size)

    @property
    def n_heads(self) -> int:
        """Attention (query) heads a layer."""
        return int(self.config.get_text_config().num_attention_heads)

    def width(self, site: Site) -> int:
        """Size of the last dimension of what a site holds."""
        self.layout.module(site)
        return self.layout.widths[site.stream]

    @property
    def device(self) -> torch.device:
        """Where token ids go in, and where what is read from the model is kept."""
        weight: Tensor = self.hf.get_input_embeddings().weight  # type: ignore[operator]
        if weight.is_meta:  # offloaded: accelerate's hook knows where it runs
            hook: Any = self.hf.get_input_embeddings()._hf_hook  # type: ignore[operator]
            return torch.device(hook.execution_device)
        return weight.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.hf.parameters()).dtype

    @property
    def bos_id(self) -> int | None:
        return self.tokenizer.bos_token_id

    @property
    def fingerprint(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of all weights; taken again after they were changed in place."""
        versions = tuple((id(weight), weight._version) for weight in self.hf.parameters())
        if self._known_fingerprint.get("versions") != versions:
            self._known_fingerprint.update(versions=versions, digits=fingerprint(weights_of(self.hf)))
        return str(self._known_fingerprint["digits"])

    @cached_property
    def _known_fingerprint(self) -> dict[str, Any]:
        return {}

    @cached_property
    def _forward_arguments(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.hf.forward).parameters)

    def encode(self, text: str) -> list[int]:
        """Token ids of one prompt. A text that begins with the BOS text already gets no second BOS."""
        bos = self.tokenizer.bos_token
        own = bool(bos) and text.startswith(bos)
        ids = list(self.tokenizer(text, add_special_tokens=not own, verbose=False)["input_ids"])
        if self.prepend_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        return ids

    def tokenize(self, texts: Sequence[str], side: str = "right") -> Tokens:
        """Tokenise prompts into one batch, padded on the given side.

        Raises:
            UserError: a prompt is empty (it holds no token beside BOS), there is no prompt, or one is longer than the
                model's context.
        """
        if not texts:
            raise UserError("there are no prompts: give at least one")
        ids = [self.encode(text) for text in texts]
        context = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        for text, row in zip(texts, ids, strict=True):
            if not any(token != self.bos_id for token in row):
                raise UserError(f"empty prompt {text!r}: a prompt needs at least one token beside BOS")
            if context is not None and len(row) > context:
                raise UserError(f"prompt of {len(row)} tokens is longer than the context of {context}: {text[:40]!r}…")
        return self.pad(ids, side)

    def pad(self, ids: Sequence[Sequence[int]], side: str = "right") -> Tokens:
        """Pad rows of token ids into one batch on the model's device."""
        if side not in ("left", "right"):
            raise UserError(f"padding side {side!r}: use 'left' or 'right'")
        width = max(map(len, ids))
        pad = self.tokenizer.pad_token_id
        pad = pad if pad is not None else (self.tokenizer.eos_token_id or 0)
        rows, masks = [], []
        for row in ids:
            fill = width - len(row)
            left, right = (fill, 0) if side == "left" else (0, fill)
            rows.append([pad] * left + list(row) + [pad] * right)
            masks.append([0] * left + [1] * len(row) + [0] * right)
        input_ids = torch.tensor(rows, device=self.device)
        mask = torch.tensor(masks, device=self.device)
        return Tokens(input_ids, mask, ordinary(input_ids, mask, self.bos_id))

    def inputs(self, tokens: Tokens) -> dict[str, Any]:
        """Arguments of `hf` for a batch. Padded batches carry explicit positions, so either side gives one result."""
        if not tokens.padded:
            return {"input_ids": tokens.input_ids, "use_cache": False}
        inputs = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask, "use_cache": False}
        if "position_ids" in self._forward_arguments:
            inputs["position_ids"] = (tokens.attention_mask.cumsum(-1) - 1).clamp(min=0)
        return inputs

    @torch.no_grad()
    def logits(self, tokens: Tokens) -> Float[Tensor, "batch pos vocab"]:
        """Logits at every position."""
        return self.hf(**self.inputs(tokens)).logits

    @torch.no_grad()
    def next_logits(self, tokens: Tokens) -> Float[Tensor, "batch vocab"]:
        """Logits after each prompt's last token; only those are computed where the batch allows."""
        last = tokens.last
        aligned = bool((last == tokens.input_ids.shape[1] - 1).all())
        if aligned and "logits_to_keep" in self._forward_arguments:
            return self.hf(**self.inputs(tokens), logits_to_keep=1).logits[:, -1]
        logits = self.hf(**self.inputs(tokens)).logits
        return logits[torch.arange(len(tokens), device=logits.device), last]

    def generate(self, prompts: Sequence[str], max_new_tokens: int = 40, batch_size: int = 64) -> list[str]:
        """Greedy continuations, prompt and special tokens left out."""
        return list(self.tokenizer.batch_decode(self.continue_ids(prompts, max_new_tokens, batch_size)))

    def continue_ids(self, prompts: Sequence[str], max_new_tokens: int, batch_size: int = 64) -> list[list[int]]:
        """Greedy continuations as token ids, up to the end of text, special tokens left out."""
        special, ends, rows = set(self.tokenizer.all_special_ids), end_tokens(self.hf, self.tokenizer), []
        for start in range(0, len(prompts), batch_size):
            tokens = self.tokenize(prompts[start : start + batch_size], side="left")
            new = self.generate_ids(tokens, max_new_tokens)
            whole = [takewhile(lambda token: token not in ends, row) for row in new.tolist()]
            rows += [[token for token in row if token not in special] for row in whole]
        return rows

    @torch.no_grad()
    def generate_ids(self, tokens: Tokens, max_new_tokens: int, min_new_tokens: int = 0) -> Int[Tensor, "batch new"]:
        """Greedy continuation of a left-padded batch, as token ids; rows that ended are filled with padding.

        Each token is the one of the largest logit, whatever penalties and bans the checkpoint generates with. None ends
        before `min_new_tokens`.
        """
        generate: Any = self.hf.generate
        out = generate(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            max_new_tokens=max_new_tokens,
            **greedy_options(self.hf, self.tokenizer) | {"min_new_tokens": min_new_tokens or None},
            pad_token_id=self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0,
        )
        return out[:, tokens.input_ids.shape[1] :]

    def chat(self, request: str) -> str:
        """The chat template's text for one user turn, ready for the assistant's answer.

        Raises:
            UserError: the tokenizer has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise UserError(f"the tokenizer of {self.name!r} has no chat template: write the prompt out yourself")
        turns = [{"role": "user", "content": request}]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def ordinary(
    input_ids: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], bos_id: int | None
) -> Bool[Tensor, "batch pos"]:
    """True where a token is neither padding nor BOS."""
    real = mask.bool()
    return real if bos_id is None else real & (input_ids != bos_id)


def refuse_training(model: LanguageModel) -> None:
    """Raises UserError where a part of the model is in training mode: its passes would be random."""
    if any(module.training for module in model.hf.modules()):
        raise UserError(f"{model.name} is in training mode, so its passes are random: call model.hf.eval() first")
