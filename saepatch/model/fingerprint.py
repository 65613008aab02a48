"""Fingerprints of weights, which tie results to a model."""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def fingerprint(weights: Mapping[str, Tensor | Callable[[], Tensor]]) -> str:
    """First 16 hexadecimal digits of the SHA-256 over names, shapes, dtypes and bytes of weights, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name]
        tensor = weight if isinstance(weight, Tensor) else weight()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def weights_of(hf: nn.Module) -> dict[str, Tensor | Callable[[], Tensor]]:
    """All weights; for weights that accelerate has offloaded, functions that load them one by one."""
    weights: dict[str, Tensor | Callable[[], Tensor]] = dict(hf.state_dict())
    for name, module in hf.named_modules():
        kept: Any = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        for own in dict(module.named_parameters(recurse=False)) if kept is not None else ():
            whole = f"{name}.{own}"
            if isinstance(tensor := weights.get(whole), Tensor) and tensor.is_meta:
                weights[whole] = partial(kept.__getitem__, own)
    return weights
