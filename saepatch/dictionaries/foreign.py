"""Dictionaries in folders of other trainers: dictionary_learning (`config.json`) and sparsify (`sae.safetensors`).

They become sae_lens SAEs that compute the same. dictionary_learning saves pickled weights, which are not opened here:
the error says how its user converts them.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from saepatch.dictionaries.checks import check_stored
from saepatch.errors import UserError, reason_of
from saepatch.model.families import FAMILIES
from saepatch.model.sites import TRANSCODED, Site
from saepatch.records.documents import parse_json

log = logging.getLogger(__name__)

FILES = ("ae.pt", "ae.safetensors", "sae.safetensors")
LEARNED = {  # dictionary_learning's classes: the architecture here, and whether they subtract the decoder's bias
    "AutoEncoder": ("standard", True),
    "GatedAutoEncoder": ("gated", True),
    "AutoEncoderTopK": ("topk", True),
    "BatchTopKSAE": ("jumprelu", True),
    "MatryoshkaBatchTopKSAE": ("jumprelu", True),
    "JumpReluAutoEncoder": ("jumprelu", False),
}
RENAMED = {
    "encoder.bias": "b_enc", "bias": "b_dec", "decoder_bias": "b_dec", "decoder.bias": "b_dec", "gate_bias": "b_gate",
    "mag_bias": "b_mag",
}  # fmt: skip


def read_foreign(folder: Path, name: str) -> tuple[nn.Module, str | None] | None:
    """The SAE in a folder of another trainer and the site that it states, if any; None for other folders.

    Raises:
        UserError: weights that are pickled, missing or do not fit its config, or an architecture that is not supported.
    """
    if (folder / "ae.pt").is_file() or (folder / "ae.safetensors").is_file():
        return _dictionary_learning(folder, name)
    if (folder / "sae.safetensors").is_file():
        return _sparsify(folder, name)
    return None


def fetch_foreign(repository: str, path: str) -> Path | None:
    """A folder of another trainer in a repository of the hub, fetched; None where there is none."""
    from huggingface_hub import HfApi, hf_hub_download

    try:
        listed = {file.rfilename for file in HfApi().model_info(repository).siblings or ()}
        if not any(f"{path}/{file}" in listed for file in FILES):
            return None
        wanted = [f"{path}/{file}" for file in (*FILES, "config.json", "cfg.json")]
        fetched = [Path(hf_hub_download(repository, file)) for file in wanted if file in listed]
        return fetched[0].parent
    except Exception as error:  # of many kinds, as without a network: what is cached may still be loaded
        log.info("the files of %s could not be listed: %s", repository, reason_of(error))
        return None


def _dictionary_learning(folder: Path, name: str) -> tuple[nn.Module, str | None]:
    trainer = _read(folder / "config.json", name).get("trainer")
    if not isinstance(trainer, dict):
        raise UserError(f"the config.json of {name!r} has no trainer: give a folder as dictionary_learning saves it")
    kind = str(trainer.get("dict_class"))
    if kind not in LEARNED:
        raise UserError(f"{name!r} is a {kind} of dictionary_learning: supported are {', '.join(LEARNED)}")
    if not (folder / "ae.safetensors").is_file():
        file = str(folder / "ae")
        raise UserError(
            f'{name!r} has pickled weights (ae.pt), which are not opened here: convert them with python -c "import '
            f"torch, safetensors.torch as s; s.save_file({{k: v.contiguous() for k, v in torch.load('{file}.pt', "
            f"'cpu', weights_only=True).items()}}, '{file}.safetensors')\", and load {str(folder)!r}"
        )
    weights = _weights(folder / "ae.safetensors", name)
    k, threshold = (weights.pop(part, None) for part in ("k", "threshold"))
    architecture, centred = LEARNED[kind]
    if architecture == "jumprelu":
        if threshold is None:
            raise UserError(f"{name!r} is a {kind} without a threshold: save it from its trainer again")
        if float(threshold.min()) < 0:
            raise UserError(f"the threshold of {name!r} is {float(threshold.min()):g}: it was never estimated")
        weights["threshold"] = threshold.float().expand(weights["W_dec"].shape[0]).clone()
    # Its activations are named by layer and place, as in resid_post_layer_8.
    place = str(trainer.get("submodule_name") or "").partition("_layer")[0] or "resid_post"
    layer = trainer.get("layer")
    names = {"resid_post": "hook_resid_post", "attention_out": "hook_attn_out", "mlp_out": "hook_mlp_out"}
    stated = f"blocks.{layer}.{names[place]}" if type(layer) is int and place in names else None
    active = int(k) if k is not None else trainer.get("k")
    return _sae(architecture, weights, name, apply_b_dec_to_input=centred, k=active), stated


def _sparsify(folder: Path, name: str) -> tuple[nn.Module, str | None]:
    cfg = _read(folder / "cfg.json", name)
    if (activation := cfg.get("activation", "topk")) != "topk":
        raise UserError(f"{name!r} was trained by sparsify with activation {activation!r}: only topk is supported")
    weights = _weights(folder / "sae.safetensors", name)
    blocks = {family.blocks.rpartition(".")[2] for family in FAMILIES.values()}
    # sparsify names folders after the module: a transcoder reads its input, another dictionary its output
    match = re.fullmatch(r"(\w+)\.(\d{1,9})(\.mlp)?", folder.name)
    if cfg.get("transcode"):
        at = Site(int(match[2]), TRANSCODED).hook_name if match and match[3] else None
        return _transcoder(weights, name, cfg.get("k")), at
    stated = f"blocks.{match[2]}.hook_resid_post" if match and match[1] in blocks and not match[3] else None
    return _sae("topk", weights, name, apply_b_dec_to_input=True, k=cfg.get("k")), stated


def _transcoder(weights: Mapping[str, Tensor], name: str, k: Any) -> nn.Module:
    """A transcoder with the k largest latents, for which sae_lens has no architecture of its own."""
    from sae_lens.saes.topk_sae import TopK

    d_sae, d_out = weights["W_dec"].shape
    if type(k) is not int or not 0 < k <= d_sae:
        raise UserError(f"{name!r} has k {k!r} and {d_sae} latents: correct k in its cfg.json")
    kind = "skip_transcoder" if "W_skip" in weights else "transcoder"
    sae = _sae(kind, weights, name, apply_b_dec_to_input=False, d_in=len(weights["W_enc"]), d_out=d_out)
    sae.activation_fn = TopK(k)
    return sae


def _read(file: Path, name: str) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"{name!r} lacks {file.name}, which its trainer saves beside the weights")
    value = parse_json(file.read_text(encoding="utf-8"), str(file))
    if not isinstance(value, dict):
        raise UserError(f"{str(file)!r} is no JSON object")
    return value


def _weights(file: Path, name: str) -> dict[str, Tensor]:
    """The weights under sae_lens' names, each matrix as [rows, columns] there."""
    numbers = load_file(file)
    scalars = {part: numbers.pop(part) for part in ("k", "threshold") if part in numbers and numbers[part].ndim == 0}
    if any(not value.is_floating_point() for value in numbers.values()):
        check_stored(file, name)
    weights = {RENAMED.get(part, part): value.float() for part, value in numbers.items()}
    for part, ours in (("encoder.weight", "W_enc"), ("decoder.weight", "W_dec")):  # linear maps, [out, in]
        if part in weights:
            weights[ours] = weights.pop(part).T.contiguous()
    if not {"W_enc", "W_dec"} <= weights.keys():
        raise UserError(f"{str(file)!r} has no encoder or no decoder among {', '.join(sorted(numbers))}")
    return weights | scalars


def _sae(architecture: str, weights: Mapping[str, Tensor], name: str, **options: Any) -> nn.Module:
    from sae_lens.registry import get_sae_class

    sae_class, cfg_class = get_sae_class(architecture)
    d_sae, d_in = weights["W_dec"].shape
    if architecture != "topk":
        options.pop("k", None)
    cfg = cfg_class(**{"d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": "cpu"} | options)
    sae: nn.Module = sae_class(cfg)
    expected = {part: tuple(value.shape) for part, value in sae.state_dict().items()}
    shapes = {part: tuple(value.shape) for part, value in weights.items()}
    if expected != shapes:
        wrong = sorted(part for part in expected.keys() | shapes.keys() if expected.get(part) != shapes.get(part))
        raise UserError(
            f"the weights of {name!r} do not fit its architecture, {architecture}: {wrong[0]} has shape "
            f"{shapes.get(wrong[0])}, not {expected.get(wrong[0])}"
        )
    with torch.no_grad():
        sae.load_state_dict(dict(weights))
    return sae
