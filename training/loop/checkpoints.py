"""Checkpoints: the complete state of a run, from which it continues exactly, written atomically.

A checkpoint is a folder `checkpoints/TOKENS/` with `SITE.safetensors` for each site and `state.json`. It is written
under a temporary name, flushed to disk and renamed; a partial one keeps the temporary name and is never read.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
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
PART = ".part-"

# Settings that may change when a run is resumed: they affect where it runs and what it logs, not what it learns.
_MAY_DIFFER = {
    *("out", "resume", "overwrite", "dry_run", "sweep", "point", "shard", "device", "revision", "prefetch"),
    *("cache", "cache_gb"),
    "initial",  # its dictionaries' fingerprints must be the same
    "save_every",
    "shard_latents",
    *("track", "upload", "log_every", "eval_every", "eval_tokens", "checkpoint_every", "keep_checkpoints"),
}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state of a run at one step.

    Attributes:
        tokens: Number of tokens trained on so far.
        tensors: Each site's tensors by name.
        state: Everything else, as JSON values.
    """

    tokens: int
    tensors: Mapping[Site, Mapping[str, Tensor]]
    state: Mapping[str, Any]


def save(out: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint under `out`, and remove all but the newest `keep`.

    Raises:
        UserError: it cannot be written; earlier checkpoints are unchanged.
    """
    folder = out / FOLDER
    place, part = folder / f"{checkpoint.tokens:015d}", folder / f"{PART}{os.getpid()}"
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
            f"cannot write a checkpoint to {str(folder)!r} ({reason}): free some space and continue with --resume true"
        ) from error
    # Checkpoints with more tokens must be damaged, or the run would have resumed from them.
    folders = _folders(out)
    later = [path for path in folders if int(path.name) > checkpoint.tokens]
    for old in later + folders[len(later) + keep :]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def newest(out: Path, device: str = "cpu") -> Checkpoint | None:
    """The newest intact checkpoint under `out`, or None; damaged ones are skipped with a warning."""
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
            log.warning("checkpoint %s is damaged (%s): trying an older one", folder, error)
    return None


def newest_state(out: Path) -> dict[str, Any] | None:
    """The state of the newest checkpoint that can be read, without its tensors."""
    for folder in _folders(out):
        with suppress(OSError, ValueError):
            return json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return None


def any_in(out: Path) -> bool:
    """Whether `out` holds a checkpoint, intact or not."""
    return bool(_folders(out))


def clear_parts(out: Path) -> None:
    """Remove what processes left that were killed while writing or removing checkpoints."""
    for part in [*out.glob(f"{PART}*"), *(out / FOLDER).glob(f"{PART}*")]:
        shutil.rmtree(part, ignore_errors=True)
    with suppress(OSError):  # not empty, or not there
        (out / FOLDER).rmdir()


def clear(out: Path) -> None:
    """Remove all checkpoints."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)


def _folders(out: Path) -> list[Path]:
    """Folders of the checkpoints, newest first."""
    return sorted((path for path in (out / FOLDER).glob("*") if path.name.isdigit()), reverse=True)


def identifying_settings(config: TrainingConfig) -> dict[str, Any]:
    """Settings that the result of a run depends on, by name; those of the dictionary as `sae.NAME`."""
    flat = {name: redacted_values(value) for name, value in config.to_dict().items() if name not in _MAY_DIFFER}
    return flat | {f"sae.{name}": value for name, value in flat.pop("sae").items()}
