"""Load a causal language model and its tokenizer, and check its sites by a real forward pass."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saepatch import organism
from saepatch.errors import UserError
from saepatch.model.families import layout_of
from saepatch.model.hooks import SpliceError, blocks_return_tuples, capture, edit_sites
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site

log = logging.getLogger(__name__)


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
                f"site {site} emits {tuple(value.shape)}, not (1, 6, {model.d_model}): "
                "check saepatch.model.families.FAMILIES"
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
                f"editing site {site} of {model.name!r} leaves the logits as they were: "
                "check saepatch.model.families.FAMILIES"
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
