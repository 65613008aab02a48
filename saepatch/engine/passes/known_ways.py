"""Checks of how passes resume, remembered until something changes that affects what the model computes.

A way of resuming is compared with whole passes before it is used (`KeptRun.way`). The result holds for the next sweep
too, unless the model was changed in between: its weights, hooks, modules, config or attention, in place or not. The
signature of a model covers these, and is computed anew for every sweep, in less time than one forward pass takes.
"""

import sys
import weakref
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from saepatch.engine.passes import kept_run
from saepatch.engine.passes.kept_run import Checked, KeptRun
from saepatch.model.fingerprint import adapter_state, stored_tensors
from saepatch.model.language_model import LanguageModel

Signature = tuple[Any, ...]
PLAIN = (bool, int, float, str, type(None))  # attributes of modules that are compared
_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[Signature, dict[Any, Checked]]] = weakref.WeakKeyDictionary()


class KnownWays:
    """The checks that still hold for a model, shared by all sweeps; a model whose weights cannot be read has none."""

    def __init__(self, model: LanguageModel) -> None:
        self.signature = now = signature(model)
        self._by_shape: dict[Any, Checked] = {}
        if now is None:
            return
        known = _KNOWN.get(model.hf)
        if known is None or known[0] != now:
            known = _KNOWN[model.hf] = now, self._by_shape
        self._by_shape = known[1]

    def of(self, run: KeptRun) -> Checked:
        """The checks of runs with the same kind of batch: padded, with a cache, with pictures, or not."""
        pictures = run.tokens.images is not None
        return self._by_shape.setdefault((run.tokens.padded, run.has_cache, pictures), {})


def signature(model: LanguageModel) -> Signature | None:
    """Everything that affects what a model computes, to compare with `==`; None if some weights are not in memory."""
    weights = []
    for name, tensor in (*model.hf.named_parameters(), *model.hf.named_buffers()):
        for part in stored_tensors(tensor):
            if part.is_meta:
                return None
            weights.append((name, part.dtype, tuple(part.shape), part.device, checksum(part)))
    modules = [_of_module(module) for module in model.hf.modules()]
    kinds = {type(module) for module in model.hf.modules()}
    sources = {kind.__module__ for kind in kinds if not kind.__module__.startswith("torch.")}
    return (
        tuple(weights),
        tuple(modules),
        tuple(kind.forward for kind in sorted(kinds, key=lambda kind: (kind.__module__, kind.__qualname__))),
        tuple(function for source in sorted(sources) for function in _functions(source)),
        _of_config(model.hf.config),
        adapter_state(model.hf),
        (repr(model.layout.paths), model.padding, model.step_limit, model.last_alone, model.device),
        _surroundings(),
    )


def checksum(tensor: Tensor) -> tuple[int, int, int]:
    """The version of a tensor, and sums over all of its bytes: in words of eight, and in those left over.

    The version counts changes in place, except those through `.data` and by other processes, which the sums show.
    """
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    words = len(flat) // 8 * 8
    if flat.storage_offset() % 8:
        flat = flat.clone()
    version = -1 if tensor.is_inference() else tensor._version
    return version, int(flat[:words].view(torch.int64).sum()), int(flat[words:].sum())


def _of_module(module: nn.Module) -> Signature:
    own = vars(module)  # without parameters, buffers and submodules
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return (
        type(module),
        tuple(tuple(some) for some in hooks),  # ids of hooks, which are never reused
        tuple((name, value) for name, value in own.items() if isinstance(value, PLAIN)),
        tuple((name, *_identity(value)) for name, value in own.items() if callable(value)),
    )


def _identity(value: Any) -> Signature:
    """Equal only for the same object, without keeping it alive: a replaced `forward` often refers to its model."""
    parts = (value.__func__, value.__self__) if isinstance(value, MethodType) else (value,)
    try:
        return tuple((id(part), weakref.ref(part)) for part in parts)
    except TypeError:  # of a type without weak references
        return parts


def _functions(source: str) -> Iterator[Any]:
    """The functions of a module of code, such as a family's attention, which others may replace."""
    for value in vars(sys.modules[source]).values():
        if isinstance(value, FunctionType):
            yield value


def _of_config(config: Any) -> Signature:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    used = getattr(config.get_text_config(), "_attn_implementation", None)
    return repr(config.to_dict()), used, ALL_ATTENTION_FUNCTIONS.get(used) if used else None


def _surroundings() -> Signature:
    """Everything besides the model that affects torch's results, and the code that resumes."""
    return (
        tuple(torch_module._global_forward_hooks),
        tuple(torch_module._global_forward_pre_hooks),
        torch.nn.functional.scaled_dot_product_attention,
        torch.nn.functional.linear,
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(),
        kept_run.WAYS,
        tuple(_functions(kept_run.__name__)),
        LanguageModel.inputs,
    )
