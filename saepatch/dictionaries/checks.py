"""Checks of a dictionary: its weights, its decoder, and its fit to a model's site."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn

from saepatch.errors import UserError, reason_of
from saepatch.model.sites import Site

if TYPE_CHECKING:
    from saepatch.dictionaries.dictionary import Dictionary
    from saepatch.model.language_model import LanguageModel

log = logging.getLogger(__name__)

_ABSURD = 3  # times more or fewer active latents than trained for
_NO_FLOATS = (
    "dictionary {name!r} has weights in {key} stored as {dtype}, not as floating-point numbers: it may be quantised or "
    "damaged; save it as float32"
)
_WARNED: set[tuple[int, int]] = set()  # (dictionary, model) ids that were warned about


def check_weights(sae: nn.Module, name: str) -> None:
    """Raises UserError for weights that are not finite, a normalisation not folded in, temporal SAEs, or a wrong k."""
    cfg: Any = sae.cfg
    if cfg.normalize_activations in ("expected_average_only_in", "covariance_whitening"):
        raise UserError(
            f"dictionary {name!r} expects {cfg.normalize_activations} inputs that are not folded into its weights: "
            "fold them with sae_lens (fold_activation_norm_scaling_factor or fold_activation_whitening), then save it"
        )
    if cfg.architecture() == "temporal":
        raise UserError(
            f"{name!r} is a temporal SAE, which predicts each position from those before it and whose decoder gives "
            "only the rest: its latents cannot be edited position by position; load another dictionary"
        )
    k, d_sae = getattr(cfg, "k", None), cfg.d_sae
    if k is not None and not (isinstance(k, int | float) and 0 < k <= d_sae):
        raise UserError(f"dictionary {name!r} has k {k!r} and {d_sae} latents: correct k in its cfg.json")
    for key, value in sae.state_dict().items():
        if not value.is_floating_point():
            raise UserError(_NO_FLOATS.format(name=name, key=key, dtype=str(value.dtype).removeprefix("torch.")))
        if not bool(torch.isfinite(value).all()):
            raise UserError(
                f"dictionary {name!r} has NaN or infinite weights in {key}: the file is damaged, create it again"
            )


def check_stored(file: Path, name: str) -> None:
    """Raises UserError for weights that are stored as integers or booleans, which loading would turn into floats."""
    with safe_open(file, "pt") as stored:
        for key in stored.keys():  # noqa: SIM118 (not a dict)
            if not (dtype := stored.get_slice(key).get_dtype()).startswith(("F", "BF")):
                raise UserError(_NO_FLOATS.format(name=name, key=key, dtype=dtype))


def check_architecture(architecture: str, name: str) -> None:
    """Raises UserError for an architecture that the installed sae_lens cannot load."""
    from sae_lens.registry import SAE_CLASS_REGISTRY

    if architecture not in SAE_CLASS_REGISTRY:
        known = ", ".join(sorted(SAE_CLASS_REGISTRY))
        raise UserError(
            f"{name!r} is of architecture {architecture!r}, which the installed sae_lens does not load: "
            f"use one of {known}"
        )


@torch.no_grad()
def check_decoder(dictionary: "Dictionary") -> None:
    """Check that the SAE's own decoder agrees with `Δf · rows`, by which edits are written.

    Raises:
        UserError: it does not agree, or cannot be run.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, dictionary.d_in, generator=generator).to(dictionary.W_dec)
    try:
        latents = dictionary.encode(x)
        acts = latents.acts + torch.rand(latents.acts.shape, generator=generator).to(latents.acts) / dictionary.d_sae
        dictionary.sae.encode(x)  # type: ignore[operator]
        truth = dictionary.sae.decode(acts)  # type: ignore[operator]
        gap = (latents.reconstruction + latents.delta(acts) - truth).norm() / truth.norm().clamp(min=1e-6)
    except (RuntimeError, AttributeError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise UserError(
            f"dictionary {dictionary.name!r} ({dictionary.architecture}) cannot be edited: {reason_of(error)}"
        ) from error
    if gap > (1e-4 if dictionary.dtype == torch.float32 else 5e-2):
        raise UserError(
            f"dictionary {dictionary.name!r} ({dictionary.architecture}) has no linear decoder (gap {gap:.1e}): "
            "use an architecture such as topk, jumprelu, gated or standard"
        )


def warn_of_threshold(dictionary: "Dictionary", l0: float) -> None:
    """Warn of a JumpReLU whose thresholds cannot be those it was trained with, as its mean L0 on some text shows."""
    if dictionary.architecture != "jumprelu":
        return
    cfg: Any = dictionary.cfg
    k = cfg.metadata.get("training_k") or cfg.metadata.get("k")
    if isinstance(k, int) and k > 0 and not k / _ABSURD <= l0 <= _ABSURD * k:
        why = f"and it was trained for {k}"
    elif not bool(dictionary.sae.threshold.any()):  # type: ignore[operator]
        why = "and all of its thresholds are 0"
    else:
        return
    log.warning(
        "dictionary %s has %.1f active latents per position on this text, %s: its threshold may never have been "
        "estimated; save it again from its trainer",
        dictionary.name,
        l0,
        why,
    )


def check_fit(dictionary: "Dictionary", model: "LanguageModel", site: Site) -> None:
    """Raises UserError where the width, site or device of a dictionary differs from the model's site."""
    width, name, trained_at = model.width(site), dictionary.name, dictionary.site
    if dictionary.d_in != width:
        raise UserError(
            f"dictionary {name} reads width {dictionary.d_in}, but {site} of {model.name} has width {width}: "
            "load the dictionary that was trained on this model"
        )
    if not site.same_tensor(trained_at):
        raise UserError(
            f"dictionary {name} was trained at {trained_at} ({trained_at.hook_name}), not at {site}: "
            f"splice it at {trained_at}, or load the one for {site}"
        )
    _warn(dictionary, model)
    if dictionary.W_dec.device != model.device:
        raise UserError(
            f"dictionary {name} is on {dictionary.W_dec.device}, the model on {model.device}: load both on one device"
        )


def _warn(dictionary: "Dictionary", model: "LanguageModel") -> None:
    """Warn of mismatches that are allowed but can mislead, once per dictionary and model."""
    trained_on, pair = list(dictionary.trained_on), (id(dictionary), id(model))
    if pair in _WARNED:
        return
    _WARNED.add(pair)
    if trained_on and model.fingerprint not in trained_on:
        log.warning(
            "dictionary %s was trained on another model (%s) than %s (%s): check its splice quality here first",
            dictionary.name,
            ", ".join(trained_on),
            model.name,
            model.fingerprint,
        )
    if dictionary.cfg.metadata.get("prepend_bos") and model.encode("a")[:1] != [model.bos_id]:
        log.warning(
            "dictionary %s was trained on texts that begin with BOS, but %s's tokenizer adds none: "
            "load the model with prepend_bos=%s",
            dictionary.name,
            model.name,
            "True" if model.bos_id is not None else "TOKEN, the text of the token used in training",
        )
