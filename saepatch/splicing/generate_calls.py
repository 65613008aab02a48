"""Calls of a model's `generate`, watched from inside a splice: passes alone do not tell where a prompt ends."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from saepatch.errors import UserError

Watcher = tuple[int, Callable[[Tensor | None, Mapping[str, Any]], None]]  # a thread, and the callback for its calls

_WATCHING = Lock()
_WATCHERS: WeakKeyDictionary[nn.Module, list[Watcher]] = WeakKeyDictionary()  # splices that follow `generate`, in order


@contextmanager
def around_generate(hf: nn.Module, started: Callable[[Tensor | None, Mapping[str, Any]], None]) -> Iterator[None]:
    """Tell `started` the prompt ids and options of this thread's calls of `hf.generate`, and `started(None, {})` after.

    A forward pass alone cannot tell a prompt from a generated token when no cache is used, so the call is watched.
    """
    if not hasattr(hf, "generate"):
        yield
        return
    watcher = (get_ident(), started)
    with _WATCHING:
        watchers = _WATCHERS.setdefault(hf, [])
        watchers.append(watcher)
        if len(watchers) == 1:
            _watch_generate(hf, watchers)
    try:
        yield
    finally:
        with _WATCHING:
            watchers.remove(watcher)
            if not watchers:
                hf.__dict__["generate"].restore()


def _watch_generate(hf: nn.Module, watchers: list[Watcher]) -> None:
    """Let `generate` tell those that watch it from the thread it is called on; `generate.restore` puts it back."""
    before = hf.__dict__.get("generate")
    plain: Callable[..., Any] = hf.generate  # type: ignore[assignment]

    def generate(*args: Any, **kwargs: Any) -> Any:
        told = [started for thread, started in watchers if thread == get_ident()]
        if not told:
            return plain(*args, **kwargs)
        ids = kwargs.get("input_ids", args[0] if args else kwargs.get("inputs"))
        if ids is None:
            raise UserError("generate() under a splice needs input_ids: embeddings alone do not tell the positions")
        try:
            for started in reversed(told):
                started(ids, kwargs)
            return plain(*args, **kwargs)
        finally:
            for started in told:
                started(None, {})

    def restore() -> None:
        if before is None:
            del hf.__dict__["generate"]
        else:
            hf.__dict__["generate"] = before

    generate.restore = restore  # type: ignore[attr-defined]
    hf.__dict__["generate"] = generate
