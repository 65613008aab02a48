"""Observing calls of a model's `generate` from inside a splice: forward passes do not reveal where a prompt ends."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from saepatch.errors import UserError

Watcher = tuple[int, Callable[[Tensor | None, Mapping[str, Any]], None]]  # thread id, callback for the thread's calls

_WATCHING = Lock()
_WATCHERS: WeakKeyDictionary[nn.Module, list[Watcher]] = WeakKeyDictionary()  # in order of registration


@contextmanager
def around_generate(hf: nn.Module, started: Callable[[Tensor | None, Mapping[str, Any]], None]) -> Iterator[None]:
    """Call `started(prompt ids, options)` before, and `started(None, {})` after, this thread's calls of `hf.generate`.

    Without a cache, a forward pass does not distinguish prompt tokens from generated ones.
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
    """Wrap `generate` to notify the watchers of the calling thread; `generate.restore` removes the wrapper."""
    before = hf.__dict__.get("generate")
    plain: Callable[..., Any] = hf.generate  # type: ignore[assignment]

    def generate(*args: Any, **kwargs: Any) -> Any:
        callbacks = [started for thread, started in watchers if thread == get_ident()]
        if not callbacks:
            return plain(*args, **kwargs)
        ids = kwargs.get("input_ids", args[0] if args else kwargs.get("inputs"))
        if ids is None:
            raise UserError("generate() under a splice needs input_ids, to locate positions: do not pass inputs_embeds")
        try:
            for started in reversed(callbacks):
                started(ids, kwargs)
            return plain(*args, **kwargs)
        finally:
            for started in callbacks:
                started(None, {})

    def restore() -> None:
        if before is None:
            del hf.__dict__["generate"]
        else:
            hf.__dict__["generate"] = before

    generate.restore = restore  # type: ignore[attr-defined]
    hf.__dict__["generate"] = generate
