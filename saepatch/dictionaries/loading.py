"""Load sparse autoencoders through sae_lens, and check their weights and sites."""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saepatch import organism
from saepatch.dictionaries.checks import (
    check_architecture,
    check_decoder,
    check_stored,
    check_weights,
)
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.foreign import FILES, fetch_foreign, read_foreign
from saepatch.dictionaries.transcoder import adopt_transcoder, is_transcoder, refuse_cross_layer, site_of_transcoder
from saepatch.errors import UserError, reason_of
from saepatch.model.families import FAMILIES
from saepatch.model.loading.load import usable_device
from saepatch.model.sites import Site
from saepatch.records.documents import parse_json

log = logging.getLogger(__name__)

Given = Dictionary | nn.Module  # a dictionary, or the sae_lens.SAE of one

OF_TRAINING = ("batchtopk", "matryoshka_batchtopk")  # architectures that sae_lens exports as another one


def load_sae(
    spec: str,
    site: str | Site | None = None,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    every_position: bool = False,
) -> Dictionary:
    """Load one SAE: `organism` or `organism-shared` (with a site), a folder, a folder of `SITE/` sub-folders, or
    `RELEASE/SAE_ID`.

    A folder is in sae_lens' format, or as dictionary_learning or sparsify saves it, with weights in safetensors; a
    repository of the hub, as OWNER/REPOSITORY/PATH, holds such folders, or files of a format that sae_lens lists for
    the repository. The site of a transcoder is its MLP's, as in `mlp.3`.

    The site is read from the SAE's metadata; where the metadata names none, it must be given.

    With `every_position` it counts as trained on all tokens, including special ones that its metadata exclude
    (`Dictionary.excluded_tokens`).

    Raises:
        UserError: nothing is found, the site differs from the metadata, weights are not finite, or the decoder cannot
            be edited (as a cross-layer transcoder's).
    """
    return replace(_load(spec, site, device, dtype), every_position=every_position)


def _load(spec: str, site: str | Site | None, device: str | torch.device, dtype: str) -> Dictionary:
    device = usable_device(device)
    wanted = None if site is None else Site.parse(site)
    root = _root(spec)
    if not root.is_dir():
        return _load_release(spec, wanted, device, dtype)
    if _holds_one(root):
        return _load_folder(root, str(spec), wanted, device, dtype)
    folders = _site_folders(root, spec)
    if wanted is None:
        raise UserError(f"{spec!r} has several dictionaries: name a site, one of {', '.join(map(str, folders))}")
    for stored, folder in folders.items():
        if stored.same_tensor(wanted):
            return _load_folder(folder, f"{spec}/{stored}", wanted, device, dtype)
    raise UserError(f"{spec!r} has no dictionary for {wanted}: it has {', '.join(map(str, folders))}")


def load_saes(
    spec: str, device: str | torch.device = "cpu", dtype: str = "float32", every_position: bool = False
) -> dict[Site, Dictionary]:
    """Load every SAE of `organism`, of `organism-shared` (trained on both checkpoints) or of a folder, ordered by
    layer, or the single SAE that RELEASE/SAE_ID names.

    Raises:
        UserError: as for `load_sae`.
    """
    root = _root(spec)
    if root.is_dir() and not _holds_one(root):
        return {site: load_sae(spec, site, device, dtype, every_position) for site in _site_folders(root, spec)}
    only = load_sae(spec, device=device, dtype=dtype, every_position=every_position)
    return {only.site: only}


def _holds_one(folder: Path) -> bool:
    """Whether a folder is that of one dictionary, not of a sub-folder per site."""
    return any((folder / file).is_file() for file in ("cfg.json", *FILES))


def _root(spec: str) -> Path:
    """The folder of a shipped dictionary's name, or the path itself."""
    return organism.path(organism.DICTIONARIES[spec]) if spec in organism.DICTIONARIES else Path(spec)


