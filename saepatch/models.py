"""Load a causal language model and its tokenizer, and know where its sites are."""

import hashlib
import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saepatch import organism
from saepatch.errors import UserError
from saepatch.greedy import end_tokens, greedy_options
from saepatch.hooks import SpliceError, blocks_return_tuples, capture, edit_sites
from saepatch.sites import Layout, Site, layout_of

log = logging.getLogger(__name__)


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
            self._known_fingerprint.update(versions=versions, digits=fingerprint(_weights(self.hf)))
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


def fingerprint(weights: Mapping[str, Tensor | Callable[[], Tensor]]) -> str:
    """First 16 hexadecimal digits of the SHA-256 over names, shapes, dtypes and bytes, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name]
        tensor = weight if isinstance(weight, Tensor) else weight()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _weights(hf: nn.Module) -> dict[str, Tensor | Callable[[], Tensor]]:
    """All weights; of those that accelerate has offloaded, functions that read them back one by one."""
    found: dict[str, Tensor | Callable[[], Tensor]] = dict(hf.state_dict())
    for name, module in hf.named_modules():
        kept: Any = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        for own in dict(module.named_parameters(recurse=False)) if kept is not None else ():
            whole = f"{name}.{own}"
            if isinstance(tensor := found.get(whole), Tensor) and tensor.is_meta:
                found[whole] = partial(kept.__getitem__, own)
    return found


def load_model(
    name: str,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    prepend_bos: bool = False,
    trust_remote_code: bool = False,
    device_map: str | dict[str, Any] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | None = None,
) -> LanguageModel:
    """Load `organism`, `organism-base`, a local folder or a Hugging Face id, and check its sites by a real forward.

    `prepend_bos` puts a BOS in front of every text where the tokenizer does not (GPT-2's, say), as many dictionaries
    were trained. `device_map` ("auto", say) spreads a model that one device cannot hold over several and, within
    `max_memory`, over main memory and `offload_folder`, as transformers and accelerate do; `device` is not used then.

    Raises:
        UserError: there is no such model or device, weights are missing, damaged or NaN, or its blocks cannot be found.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = organism.path(name) if name in ("organism", "organism-base") else Path(name)
    if source.is_dir() and not (source / "config.json").is_file():
        raise UserError(f"folder {name!r} holds no config.json, so it is no Hugging Face model")
    if not source.is_dir() and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise UserError(f"no folder {name!r}, and that is no Hugging Face id: use 'organism', a folder, or OWNER/NAME")
    where = str(source) if source.is_dir() else name
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise UserError(f"unknown dtype {dtype!r}: use float32, bfloat16 or float16")
    device = usable_device(device)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    spread = {"device_map": device_map, "max_memory": max_memory, "offload_folder": offload_folder}
    spread = {key: value for key, value in spread.items() if value is not None} if device_map is not None else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        with _quiet_progress():
            both: Any = AutoModelForCausalLM.from_pretrained(
                where, dtype=resolved, use_safetensors=True, output_loading_info=True, **options, **spread
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"cannot load model {name!r} (use 'organism', 'organism-base', a folder with config.json and safetensors "
            f"weights, or a Hugging Face id): {reason}"
        ) from error
    hf, loaded = both
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(
            f"model {name!r} lacks {len(missing)} weights ({missing[0]}, …): the file is not whole, fetch it again"
        )
    return replace(wrap_model(hf if spread else hf.to(device), tokenizer, name), prepend_bos=prepend_bos)


def usable_device(device: str | torch.device) -> torch.device:
    """The device, once something could be put on it.

    Raises:
        UserError: torch does not know it, or this machine has none.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:60]
        raise UserError(
            f"device {str(device)!r} cannot be used here ({reason}): use cpu, or cuda or mps where there is one"
        ) from error


def wrap_model(hf: nn.Module, tokenizer: Any, name: str) -> LanguageModel:
    """Take a Hugging Face causal LM that is in memory already; it is put in eval mode, without gradients for weights.

    Raises:
        UserError: weights that are not finite, or blocks that cannot be found.
    """
    for parameter, value in hf.named_parameters():
        if not value.is_meta and not bool(torch.isfinite(value).all()):
            raise UserError(
                f"model {name!r} has NaN or infinite weights in {parameter}: the file is damaged, fetch it again"
            )
    hf.eval().requires_grad_(False)
    config: Any = hf.config
    layout = layout_of(hf, config.model_type, int(config.get_text_config().num_hidden_layers))
    return check_sites(LanguageModel(hf, tokenizer, name, layout))


def refuse_training(model: LanguageModel) -> None:
    """Raises UserError where a part of the model is in training mode: its passes would be random."""
    if any(module.training for module in model.hf.modules()):
        raise UserError(f"{model.name} is in training mode, so its passes are random: call model.hf.eval() first")


@torch.no_grad()
def check_sites(model: LanguageModel) -> LanguageModel:
    """Run a few tokens and see that every site emits [batch, pos, width] and that editing it changes the logits.

    `attn_out` and `mlp_out` must together account for what a block adds to the stream; a family where they do not
    (scaled residuals, say) loses these two streams, with a warning; one whose `z` is not the heads side by side
    loses that.

    Raises:
        UserError: a residual site does not behave as one.
    """
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = (torch.arange(6, device=model.device) * 7 + 11).unsqueeze(0) % vocabulary
    inputs = {"input_ids": ids, "use_cache": False}
    as_tuple = blocks_return_tuples(model.hf, model.layout, inputs)
    model = replace(model, layout=replace(model.layout, tuple_blocks=as_tuple))
    seen = capture(model.hf, model.layout, model.layout.sites, inputs, stop=False)
    if "z" in model.layout.streams:
        z = tuple(seen[Site(0, "z")].shape)
        if z[:-1] != (1, 6) or z[-1] % model.n_heads:
            log.warning("z of %r has shape %s, not %d heads side by side: not offered", model.name, z, model.n_heads)
            model = replace(model, layout=model.layout.without("z"))
    widths = {site.stream: value.shape[-1] for site, value in seen.items()}
    model = replace(model, layout=replace(model.layout, widths=widths))
    for site, value in seen.items():
        if site.stream != "z" and value.shape != (1, 6, model.d_model):
            raise UserError(
                f"site {site} emits {tuple(value.shape)}, not (1, 6, {model.d_model}): check sites.FAMILIES"
            )
    if {"attn_out", "mlp_out"} <= set(model.layout.streams) and not _streams_add_up(model, seen):
        log.warning("attn_out and mlp_out of %r do not add up to what a block writes: not offered", model.name)
        model = replace(model, layout=model.layout.without("attn_out").without("mlp_out"))
    model = _with_neurons(model, inputs)
    plain = model.hf(**inputs).logits
    for stream in model.layout.streams:
        site = Site(model.n_layers // 2, stream)
        noise = torch.randn(seen[site].shape, generator=torch.Generator().manual_seed(0)).to(seen[site])
        scale = seen[site].float().std().clamp(min=1e-3).to(noise.dtype)
        with edit_sites(model.layout, {site: lambda x, noise=noise, scale=scale: x + scale * noise}):  # type: ignore[misc]
            edited = model.hf(**inputs).logits
        if torch.equal(plain, edited):
            raise UserError(
                f"editing site {site} of {model.name!r} leaves the logits as they were: check sites.FAMILIES"
            )
    return model


def _with_neurons(model: LanguageModel, inputs: Mapping[str, Any]) -> LanguageModel:
    """The model with the width of its MLPs' units, or without that site where a block has no such units."""
    layout = model.layout
    if layout.neurons is None:
        return model
    sites = [Site(layer, "neurons") for layer in range(model.n_layers)]
    try:
        seen = capture(model.hf, layout, sites, inputs)
    except (AttributeError, SpliceError):  # no such module, or one that is passed by: a mixture of experts
        seen = {}
    shapes = {tuple(value.shape) for value in seen.values()}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 3 or shape[:2] != (1, 6):
        log.info("the MLPs of %r have no units of one width in sight: the site neurons is not offered", model.name)
        return replace(model, layout=replace(layout, neurons=None))
    return replace(model, layout=replace(layout, widths={**layout.widths, "neurons": shape[-1]}))


def _streams_add_up(model: LanguageModel, seen: dict[Site, Tensor]) -> bool:
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    for layer in range(model.n_layers):
        added = seen[Site(layer, "attn_out")].float() + seen[Site(layer, "mlp_out")].float()
        wrote = seen[Site(layer, "resid_post")].float() - seen[Site(layer, "resid_pre")].float()
        if (added - wrote).norm() > tolerance * (wrote.norm() + seen[Site(layer, "resid_pre")].float().norm()):
            return False
    return True


@contextmanager
def _quiet_progress() -> Iterator[None]:
    # Loading draws a bar of its own, one line for every model: too much for a command that loads several.
    from transformers.utils import logging as hf_logging

    was_on = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            hf_logging.enable_progress_bar()
