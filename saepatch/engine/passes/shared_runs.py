"""Base runs that several sweeps of the same pairs share: both directions, one site's latents and other directions."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from saepatch.engine.passes.kept_run import KeptRun
from saepatch.engine.passes.known_ways import Signature
from saepatch.model.inputs.images import Images
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.sites import Site

MEMORY = 2**29  # bytes of runs that are kept


class _SharedRuns:
    """The latest runs of one model, as long as its signature stays the same."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._of: tuple[LanguageModel, Signature] | None = None
        self._runs: dict[Any, KeptRun] = {}  # the latest used is the last

    def get(
        self, model: LanguageModel, signature: Signature, tokens: Tokens, sites: Collection[Site], keep_cache: bool
    ) -> KeptRun:
        if self._of is None or self._of[0].hf is not model.hf or self._of[1] != signature:
            self._of, self._runs = (model, signature), {}
        batch = (*map(_content, vars(tokens).values()), torch.is_inference_mode_enabled())
        for key, run in self._runs.items():
            if key[0] == batch and key[1] >= set(sites) and (run.has_cache or not keep_cache):
                self._runs[key] = self._runs.pop(key)
                return run.again()
        run = KeptRun(model, tokens, sites, keep_cache=keep_cache)
        if run.can_repeat:
            self._runs[batch, frozenset(sites), keep_cache] = run
            while sum(each.size for each in self._runs.values()) > self._memory:
                del self._runs[next(iter(self._runs))]
        return run.again() if run.can_repeat else run


_CURRENT: ContextVar[_SharedRuns | None] = ContextVar("shared runs", default=None)


@contextmanager
def shared_runs(memory: int = MEMORY) -> Iterator[None]:
    """Sweeps inside the block run each batch of prompts once, and start from the same runs.

    Do not change what the model computes inside the block. Changes of weights, hooks, modules and config are noticed,
    but not those of a hook's own state.

    Args:
        memory: Bytes of activations, keys, values and logits that are kept; the least recently used go first.
    """
    token = _CURRENT.set(_CURRENT.get() or _SharedRuns(memory))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def base_run(
    model: LanguageModel,
    signature: Signature | None,
    tokens: Tokens,
    sites: Collection[Site],
    keep_cache: bool,
) -> KeptRun:
    """A run of a batch, shared with other sweeps inside `shared_runs`; `signature` is the model's (`KnownWays`)."""
    shared = _CURRENT.get()
    if shared is None or signature is None:
        return KeptRun(model, tokens, sites, keep_cache=keep_cache)
    return shared.get(model, signature, tokens, sites, keep_cache)


def forget_runs() -> None:
    """Free the memory of shared runs."""
    if (shared := _CURRENT.get()) is not None:
        shared._runs.clear()


def _content(value: Any) -> Any:
    """What tells one batch from another: shape, dtype and bytes of a tensor."""
    if isinstance(value, Images):
        return tuple(map(_content, vars(value).values()))
    if not isinstance(value, Tensor):
        return value
    plain = value.detach().cpu().contiguous()
    return tuple(plain.shape), plain.dtype, plain.view(torch.uint8).numpy().tobytes()