def _site_folders(root: Path, spec: str) -> dict[Site, Path]:
    folders = {}
    for cfg in sorted(root.glob("*/cfg.json")):
        try:
            folders[Site.parse(cfg.parent.name)] = cfg.parent
        except UserError:
            log.info("%s is not named after a site; left out", cfg.parent)
    if not folders:
        raise UserError(
            f"folder {spec!r} has no dictionary: expected cfg.json in it, or in sub-folders such as resid_post.3/"
        )
    return dict(sorted(folders.items()))


def _load_folder(folder: Path, name: str, wanted: Site | None, device: str | torch.device, dtype: str) -> Dictionary:
    from sae_lens import SAE

    if (foreign := read_foreign(folder, name)) is not None:
        sae, at = foreign
        return _finish(sae.to(device, getattr(torch, dtype)), at, wanted, name)
    for part in ("cfg.json", "sae_weights.safetensors"):
        if not (folder / part).is_file():
            raise UserError(f"{name!r} lacks {part}: expected a folder in sae_lens' format")
    try:
        cfg = parse_json((folder / "cfg.json").read_text(encoding="utf-8"), str(folder / "cfg.json"))
        architecture = str(cfg.get("architecture"))
        if architecture in OF_TRAINING:
            raise UserError(
                f"{name!r} is a checkpoint of sae_lens' trainer ({architecture}): load it there and save it with "
                "save_inference_model"
            )
        if "architecture" in cfg:  # sae_lens takes older files without one as standard
            check_architecture(architecture, name)
        check_stored(folder / "sae_weights.safetensors", name)
        sae = SAE.load_from_disk(folder, device=str(device), dtype=dtype)
    except UserError:
        raise
    except Exception as error:  # damaged files fail in many ways inside the loaders; all are bad input
        raise UserError(f"cannot read the dictionary in {name!r}: {reason_of(error)}") from error
    own: Any = sae.cfg.metadata
    return _finish(sae, own.get("hook_name") or cfg.get("hook_name"), wanted, name)


def _load_release(spec: str, wanted: Site | None, device: str | torch.device, dtype: str) -> Dictionary:
    release, _, sae_id = spec.partition("/")
    if not sae_id:
        raise UserError(
            f"unknown dictionary {spec!r}: use 'organism', 'organism-shared', a folder, or RELEASE/SAE_ID "
            "of sae_lens' releases"
        )
    from sae_lens import SAE
    from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    converter = None
    if release not in (directory := get_pretrained_saes_directory()):
        # A hub repository is OWNER/NAME, so the SAE's id starts after the second slash.
        owner_and_name, sae_id = "/".join(spec.split("/")[:2]), "/".join(spec.split("/")[2:])
        if not sae_id:
            raise UserError(
                f"{spec!r} is not a folder, and {release!r} is not a release known to sae_lens: "
                "give a folder, RELEASE/SAE_ID, or OWNER/REPOSITORY/SAE_ID"
            )
        release = owner_and_name
        if (folder := fetch_foreign(release, sae_id)) is not None:
            return _load_folder(folder, spec, wanted, device, dtype)
        # Files of a listed repository that the list leaves out, as of other widths, are read like those it names.
        formats = {each.conversion_func for each in directory.values() if each.repo_id == release}
        converter = NAMED_PRETRAINED_SAE_LOADERS.get(formats.pop() or "") if len(formats) == 1 else None
    refuse_cross_layer(release, sae_id)
    try:
        sae = SAE.from_pretrained(release, sae_id, device=str(device), dtype=dtype, converter=converter)
    except Exception as error:  # loaders pass on anything their hub client raises
        raise UserError(f"cannot load dictionary {sae_id!r} of {release!r}: {reason_of(error)}") from error
    return _finish(sae, sae.cfg.metadata.hook_name, wanted, spec)


