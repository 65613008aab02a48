"""Cache of activations on disk, for other runs over the same text with the same model."""

import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel

log = logging.getLogger(__name__)

_ABANDONED = 86_400  # age in seconds at which a partial file is taken to be from a killed run
_IRRELEVANT = (  # to activations
    "transformers_version",
    "dtype",
    "torch_dtype",
    "name_or_path",
)


@dataclass(eq=False)
class RoundCache:
    """A folder of safetensors files, one per round, written atomically and verified when read.

    Attributes:
        root: The folder, shared by all runs.
        key: Subfolder, named by a hash of everything that determines the activations.
        limit: Maximal size of `root` in bytes.
    """

    root: Path
    key: str
    limit: float
    _full: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to cache {str(self.root)!r} ({error}): give another folder") from error
        for path in self.root.glob("*/*.safetensors.*.partial"):
            if time.time() - _stat(path)[1] > _ABANDONED:
                path.unlink(missing_ok=True)

    @property
    def folder(self) -> Path:
        return self.root / self.key

    def read(self, name: str, sites: Collection[str]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The activations of a round at the sites, memory-mapped from the file, and its notes.

        None if no file has all of the sites. A damaged file is removed with a warning.
        """
        for path in sorted(self.folder.glob(f"{name}.*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    if not set(sites) <= set(file.keys()):
                        continue
                    described = json.loads(file.metadata()["round"])
                    tensors = {site: file.get_tensor(site) for site in sites}
                if all(_checksum(tensors[site]) == described["checksums"][site] for site in sites):
                    return tensors, described["notes"]
                reason = "checksums differ"
            except FileNotFoundError:
                continue  # another run has just removed it
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                reason = str(error).splitlines()[0]
            log.warning("cached activations %s are damaged (%s): they are computed again", path, reason)
            path.unlink(missing_ok=True)
        return None

    def write(self, name: str, tensors: Mapping[str, Tensor], notes: dict[str, Any]) -> None:
        """Store a round. If the limit is reached or the disk is full, this is logged once and is not an error."""
        if self._full:
            return
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        used = sum(_stat(path)[0] for path in self.root.glob("*/*.safetensors*"))
        if used + size > self.limit:
            self._stop(f"{used / 1e9:.2f} GB of {self.limit / 1e9:.2f} GB are used")
            return
        described = {"notes": notes, "checksums": {site: _checksum(tensor) for site, tensor in tensors.items()}}
        path = self.folder / f"{name}.{_hash(sorted(tensors))}.safetensors"
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            save_file(dict(tensors), partial, metadata={"round": json.dumps(described)})
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            self._stop(str(error).splitlines()[0])

    def _stop(self, reason: str) -> None:
        self._full = True
        log.warning("the cache %s is full or not writable (%s): further activations are not cached", self.root, reason)


def model_facts(model: LanguageModel) -> dict[str, Any]:
    """Everything about a model that determines its activations: weights, config, tokenizer, precision, device type."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in _IRRELEVANT and key[:1] != "_"}
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    tokenizer = backend.to_str() if backend is not None else sorted(model.tokenizer.get_vocab().items())
    return {
        "weights": model.fingerprint,
        "config": config,
        "tokenizer": _hash(tokenizer),
        "prepend_bos": model.prepend_bos,
        "dtype": str(model.dtype),
        "device": model.device.type,
    }


def cache_key(facts: Mapping[str, Any]) -> str:
    """Name of the subfolder for activations determined by these facts."""
    return _hash(facts)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data) if tensor.numel() else 0


def _stat(path: Path) -> tuple[int, float]:
    """Size in bytes and time of the last change; size 0 and the current time if the file no longer exists."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0, time.time()
    return status.st_size, status.st_mtime
