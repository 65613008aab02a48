"""The checks that a run makes before it trains, without weights: the model is built on the meta device."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from saepatch.errors import UserError, reason_of
from saepatch.model.inputs.tokens import name_bos
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading.discovery import layout_of
from saepatch.model.loading.sources import class_for, load_tokenizer, source_of

from ..config import TrainingConfig
from ..data.texts import on_the_hub, split, texts
from ..steps.initial import initial_dictionaries
from . import checkpoints, saving
from .checks import check_also, check_model
from .evaluate import held_out_rows


def check_run(config: TrainingConfig, others: Sequence[TrainingConfig] = ()) -> tuple[LanguageModel, str]:
    """Make all the checks that a run makes before it trains.

    Args:
        config: The run.
        others: Further runs over the same text and model.

    Returns:
        The model without weights, and why its tokenizer could not be loaded; empty where it was.

    Raises:
        UserError: the run would be refused.
    """
    model, tokenizer_missing = skeleton(config.model, config.dtype, config.revision, config)
    also = [skeleton(name, config.dtype, config=config)[0] for name in config.also]
    for run in (config, *others):
        sites = run.sites_of(model.n_layers)
        check_model(model, sites, run)
        check_also(model, also, sites, run)
        initial_dictionaries(model, sites, run)
        saving.check_folder(run.out, sites, run)
        if run.resume and (before := _identity(run, sites)) is not None:
            saving.check_settings(before["config"], checkpoints.identifying_settings(run), run.out)
    if config.data and not on_the_hub(config.data):
        documents = texts(config.data, config.text_column, config.subset, config.split, config.streaming)
        _, held_out = split(documents, config.held_out, config.seed)
        if model.tokenizer is not None:
            held_out_rows(model, held_out, config.context, config.eval_tokens)
    return model, tokenizer_missing


def _identity(config: TrainingConfig, sites: Sequence[Any]) -> dict[str, Any] | None:
    """The identity of the run that `resume` would continue; None where there is none."""
    done = saving.finished(config.out, sites)
    return checkpoints.newest_state(config.out) if done is None else done.identity


def skeleton(
    name: str, dtype: str, revision: str = "", config: TrainingConfig | None = None
) -> tuple[LanguageModel, str]:
    """The model on the meta device, built from its config and tokenizer alone; it cannot run.

    Args:
        name: A folder, an id on the hub, or one of the embedded models.
        dtype: Of its weights.
        revision: On the hub.
        config: Settings of BOS and of code that comes with the model; None: their defaults.

    Returns:
        The model, and why its tokenizer could not be loaded (it is None then); empty where it was.

    Raises:
        UserError: the model does not exist, its config cannot be read, or its blocks cannot be found.
    """
    from transformers import AutoConfig

    config = config or TrainingConfig()
    resolved = getattr(torch, dtype, None)
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise UserError(f"unknown dtype {dtype!r}: use float32, bfloat16 or float16")
    source = source_of(name)
    if source.local and revision:
        raise UserError(f"revision {revision!r}: {name!r} is on this machine and has no revisions: leave it out")
    options = {"revision": revision or "main", "trust_remote_code": config.trust_remote_code, **source.files}
    try:
        described = AutoConfig.from_pretrained(source.path, **options)
        with torch.device("meta"):
            hf: nn.Module = class_for(described).from_config(
                described, dtype=resolved, trust_remote_code=config.trust_remote_code
            )
    except Exception as error:  # the hub's client and configs fail in many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"cannot read the config of model {name!r} (use 'organism', a folder with config.json, or an id on the hub "
            f"that can be reached): {reason}"
        ) from error
    tokenizer, missing = _tokenizer(source.path, options)
    if tokenizer is not None and isinstance(config.prepend_bos, str):
        name_bos(tokenizer, config.prepend_bos)
    text: Any = described.get_text_config()
    layout = layout_of(hf, described)
    width = int(text.hidden_size)
    widths = dict.fromkeys(layout.all_sites, width)
    for site in widths:
        if site.stream in ("z", "neurons"):  # the output projection has weight [width, z] or its transpose
            weight: Any = layout.module(site).weight
            widths[site] = weight.numel() // width
    bos = bool(config.prepend_bos) and tokenizer is not None
    return LanguageModel(hf, tokenizer, name, replace(layout, widths=widths), prepend_bos=bos), missing


def _tokenizer(source: str, options: dict[str, Any]) -> tuple[Any, str]:
    """The tokenizer; else None, and the reason."""
    try:
        return load_tokenizer(source, options), ""
    except Exception as error:  # of damaged files, and of the hub's client
        return None, reason_of(error).splitlines()[0]
