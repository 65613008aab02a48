"""The one file where hooks go on and come off. Everything here is a context manager or returns without a hook left."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import count
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saepatch.errors import UserError
from saepatch.model.families import Layout
from saepatch.model.sites import READ_AT_INPUT, Site

Edit = Callable[[Tensor], Tensor]
# How many `unedited` contexts a model is in, by its first block and the thread. A hook acts only on the thread that put
# it on, at the level it was put on at.
_LEVELS: WeakKeyDictionary[nn.Module, Counter[int]] = WeakKeyDictionary()
_EDITS: WeakKeyDictionary[nn.Module, Counter[int]] = WeakKeyDictionary()  # how many splices a model is in, likewise
CAPTURING = "transformers.utils.output_capturing"  # the module of the library's hooks that collect hidden states


class SpliceError(RuntimeError):
    """A hook that should have acted on a forward pass did not."""


class _StopForward(Exception):
    """Raised by the last hook that is needed, to spare the rest of the forward pass."""


def _first(output: Any) -> Tensor:
    # Some blocks return a tensor, others a tuple or list that starts with it: this is the one place that knows.
    return output[0] if isinstance(output, tuple | list) else output


def _with_first(output: Any, new: Tensor) -> Any:
    if hasattr(output, "_replace"):  # a named tuple
        return output._replace(**{output._fields[0]: new})
    return type(output)([new, *output[1:]]) if isinstance(output, tuple | list) else new


def _on_output(module: nn.Module, edit: Edit) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        old = _first(output)
        new = edit(old)
        return None if new is old else _with_first(output, new)

    handle = module.register_forward_hook(hook)
    # The library's own hooks, put on once when a model is first asked for hidden states, are to see what ours leave.
    hooks: Any = module._forward_hooks
    for key in [key for key, other in hooks.items() if getattr(other, "__module__", None) == CAPTURING]:
        hooks.move_to_end(key)
    return handle


def _on_input(module: nn.Module, edit: Edit) -> Any:
    def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _level(layout: Layout) -> tuple[int, int]:
    """The thread, and how many `unedited` contexts it is in."""
    thread = get_ident()
    return thread, _LEVELS.get(layout.blocks[0], Counter())[thread]


@contextmanager
def _counted(counts: WeakKeyDictionary[nn.Module, Counter[int]], layout: Layout) -> Iterator[None]:
    """One more on this thread while the context lasts."""
    of_model, thread = counts.setdefault(layout.blocks[0], Counter()), get_ident()
    of_model[thread] += 1
    try:
        yield
    finally:
        of_model[thread] -= 1
        if not of_model[thread]:
            del of_model[thread]


def unedited(layout: Layout) -> AbstractContextManager[None]:
    """Let the model run as if no hook of ours were on it; those put on inside the context do act."""
    return _counted(_LEVELS, layout)


def splice_noted(layout: Layout) -> AbstractContextManager[None]:
    """Remember, while the context lasts, that the model is spliced."""
    return _counted(_EDITS, layout)


def is_spliced(layout: Layout) -> bool:
    """Whether the model is inside a splice of this thread."""
    return _EDITS.get(layout.blocks[0], Counter())[get_ident()] > 0


@contextmanager
def edit_sites(layout: Layout, edits: Mapping[Site, Edit]) -> Iterator[None]:
    """Pass what each site emits through its function, on every forward pass inside the context.

    Raises:
        SpliceError: on leaving, when a site was never reached. Not raised over another exception.
    """
    fired: set[Site] = set()
    level = _level(layout)

    def counted(site: Site, edit: Edit) -> Edit:
        def run(x: Tensor) -> Tensor:
            if _level(layout) != level:
                return x
            fired.add(site)
            return edit(x)

        return run

    with ExitStack() as stack:
        for site, edit in edits.items():
            register = _on_input if site.stream in READ_AT_INPUT else _on_output
            handle = register(layout.module(site), counted(site, edit))
            stack.callback(handle.remove)
        yield
    if missed := [str(site) for site in edits if site not in fired]:
        raise SpliceError(
            f"nothing ran through {', '.join(missed)} inside the context, so nothing was edited: "
            "run the model inside the context, on its thread (and check that the model is the one that was spliced)"
        )


def embed_tokens(hf: nn.Module) -> nn.Module:
    """The module that looks up token embeddings.

    Raises:
        UserError: the model does not say which it is.
    """
    try:
        module: Any = hf.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError) as error:
        raise UserError(f"{type(hf).__name__} does not name its token embeddings (get_input_embeddings)") from error
    return module


@contextmanager
def edit_embeddings(hf: nn.Module, edit: Edit) -> Iterator[None]:
    """Pass token embeddings through a function, on every forward pass inside the context.

    Raises:
        SpliceError: on leaving, when no token was looked up. Not raised over another exception.
        UserError: the model does not say where its embeddings are.
    """
    fired, thread = False, get_ident()

    def run(x: Tensor) -> Tensor:
        nonlocal fired
        if get_ident() != thread:
            return x
        fired = True
        return edit(x)

    handle = _on_output(embed_tokens(hf), run)
    try:
        yield
    finally:
        handle.remove()
    if not fired:
        raise SpliceError("no token was embedded inside the context: run the model inside the context")


@torch.no_grad()
def blocks_return_tuples(hf: nn.Module, layout: Layout, inputs: Mapping[str, Any]) -> bool:
    """Whether the model's blocks return a tuple or list, seen in one forward pass."""
    seen: list[bool] = []

    def see(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(isinstance(output, tuple | list))

    handle = layout.blocks[0].register_forward_hook(see)
    try:
        hf(**inputs)
    finally:
        handle.remove()
    return seen[0]


@contextmanager
def before_forward(
    hf: nn.Module, layout: Layout, see: Callable[[tuple[Any, ...], dict[str, Any]], None]
) -> Iterator[None]:
    """Show every call's arguments to `see` before the model runs."""
    level = _level(layout)

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _level(layout) == level:
            see(args, kwargs)

    handle = hf.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _method_replaced(module: nn.Module, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Give one object a method of its own; what it had before, if anything, comes back."""
    before = module.__dict__.get(name)
    module.__dict__[name] = method
    try:
        yield
    finally:
        if before is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before


@contextmanager
def forwards_replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give some modules another forward."""
    with ExitStack() as stack:
        for module, forward in forwards.items():
            stack.enter_context(_method_replaced(module, "forward", forward))
        yield


def only_logits_of(hf: nn.Module, ids: Tensor) -> AbstractContextManager[None]:
    """Unembed to some vocabulary ids only, in their order; what the model does to logits after that still happens.

    Does nothing where the unembedding is not a plain linear map that is in memory, without hooks.
    """
    head: Any = hf.get_output_embeddings()  # type: ignore[operator]
    if type(head) is not nn.Linear or head.weight.is_meta or head._forward_hooks or head._forward_pre_hooks:
        return nullcontext()
    ids = ids.to(head.weight.device)
    parts = head.state_dict(keep_vars=True)
    weight, bias = parts["weight"][ids], parts["bias"][ids] if "bias" in parts else None
    return forwards_replaced({head: lambda x: nn.functional.linear(x, weight, bias)})


@torch.no_grad()
def capture(
    hf: nn.Module, layout: Layout, sites: Collection[Site], inputs: Mapping[str, Any], stop: bool = True
) -> dict[Site, Float[Tensor, "batch pos d_model"]]:
    """What the sites emit in one forward pass; with `stop`, the pass ends at the last site needed."""
    seen: dict[Site, Tensor] = {}

    def keep(site: Site) -> Edit:
        def run(x: Tensor) -> Tensor:
            seen[site] = x.detach()
            if stop and len(seen) == len(set(sites)):
                raise _StopForward
            return x

        return run

    with ExitStack() as stack:
        stack.enter_context(edit_sites(layout, {site: keep(site) for site in sites}))
        with suppress(_StopForward):
            hf(**inputs)
    return seen


@contextmanager
def skip_blocks(layout: Layout, n: int) -> Iterator[None]:
    """Let the first `n` blocks pass their input on unchanged; masks and rotary tables still come from the model."""

    def passing_through(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        return (x,) if layout.tuple_blocks else x

    with forwards_replaced(dict.fromkeys(layout.blocks[:n], passing_through)):
        yield


@contextmanager
def graph_through(layout: Layout, sites: Collection[Site]) -> Iterator[dict[Site, Tensor]]:
    """Hold what the sites emit on a forward pass, in one autograd graph that starts at the first of them.

    What runs before is not recorded: weights need no gradient, so the graph begins where a site is made a leaf.
    """
    held: dict[Site, Tensor] = {}

    def hold(site: Site) -> Edit:
        def run(x: Tensor) -> Tensor:
            held[site] = x if x.requires_grad else x.detach().requires_grad_()
            return held[site]

        return run

    with edit_sites(layout, {site: hold(site) for site in sites}):
        yield held


@dataclass
class Dropped:
    """Which block's contribution gradients leave out: None, none."""

    layer: int | None = None


class _Droppable(torch.autograd.Function):
    """Gives what a block gives; backwards, past the block instead of through it while the block is dropped."""

    @staticmethod
    def forward(ctx: Any, entered: Tensor, left: Tensor, layer: int, dropped: Dropped) -> Tensor:
        ctx.layer, ctx.dropped = layer, dropped
        return left.view_as(left)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (grads[0], None, None, None) if ctx.dropped.layer == ctx.layer else (None, grads[0], None, None)


@contextmanager
def droppable_blocks(layout: Layout, layers: Collection[int]) -> Iterator[Dropped]:
    """Let backward passes leave out one block at a time: `out = in + stopgrad(out − in)` where it is dropped.

    The value that is yielded names the block, and may be changed between backward passes over one forward pass made
    inside the context. Enter it before other hooks on the same blocks, so that they see what comes after the switch.
    """
    dropped = Dropped()

    def switch(layer: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            entered = args[0] if args else kwargs["hidden_states"]
            return _with_first(output, _Droppable.apply(entered, _first(output), layer, dropped))

        return hook

    with ExitStack() as stack:
        for layer in layers:
            handle = layout.blocks[layer].register_forward_hook(switch(layer), with_kwargs=True)
            stack.callback(handle.remove)
        yield dropped


_ATTENTIONS = count()  # names of the attention functions that were registered, none of them twice


@contextmanager
def attention_replaced(hf: nn.Module, attend: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """Let every attention layer that goes through transformers' attention interface call `attend` instead.

    It gets `(module, query, key, value, attention_mask, **options)` as transformers' own functions do, with the mask
    that these would add to the scores: [batch, 1, queries, keys]. Layers that do not use the interface are untouched.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = f"saepatch_{next(_ATTENTIONS)}"
    configs: dict[int, Any] = {}
    for module in hf.modules():
        _collect_configs(getattr(module, "config", None), configs)
    before = {key: config._attn_implementation for key, config in configs.items()}
    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, eager_mask)
    try:
        for config in configs.values():
            config._attn_implementation = name
        yield
    finally:
        for key, config in configs.items():  # a whole hands its setting on to its parts, which come after it
            config._attn_implementation = before[key]
        for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            del table._global_mapping[name]


def _collect_configs(config: Any, into: dict[int, Any]) -> None:
    """The configs that say how attention is computed, each whole before its parts."""
    if config is None or id(config) in into or not hasattr(config, "_attn_implementation"):
        return
    into[id(config)] = config
    for part in getattr(config, "sub_configs", ()):
        _collect_configs(getattr(config, part, None), into)
