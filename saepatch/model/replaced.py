"""Modules whose forward, or whose attention, is replaced for a while, on the thread that asks for it.

Every function is a context manager. Other threads run the model as it is, or are refused.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from threading import Lock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from saepatch.errors import UserError
from saepatch.model.families import Layout

_CHANGING = Lock()


class _OnThread:
    """A module's forward that acts on the thread that replaced it; on others, the module runs as before."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.forward, self.before, self.thread = forward, module.forward, get_ident()
        self.previous: Any = module.__dict__.get("forward")  # None: the forward of the module's class

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.forward if get_ident() == self.thread else self.before)(*args, **kwargs)

    def leave(self, module: nn.Module) -> None:
        """Take it out of the module, where another thread may have replaced the forward since."""
        self.forward = self.before  # others may have kept it
        above = module.__dict__.get("forward")
        if above is self:
            del module.__dict__["forward"]
            module.__dict__.update({} if self.previous is None else {"forward": self.previous})
            return
        while isinstance(above, _OnThread) and above.previous is not self:
            above = above.previous
        if isinstance(above, _OnThread):
            above.previous, above.before = self.previous, self.before


@contextmanager
def forwards_replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Override the `forward` of some modules on this thread; previous overrides, if any, are restored."""
    placed: list[tuple[nn.Module, _OnThread]] = []
    with _CHANGING:
        for module, forward in forwards.items():
            placed.append((module, _OnThread(module, forward)))
            module.__dict__["forward"] = placed[-1][1]
    try:
        yield
    finally:
        with _CHANGING:
            for module, own in placed:
                own.leave(module)


def only_logits_of(hf: nn.Module, ids: Tensor) -> AbstractContextManager[None]:
    """Compute logits of the given vocabulary ids only, in their order; later steps, such as a soft cap, still apply.

    Does nothing where the unembedding is not a plain linear layer in memory without hooks.
    """
    head: Any = hf.get_output_embeddings()  # type: ignore[operator]
    if type(head) is not nn.Linear or head.weight.is_meta or head._forward_hooks or head._forward_pre_hooks:
        return nullcontext()
    ids = ids.to(head.weight.device)
    parts = head.state_dict(keep_vars=True)
    weight, bias = parts["weight"][ids], parts["bias"][ids] if "bias" in parts else None
    return forwards_replaced({head: lambda x: nn.functional.linear(x, weight, bias)})


@contextmanager
def skip_blocks(layout: Layout, n: int) -> Iterator[None]:
    """Let the first `n` blocks return their input unchanged; the model still computes masks and rotary embeddings."""

    def passing_through(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        return (x,) if layout.tuple_blocks else x

    with forwards_replaced(dict.fromkeys(layout.blocks[:n], passing_through)):
        yield


_ATTENTIONS = count()  # makes the names of registered attention functions unique
_HOLDERS: WeakKeyDictionary[nn.Module, list[int]] = WeakKeyDictionary()  # threads that replaced a model's attention


@contextmanager
def attention_replaced(hf: nn.Module, attend: Callable[..., Any], mask: Any = None) -> Iterator[None]:
    """Let every attention layer that uses transformers' attention interface call `attend` instead.

    `attend` receives `(module, query, key, value, attention_mask, **options)` like transformers' own functions, with
    what `mask` makes, or the additive mask [batch, 1, queries, keys]. Layers without the interface are unchanged.

    Raises:
        UserError: another thread has replaced the model's attention; or, on another thread, when it runs the model.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    thread, name = get_ident(), f"saepatch_{next(_ATTENTIONS)}"
    with _CHANGING:
        holders = _HOLDERS.setdefault(hf, [])
        if set(holders) - {thread}:
            raise UserError(_ELSEWHERE)
        holders.append(thread)

    def on_this_thread(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if get_ident() != thread:
                raise UserError(_ELSEWHERE)
            return function(*args, **kwargs)

        return run

    configs: dict[int, Any] = {}
    for module in hf.modules():
        _collect_configs(getattr(module, "config", None), configs)
    before = {key: config._attn_implementation for key, config in configs.items()}
    ALL_ATTENTION_FUNCTIONS.register(name, on_this_thread(attend))
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, on_this_thread(mask or eager_mask))
    try:
        for config in configs.values():
            config._attn_implementation = name
        yield
    finally:
        for key, config in configs.items():  # setting a parent also sets its sub-configs, which come later
            config._attn_implementation = before[key]
        for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            del table._global_mapping[name]
        with _CHANGING:
            holders.remove(thread)


_ELSEWHERE = (
    "another thread works on this model's attention (as for attention patterns or attribution graphs): wait until it "
    "has ended, or load the model once for each thread"
)


def _collect_configs(config: Any, into: dict[int, Any]) -> None:
    """Collect the configs that select an attention implementation, parents before their sub-configs."""
    if config is None or id(config) in into or not hasattr(config, "_attn_implementation"):
        return
    into[id(config)] = config
    for part in getattr(config, "sub_configs", ()):
        _collect_configs(getattr(config, part, None), into)