def _finish(sae: nn.Module, stated: object, wanted: Site | None, name: str) -> Dictionary:
    cfg: Any = sae.cfg
    if is_transcoder(cfg.architecture()) and cfg.metadata.get("hook_name") is not None:
        refuse_cross_layer(*(cfg.metadata.get(part) for part in ("sae_lens_release", "sae_id")))
        try:
            stated = site_of_transcoder(cfg.metadata.to_dict())
        except UserError as error:
            if wanted is None:
                raise UserError(f"{name!r}: {error}, or at the MLP that you name, as in site='mlp.3'") from error
            stated = None
    if stated is None and wanted is None:
        raise UserError(
            f"the metadata of dictionary {name!r} names no site: give it, as in site='resid_post.3', "
            "or rename the folder after the site"
        )
    try:
        trained_at = None if stated is None else site_of_hook(stated)
    except UserError as error:
        if wanted is None:
            raise UserError(f"dictionary {name!r}: {error}; or give its site, as in site='resid_post.3'") from error
        trained_at = None
        log.info("the hook_name of dictionary %s, %r, is not a site: used at %s, as requested", name, stated, wanted)
    if wanted is not None and trained_at is not None and not trained_at.same_tensor(wanted):
        log.warning("dictionary %s states training at %s: used at %s, as requested", name, trained_at, wanted)
        trained_at = wanted
    site = trained_at or wanted
    assert site is not None
    return adopt(sae, site, name)


def site_of_hook(stated: object) -> Site:
    """The site that metadata name: a site, a hook name, or the module path of a block, as in `model.layers.3`.

    Raises:
        UserError: it names neither, or a module inside a block, which families use in different ways.
    """
    if isinstance(stated, Site):
        return stated
    if not isinstance(stated, str):
        raise UserError(f"its hook_name is {stated!r}, not a text")
    for blocks in {family.blocks for family in FAMILIES.values()}:
        if match := re.fullmatch(rf"{re.escape(blocks)}\.(\d{{1,9}})", stated):
            return Site(int(match[1]))  # the output of the block
    return Site.parse(stated)


def wrap_sae(sae: Any, site: str | Site | None = None, name: str = "") -> Dictionary:
    """Wrap a `sae_lens.SAE` that is in memory already; it is put in eval mode, without gradients for weights.

    Args:
        sae: The dictionary.
        site: Its site; default: that of its metadata's hook_name.
        name: Its name in results; default: that of its release, or of its class.

    Raises:
        UserError: it is not a dictionary, names no site, or cannot be edited.
    """
    if isinstance(sae, Dictionary):
        raise UserError(f"dictionary {sae.name} is wrapped already: use it as it is")
    if not isinstance(sae, nn.Module) or not all(hasattr(sae, part) for part in ("cfg", "W_dec", "encode")):
        raise UserError(f"a {type(sae).__name__} is not a dictionary: give a sae_lens.SAE, or load_sae(…)")
    cfg: Any = sae.cfg
    metadata: Any = getattr(cfg, "metadata", None) or {}
    stored = [metadata.get(part) for part in ("sae_lens_release", "sae_id", "sae_lens_id")]
    name = name or "/".join(str(part) for part in stored if part) or type(sae).__name__
    architecture = str(cfg.architecture())
    if architecture in OF_TRAINING:
        raise UserError(f"{name!r} is a dictionary in training ({architecture}): save it with save_inference_model")
    return _finish(sae, metadata.get("hook_name"), None if site is None else Site.parse(site), name)


def as_dictionaries(given: Given | Sequence[Given]) -> list[Dictionary]:
    """One dictionary or several as a list; a `sae_lens.SAE` among them is wrapped, at the site named in its metadata.

    Raises:
        UserError: as for `wrap_sae`.
    """
    several = list(given) if isinstance(given, Sequence) else [given]
    return [item if isinstance(item, Dictionary) else wrap_sae(item) for item in several]


def adopt(sae: nn.Module, site: Site, name: str) -> Dictionary:
    """Wrap a sae_lens SAE that is in memory already as the dictionary of a site.

    Raises:
        UserError: weights that are not finite, a normalisation that is not folded in, or a decoder that is not linear.
    """
    cfg: Any = sae.cfg
    check_weights(sae, name)
    if is_transcoder(cfg.architecture()):
        return adopt_transcoder(sae, site, name)
    if getattr(sae, "hook_z_reshaping_mode", False):
        sae.turn_off_forward_pass_hook_z_reshaping()  # type: ignore[operator]  # our z is already the concatenation of heads
    dictionary = Dictionary(sae.eval().requires_grad_(False), site, name)
    check_decoder(dictionary)
    return dictionary
