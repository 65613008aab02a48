"""Checkpoints: all that a run needs to go on exactly as it would have, written so that no half one is taken for whole.

A checkpoint is a folder `checkpoints/TOKENS/` with `SITE.safetensors` for each site and `state.json`. It is written
beside its place, flushed to the disk and moved there; what was cut short stays under a name that nobody reads.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saepatch.errors import UserError
from saepatch.model.sites import Site
from saepatch.records.files import to_disk
from saepatch.records.secrets import redacted_values

from ..config import TrainingConfig

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
_PART = ".part-"

# What may differ when a run is resumed: where it runs, what it logs and keeps, not what it learns.
_MAY_DIFFER = {
    *("out", "resume", "overwrite", "dry_run", "sweep", "shard", "device", "revision", "prefetch", "cache", "cache_gb"),
    *("track", "upload", "log_every", "eval_every", "eval_tokens", "checkpoint_every", "keep_checkpoints"),
}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One moment of a run.

    Attributes:
        tokens: Tokens trained on.
        tensors: Each site's tensors by name.
        state: Everything else; JSON holds it.
    """

    tokens: int
    tensors: Mapping[Site, Mapping[str, Tensor]]
    state: Mapping[str, Any]


def save(out: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint under `out`, and drop all but the newest `keep` whole ones.

    Raises:
        UserError: it cannot be written; those from before are untouched.
    """
    folder = out / FOLDER
    place, part = folder / f"{checkpoint.tokens:015d}", folder / f"{_PART}{os.getpid()}"
    try:
        part.mkdir(parents=True, exist_ok=True)
        sizes = {}
        for site, tensors in checkpoint.tensors.items():
            file = part / f"{site}.safetensors"
            save_file({name: value.detach().contiguous() for name, value in tensors.items()}, file)
            to_disk(file)
            sizes[str(site)] = file.stat().st_size
        text = json.dumps({"tokens": checkpoint.tokens, "sizes": sizes, **checkpoint.state}, indent=1)
        (part / "state.json").write_text(text, encoding="utf-8")
        to_disk(part / "state.json")
        to_disk(part)
        if place.exists():
            shutil.rmtree(place)
        part.replace(place)
        to_disk(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot write a checkpoint to {str(folder)!r} ({reason}): make room there and go on with --resume true"
        ) from error
    # Those of later in the run were damaged, or this one would not have been written.
    folders = _folders(out)
    later = [path for path in folders if int(path.name) > checkpoint.tokens]
    for old in later + folders[len(later) + keep :]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def newest(out: Path, device: str = "cpu") -> Checkpoint | None:
    """The newest checkpoint under `out` that is whole, or None; a damaged one is passed over with a warning."""
    for folder in _folders(out):
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            tensors = {}
            for site, size in state.pop("sizes").items():
                file = folder / f"{site}.safetensors"
                if file.stat().st_size != size:
                    raise ValueError(f"{file.name} has {file.stat().st_size} bytes, not {size}")
                tensors[Site.parse(site)] = load_file(file, device=device)
            return Checkpoint(int(state.pop("tokens")), tensors, state)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            log.warning("checkpoint %s is damaged (%s); an older one is tried", folder, error)
    return None


def any_in(out: Path) -> bool:
    """Whether `out` holds a checkpoint, whole or not."""
    return bool(_folders(out))


def clear_parts(out: Path) -> None:
    """Remove what a process that was killed while it wrote has left behind."""
    for part in (out / FOLDER).glob(f"{_PART}*"):
        shutil.rmtree(part, ignore_errors=True)


def clear(out: Path) -> None:
    """Remove all checkpoints."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)


def _folders(out: Path) -> list[Path]:
    """Folders of checkpoints, the newest first."""
    return sorted((path for path in (out / FOLDER).glob("*") if path.name.isdigit()), reverse=True)


def identifying_settings(config: TrainingConfig) -> dict[str, Any]:
    """Settings that a run's result depends on, by name; those of the dictionary as `sae.NAME`."""
    flat = {name: redacted_values(value) for name, value in config.to_dict().items() if name not in _MAY_DIFFER}
    return flat | {f"sae.{name}": value for name, value in flat.pop("sae").items()}
