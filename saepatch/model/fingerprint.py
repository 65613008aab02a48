"""Fingerprints of weights, which tie results to a model."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def fingerprint(weights: Mapping[str, Tensor | Callable[[], Tensor]], state: Iterable[str] = ()) -> str:
    """First 16 hexadecimal digits of the SHA-256 over names, shapes, dtypes and bytes of weights, sorted by name.

    `state` is what else decides the outputs (`adapter_state`).
    """
    digest = hashlib.sha256("".join(state).encode())
    for name in sorted(weights):
        weight = weights[name]
        tensor = weight if isinstance(weight, Tensor) else weight()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for part in stored_tensors(tensor):
            flat = part.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def stored_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that hold a weight: itself, or those inside a wrapper such as torchao's quantised weights."""
    wrapper: Any = tensor
    if not is_traceable_wrapper_subclass(wrapper):
        yield tensor
        return
    for name in wrapper.__tensor_flatten__()[0]:
        yield from stored_tensors(getattr(wrapper, name))


def stored_dtypes(hf: nn.Module) -> tuple[torch.dtype, tuple[torch.dtype, ...]]:
    """The narrowest floating-point dtype of at least 1 % of the weights, and the integer dtypes of quantised ones."""
    numbers: Counter[torch.dtype] = Counter()
    for parameter in hf.parameters():
        for tensor in stored_tensors(parameter):
            numbers[tensor.dtype] += tensor.numel()
    floats = [dtype for dtype, n in numbers.items() if dtype.is_floating_point and 100 * n >= numbers.total()]
    floats = floats or [dtype for dtype in numbers if dtype.is_floating_point]
    integers = sorted((dtype for dtype in numbers if not dtype.is_floating_point), key=str)
    return min(floats, key=lambda dtype: dtype.itemsize, default=torch.float32), tuple(integers)


def adapter_state(hf: nn.Module) -> tuple[str, ...]:
    """Which adapters (of PEFT) act in a model: their weights are there whether they are switched on or off."""
    return tuple(
        f"{name} {getattr(module, 'active_adapters', ())} {module.disable_adapters} {getattr(module, 'scaling', ())}"
        for name, module in hf.named_modules()
        if isinstance(getattr(module, "disable_adapters", None), bool)
    )


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
