"""A causal language model and its tokenizer: prompts in, logits and text out."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saepatch.errors import UserError, reason_of
from saepatch.model.families import Layout
from saepatch.model.fingerprint import adapter_state, fingerprint, weights_of
from saepatch.model.forward import Forward, note_columns
from saepatch.model.greedy import end_tokens, greedy_options
from saepatch.model.hooks import capture, contiguous_head, is_spliced
from saepatch.model.inputs.images import ImagePrompt
from saepatch.model.inputs.padding import Padding, by_length, positions_of, spread
from saepatch.model.inputs.pictures import Pictures
from saepatch.model.inputs.token_names import token_name
from saepatch.model.inputs.tokens import Tokens, appended_tokens, check_lengths, ordinary, padded_rows, refuse_pictures
from saepatch.model.inputs.turns import ChatFrame, Span, token_spans, written_chat
from saepatch.model.other_tools import no_such_attribute
from saepatch.model.sites import Site

__all__ = ["LanguageModel", "Tokens", "ordinary", "refuse_training"]


@dataclass(frozen=True, eq=False, repr=False)
class LanguageModel:
    """A Hugging Face causal LM, its tokenizer and the layout of its sites. `hf` is the unmodified library object."""

    hf: nn.Module
    tokenizer: Any
    name: str
    layout: Layout
    prepend_bos: bool = False  # prepend a BOS where the tokenizer does not
    step_limit: int | None = None  # columns per pass with a cache (0: no cache; None: no limit); probed on load
    padding: Padding = field(default_factory=Padding)  # sides on which rows may be padded; probed on load
    last_alone: bool = True  # whether blocks run at all positions when only the last logits are needed; probed on load
    processor: Any = None  # of pictures, for a model that reads them; a string: why there is none

    def __post_init__(self) -> None:
        """Raises UserError for `prepend_bos` where the tokenizer has no BOS."""
        if self.prepend_bos and self.bos_id is None:
            raise UserError(
                f"the tokenizer of {self.name!r} has no BOS to prepend: name a token to use instead, as in "
                "prepend_bos='<|endoftext|>' (--prepend_bos '<|endoftext|>'), or leave prepend_bos out"
            )

    def __repr__(self) -> str:
        about = f"{self.config.model_type}, {self.n_layers} layers, width {self.d_model}"
        return f"LanguageModel({self.name!r}: {about}, {str(self.dtype).removeprefix('torch.')}, {self.device})"

    def __getattr__(self, name: str) -> Any:
        raise no_such_attribute(name)

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
        """Number of attention (query) heads per layer; 0 where the config has no single number for all layers."""
        heads = getattr(self.config.get_text_config(), "num_attention_heads", None)
        return heads if isinstance(heads, int) else 0

    def width(self, site: Site) -> int:
        """Size of the last dimension of a site's tensor."""
        return self.layout.width(site)

    @property
    def device(self) -> torch.device:
        """Device of the token embeddings: inputs go there, and captured values are kept there."""
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
        """First 16 hexadecimal digits of the SHA-256 of all weights and acting adapters; recomputed after changes."""
        versions = self.weight_versions
        if self._known_fingerprint.get("versions") != versions:
            digits = fingerprint(weights_of(self.hf), adapter_state(self.hf))
            self._known_fingerprint.update(versions=versions, digits=digits)
        return str(self._known_fingerprint["digits"])

    @property
    def weight_versions(self) -> tuple[Any, ...]:
        """Changes whenever a weight is assigned or written in place, or an adapter is switched."""
        return (adapter_state(self.hf), *((id(weight), weight._version) for weight in self.hf.parameters()))

    def note_restored(self, digits: str) -> None:
        """Record, without hashing them, that the weights are again those whose fingerprint was `digits`."""
        self._known_fingerprint.update(versions=self.weight_versions, digits=digits)

    @cached_property
    def _known_fingerprint(self) -> dict[str, Any]:
        return {}

    @cached_property
    def _forward(self) -> Forward:
        return Forward(self.hf, self.padding, self.step_limit, self.last_alone)

    @cached_property
    def pictures(self) -> Pictures:
        """How prompts with pictures (`ImagePrompt`) are read."""
        return Pictures(self.hf, self.tokenizer, self.processor, self.name, self.call)

    @cached_property
    def appended(self) -> list[int]:
        """Tokens that the tokenizer appends to every text (such as EOS); `encode` drops them."""
        return appended_tokens(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of one prompt. A text that already begins with the BOS text gets no second BOS.

        Tokens that the tokenizer appends to every text are dropped, since a prompt is to be continued: to include an
        EOS, write it in the text.
        """
        bos = self.tokenizer.bos_token
        own = bool(bos) and text.startswith(bos)
        if isinstance(text, ImagePrompt):
            ids = list(self.pictures.ids(text))
        else:
            ids = list(self.tokenizer(text, add_special_tokens=not own, verbose=False)["input_ids"])
            ids = ids if own else ids[: len(ids) - len(self.appended)]
        if self.prepend_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        return ids

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """The name of each token: its text, including a leading space."""
        return [token_name(self.tokenizer, int(token)) for token in ids]

    def tokenize(self, texts: Sequence[str], side: str = "right") -> Tokens:
        """Tokenise prompts into one batch, padded on the given side.

        Raises:
            UserError: a prompt is empty (has no token besides BOS) or longer than the model's context, there are no
                prompts, or they are one string instead of several.
        """
        if isinstance(texts, str):
            raise UserError(f"the texts are one string, {texts[:40]!r}: give a list of texts, such as [text]")
        if not texts:
            raise UserError("there are no prompts: give at least one")
        ids = [self.encode(text) for text in texts]
        for text, row in zip(texts, ids, strict=True):
            check_lengths(text, row, self.bos_id, self.context)
            self.pictures.refuse_mark(text, row)
        tokens = self.pad(ids, side)
        return self.pictures.attach(tokens, texts) if any(isinstance(t, ImagePrompt) for t in texts) else tokens

    def as_tokens(self, texts: Tokens | Sequence[str]) -> Tokens:
        """Texts as tokens, padded on the right; tokens as they are."""
        return texts if isinstance(texts, Tokens) else self.tokenize(texts)

    @property
    def vocabulary(self) -> int:
        """Number of token ids, from the model's configuration."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def context(self) -> int | None:
        """The largest number of positions, if the model's configuration states one."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @cached_property
    def pad_id(self) -> int:
        """Token id for padding: always within the vocabulary, even where the tokenizer's padding token is not."""
        embedded = int(self.hf.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(int(token) for token in candidates if token is not None and 0 <= token < embedded)

    def pad(self, ids: Sequence[Sequence[int]], side: str = "right") -> Tokens:
        """Pad rows of token ids into one batch on the model's device."""
        if side not in ("left", "right"):
            raise UserError(f"padding side {side!r}: use 'left' or 'right'")
        input_ids, mask = padded_rows(ids, self.pad_id, side, self.device)
        return Tokens(input_ids, mask, ordinary(input_ids, mask, self.bos_id))

    def probe(self) -> Tokens:
        """A row of arbitrary tokens for probing the model."""
        ids = (torch.arange(6, device=self.device) * 7 + 11).unsqueeze(0) % self.vocabulary
        return Tokens(ids, torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool))

    @property
    def takes_cache(self) -> bool:
        return self._forward.cache_name is not None

    def new_cache(self) -> Any:
        """An empty cache for `inputs`, `call` and `capture`, which add their columns to it."""
        return self._forward.new_cache()

    def inputs(self, tokens: Tokens, start: int = 0, last: int = 0, cache: Any = None) -> dict[str, Any]:
        """Arguments of `hf` for a batch: see `saepatch.model.forward.Forward.arguments`."""
        return self._forward.arguments(tokens, start, last, cache)

    def call(
        self, tokens: Tokens, start: int = 0, last: int = 0, cache: Any = None
    ) -> Float[Tensor, "batch pos vocab"]:
        """Logits of one forward pass, with a graph where gradients are enabled.

        Args:
            tokens: The whole batch, including columns that the cache holds already.
            start: First column to run; earlier columns are in the cache.
            last: Return only the logits of so many last columns; 0: of all.
            cache: Holds the columns before `start`, and is extended by the others; None: no cache.
        """
        with contiguous_head(self.hf) if last else nullcontext():
            logits = self.hf(**self.inputs(tokens, start, last, cache)).logits.to(self.device)
        note_columns(cache, tokens.width)
        return logits[:, -last:] if last else logits

    @torch.no_grad()
    def capture(
        self, tokens: Tokens, sites: Collection[Site], start: int = 0, cache: Any = None, stop: bool = True
    ) -> dict[Site, Float[Tensor, "batch pos width"]]:
        """What the sites emit in one forward pass; with `stop`, the pass ends at the last site needed.

        Where padding would change the results, rows run grouped by length, and values at padding are zeros.
        """
        if cache is None and not start and self._runs_apart(tokens):
            return spread(tokens, lambda part: self.capture(part, sites, stop=stop))
        emitted = capture(self.hf, self.layout, sites, self.inputs(tokens, start, cache=cache), stop, self.device)
        note_columns(cache, tokens.width)
        return emitted

    @torch.no_grad()
    def logits(self, tokens: Tokens | Sequence[str]) -> Float[Tensor, "batch pos vocab"]:
        """Logits at every position of tokens or texts; zeros at padding where rows have to run grouped by length."""
        tokens = self.as_tokens(tokens)
        if self._runs_apart(tokens):
            return spread(tokens, lambda part: {"logits": self.call(part)})["logits"]
        return self.call(tokens)

    def _runs_apart(self, tokens: Tokens) -> bool:
        """Whether rows run grouped by length. Never in a splice, which needs the whole batch in one pass."""
        return not self.padding.allows(tokens.attention_mask) and not is_spliced(self.layout)

    @torch.no_grad()
    def next_logits(self, tokens: Tokens | Sequence[str]) -> Float[Tensor, "batch vocab"]:
        """Logits after each prompt's last token; where all prompts end in the last column, only these are computed."""
        tokens = self.as_tokens(tokens)
        last = tokens.last
        if self._runs_apart(tokens):
            parts = [(rows[:, 0], self.next_logits(part)) for rows, _, part in by_length(tokens)]
            order = torch.cat([rows for rows, _ in parts]).argsort()
            return torch.cat([logits for _, logits in parts])[order]
        if bool((last == tokens.width - 1).all()):
            return self.call(tokens, last=True)[:, -1]
        logits = self.call(tokens)
        return logits[torch.arange(len(tokens), device=logits.device), last]

    @torch.no_grad()
    def logits_of_continuations(
        self, prompts: Tokens, continuations: Sequence[Sequence[int]]
    ) -> Float[Tensor, "batch new vocab"]:
        """The logits that predict each token of the continuations (token ids), by teacher forcing.

        The prompts run first, then the continuations on their cache, so that a splice acts as in generation (token by
        token in models that require it). Prompts are padded on the left; values after the end of a shorter
        continuation are meaningless.
        """
        if not self.padding.allows(prompts.attention_mask, cached=True):
            width = max(1, *map(len, continuations))
            whole: Tensor | None = None
            for numbers, _, part in by_length(prompts):
                logits = self.logits_of_continuations(part, [continuations[row] for row in numbers[:, 0].tolist()])
                whole = logits.new_zeros(len(prompts), width, logits.shape[-1]) if whole is None else whole
                whole[numbers[:, 0].to(logits.device), : logits.shape[1]] = logits
            assert whole is not None
            return whole
        longest = max(map(len, continuations))
        rows = prompts.followed_by(self.pad([row[:-1] for row in continuations])) if longest > 1 else prompts
        if not self.takes_cache and not is_spliced(self.layout):
            return self.call(rows)[:, prompts.width - 1 :]
        cache = self.new_cache()
        parts = [self.call(prompts, last=True, cache=cache)]
        step = self.step_limit or max(1, longest)
        for start in range(prompts.width, rows.width, step):
            parts.append(self.call(rows.columns(start + step), start, cache=cache))
        return torch.cat(parts, 1)

    def generate(self, prompts: Sequence[str], max_new_tokens: int = 40, batch_size: int = 64) -> list[str]:
        """Greedy continuations as texts, without the prompt and without special tokens.

        A continuation that begins with a word begins with its space, so that prompt and continuation make one text.

        Raises:
            UserError: a prompt is empty or too long, or the prompts are one string.
        """
        return [self.continuation(ids) for ids in self.continue_ids(prompts, max_new_tokens, batch_size)]

    def continuation(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of tokens that continue a text: with the space before a first word, in every vocabulary.

        Decoders of SentencePiece vocabularies drop the space with which a text begins.
        """
        before = self._word
        start, whole = (
            self.tokenizer.decode(row, skip_special_tokens=skip_special_tokens) for row in (before, [*before, *ids])
        )
        return whole[len(start) :] if whole.startswith(start) else whole

    @cached_property
    def _word(self) -> list[int]:
        """The tokens of a short word, to decode other tokens after it."""
        return list(self.tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])

    def continue_ids(self, prompts: Sequence[str], max_new_tokens: int, batch_size: int = 64) -> list[list[int]]:
        """Greedy continuations as token ids, up to the first end token, without special tokens."""
        special, ends, rows = set(self.tokenizer.all_special_ids), end_tokens(self.hf, self.tokenizer), []
        for start in range(0, len(prompts), batch_size):
            tokens = self.tokenize(prompts[start : start + batch_size], side="left")
            new = self.generate_ids(tokens, max_new_tokens)
            whole = [takewhile(lambda token: token not in ends, row) for row in new.tolist()]
            rows += [[token for token in row if token not in special] for row in whole]
        return rows

    @torch.no_grad()
    def generate_ids(self, tokens: Tokens, max_new_tokens: int, min_new_tokens: int = 0) -> Int[Tensor, "batch new"]:
        """Greedy continuation of a left-padded batch, as token ids; finished rows are filled with padding.

        Each token has the largest logit, whatever penalties and bans the checkpoint's generation config sets. No row
        ends before `min_new_tokens`.
        """
        refuse_pictures(tokens, "generation")
        if not self.padding.allows(tokens.attention_mask, cached=True):
            new = tokens.input_ids.new_full((len(tokens), max_new_tokens), self.pad_id)
            for rows, _, part in by_length(tokens):
                ids = self.generate_ids(part, max_new_tokens, min_new_tokens)
                new[rows, torch.arange(ids.shape[1], device=new.device)] = ids
            return new
        generate: Any = self.hf.generate
        positions = {"position_ids": positions_of(tokens, self.padding.first)} if self.padding.first else {}
        try:
            out = generate(
                input_ids=tokens.input_ids,
                attention_mask=tokens.attention_mask,
                max_new_tokens=max_new_tokens,
                **greedy_options(self.hf, self.tokenizer) | {"min_new_tokens": min_new_tokens or None},
                **({"use_cache": False} if self.step_limit == 0 else {}),  # it would change the results
                pad_token_id=self.pad_id,
                **positions,
            )
        except AttributeError as error:  # such as an image model whose config lacks what its `generate` requires
            raise UserError(f"transformers does not generate with {self.name} ({reason_of(error)})") from error
        return out[:, tokens.input_ids.shape[1] :]

    def chat(self, request: str | Sequence[Mapping[str, str]], ready: bool = True) -> str:
        """A request, or messages (`role`, `content`), in the chat template; `ready` for the assistant's answer.

        Raises:
            UserError: the tokenizer has no chat template, or its template refuses the messages.
        """
        turns = [{"role": "user", "content": request}] if isinstance(request, str) else list(request)
        return written_chat(self.tokenizer, self.name, turns, ready)

    def turns(self, ids: Sequence[int]) -> list[Span]:
        """The turns of a chat prompt, as (role, first token, first token after it).

        Raises:
            UserError: there is no chat template, turns cannot be told apart in it, or the prompt is not written in it.
        """
        return token_spans(self._chat_frame, ids, self.tokenizer.decode)

    @cached_property
    def _chat_frame(self) -> ChatFrame:
        # Decoded again, since tokenizers may change spaces.
        return ChatFrame.of(lambda turns, ready: self.tokenizer.decode(self.encode(self.chat(turns, ready))))


def refuse_training(model: LanguageModel) -> None:
    """Raises UserError where a module of the model is in training mode, since dropout would make passes random."""
    if any(module.training for module in model.hf.modules()):
        raise UserError(f"{model.name} is in training mode, so its passes are random: call model.hf.eval() first")
