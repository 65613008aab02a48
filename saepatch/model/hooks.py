"""The one file that registers hooks. Every function is a context manager, or removes its hooks before it returns."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saepatch.errors import UserError
from saepatch.model.families import Layout
from saepatch.model.sites import READ_AT_INPUT, TRANSCODED, Site

Edit = Callable[[Tensor], Tensor]
# Number of `unedited` contexts a model is in, by its first block and the thread. A hook acts only on the thread and at
# the level at which it was registered.
_LEVELS: WeakKeyDictionary[nn.Module, Counter[int]] = WeakKeyDictionary()
_EDITS: WeakKeyDictionary[nn.Module, Counter[int]] = WeakKeyDictionary()  # number of splices a model is in, likewise
CAPTURING = "transformers.utils.output_capturing"  # module of transformers' hooks that collect hidden states


class SpliceError(RuntimeError):
    """A hook that should have acted on a forward pass did not."""


class _StopForward(Exception):
    """Raised by the last hook that is needed, to skip the rest of the forward pass."""


def first_of(output: Any) -> Tensor:
    """What a module emits: some return a tensor, others a tuple or list that starts with it."""
    return output[0] if isinstance(output, tuple | list) else output


def _with_first(output: Any, new: Tensor) -> Any:
    if hasattr(output, "_replace"):  # a named tuple
        return output._replace(**{output._fields[0]: new})
    return type(output)([new, *output[1:]]) if isinstance(output, tuple | list) else new


def _on_output(module: nn.Module, edit: Edit) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        old = first_of(output)
        new = edit(old)
        return None if new is old else _with_first(output, new)

    handle = module.register_forward_hook(hook)
    # transformers' own hooks, registered when a model is first asked for hidden states, must run after ours.
    hooks: Any = module._forward_hooks
    for key in [key for key, other in hooks.items() if getattr(other, "__module__", None) == CAPTURING]:
        hooks.move_to_end(key)
    return handle


def _on_input(module: nn.Module, edit: Edit) -> Any:
    def hook(_module: nn.Module, args: Any, kwargs: Any = None) -> Any:
        if kwargs is None:  # removed by another thread after torch listed it, and before torch ran it
            return None
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


@contextmanager
def _around(reads: nn.Module, writes: nn.Module, edit: Edit) -> Iterator[None]:
    """Edit one module's output, with another's input beside it as one tensor: of the result, the output is kept."""
    received: dict[int, Tensor] = {}  # by thread

    def before(_module: nn.Module, args: Any, kwargs: Any = None) -> None:
        if kwargs is not None:  # None: removed by another thread after torch listed it, and before torch ran it
            received[get_ident()] = args[0] if args else next(iter(kwargs.values()))

    def after(y: Tensor) -> Tensor:
        if (x := received.pop(get_ident(), None)) is None:
            return y
        both = torch.cat([y, x[:, -y.shape[1] :].to(y)], -1)  # a resumed pass may compute only the last columns
        new = edit(both)
        # cloned: the model may add to it in place; written even unchanged where gradients are taken at it
        return y if new is both and not both.requires_grad else new[..., : y.shape[-1]].clone()

    with reads.register_forward_pre_hook(before, with_kwargs=True), _on_output(writes, after):
        yield


def _level(layout: Layout) -> tuple[int, int]:
    """The current thread, and the number of `unedited` contexts it is in."""
    thread = get_ident()
    return thread, _LEVELS.get(layout.blocks[0], Counter())[thread]


@contextmanager
def _counted(counts: WeakKeyDictionary[nn.Module, Counter[int]], layout: Layout) -> Iterator[None]:
    """Increment this thread's count for the duration of the context."""
    of_model, thread = counts.setdefault(layout.blocks[0], Counter()), get_ident()
    of_model[thread] += 1
    try:
        yield
    finally:
        of_model[thread] -= 1
        if not of_model[thread]:
            del of_model[thread]


def unedited(layout: Layout) -> AbstractContextManager[None]:
    """Let the model run as if without our hooks; hooks registered inside the context do act."""
    return _counted(_LEVELS, layout)


def splice_noted(layout: Layout) -> AbstractContextManager[None]:
    """Mark the model as spliced for the duration of the context."""
    return _counted(_EDITS, layout)


def is_spliced(layout: Layout) -> bool:
    """Whether this thread is inside a splice of the model."""
    return _EDITS.get(layout.blocks[0], Counter())[get_ident()] > 0


@contextmanager
def edit_sites(layout: Layout, edits: Mapping[Site, Edit], device: torch.device | None = None) -> Iterator[None]:
    """Replace what each site emits by its function's result, on every forward pass inside the context.

    Functions receive values on `device`, and results return to the block's own: a model may be spread over several.
    None: values stay where they are.

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
            here = x if device is None else x.to(device)
            new = edit(here)
            if new is here and site not in layout.overwritten:
                return x
            new = new.to(x.device)
            return new.clone() if site in layout.overwritten else new

        return run

    with ExitStack() as stack:
        for site, edit in edits.items():
            if site.stream == TRANSCODED:
                stack.enter_context(_around(*layout.around_mlp(site.layer), counted(site, edit)))
                continue
            register = _on_input if site.stream in READ_AT_INPUT else _on_output
            handle = register(layout.module(site), counted(site, edit))
            stack.callback(handle.remove)
        yield
    if missed := [str(site) for site in edits if site not in fired]:
        raise SpliceError(
            f"nothing ran through {', '.join(missed)} inside the context, so nothing was edited: "
            "run the model inside the context, on its thread (and check that it is the model that was spliced; where "
            "torch.compile'd code of it ran before, use torch.compiler.set_stance('force_eager'))"
        )


def embed_tokens(hf: nn.Module) -> nn.Module:
    """The module that looks up token embeddings.

    Raises:
        UserError: the model does not name it.
    """
    try:
        module: Any = hf.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError) as error:
        raise UserError(
            f"{type(hf).__name__} does not name its token embeddings: it needs a get_input_embeddings method"
        ) from error
    return module


@contextmanager
def edit_embeddings(hf: nn.Module, edit: Edit) -> Iterator[None]:
    """Replace token embeddings by a function's result, on every forward pass inside the context.

    Raises:
        SpliceError: on leaving, when no token was looked up. Not raised over another exception.
        UserError: the model does not name its embedding module.
    """
    fired, thread = False, get_ident()

    def run(x: Tensor) -> Tensor:
        nonlocal fired
        if get_ident() != thread:
            return x
        fired = True
        return edit(x)

    with _on_output(embed_tokens(hf), run):
        yield
    if not fired:
        raise SpliceError("no token was embedded inside the context: run the model inside the context")


@contextmanager
def watching(
    entering: Iterable[nn.Module],
    enter: Callable[[nn.Module, Any], None],
    leaving: Iterable[nn.Module],
    leave: Callable[[nn.Module, Any, Any], None],
) -> Iterator[None]:
    """Report this thread's calls of modules: `enter` gets the first input before one runs, `leave` input and output."""
    thread = get_ident()  # on others a hook may lack an argument: torch passes fewer to one that was just removed

    def first_argument(args: Any, kwargs: Any) -> Any:
        return args[0] if args else kwargs.get("hidden_states")

    def before(module: nn.Module, args: Any, kwargs: Any = None) -> None:
        if get_ident() == thread:
            enter(module, first_argument(args, kwargs))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        if get_ident() == thread:
            leave(module, first_argument(args, kwargs), output)

    with ExitStack() as stack:
        for module in entering:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        for module in leaving:
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        yield


@contextmanager
def before_forward(
    hf: nn.Module, layout: Layout, see: Callable[[tuple[Any, ...], dict[str, Any]], None]
) -> Iterator[None]:
    """Call `see` with the arguments of every forward pass before the model runs."""
    level = _level(layout)

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        # None: another thread removed the hook after torch listed it, and before torch ran it.
        if kwargs is not None and _level(layout) == level:
            see(args, kwargs)

    with hf.register_forward_pre_hook(hook, with_kwargs=True):
        yield


def contiguous_head(hf: nn.Module) -> AbstractContextManager[Any]:
    """Let the unembedding read contiguous values: of a slice, torch multiplies every row by frozen weights apart."""
    head: Any = getattr(hf, "get_output_embeddings", lambda: None)()
    return _on_input(head, Tensor.contiguous) if isinstance(head, nn.Linear) else nullcontext()


@torch.no_grad()
def capture(
    hf: nn.Module,
    layout: Layout,
    sites: Collection[Site],
    inputs: Mapping[str, Any],
    stop: bool = True,
    device: torch.device | None = None,
) -> dict[Site, Float[Tensor, "batch pos d_model"]]:
    """What the sites emit in one forward pass, on a device; with `stop`, the pass ends at the last site needed."""
    seen: dict[Site, Tensor] = {}

    def keep(site: Site) -> Edit:
        def run(x: Tensor) -> Tensor:
            seen[site] = x.detach()
            if stop and len(seen) == len(set(sites)):
                raise _StopForward
            return x

        return run

    with ExitStack() as stack:
        stack.enter_context(edit_sites(layout, {site: keep(site) for site in sites}, device))
        with suppress(_StopForward):
            hf(**inputs)
    return seen


@contextmanager
def graph_through(layout: Layout, sites: Collection[Site]) -> Iterator[dict[Site, Tensor]]:
    """Record what the sites emit on a forward pass, in one autograd graph that starts at the first of them.

    Earlier computation is not in the graph: weights need no gradient, so the graph begins where a site is made a leaf.
    """
    emitted: dict[Site, Tensor] = {}

    def record(site: Site) -> Edit:
        def run(x: Tensor) -> Tensor:
            emitted[site] = x if x.requires_grad else x.detach().requires_grad_()
            return emitted[site]

        return run

    with edit_sites(layout, {site: record(site) for site in sites}):
        yield emitted


@dataclass
class Dropped:
    """The block whose contribution backward passes leave out; None: no block."""

    layer: int | None = None


class _Droppable(torch.autograd.Function):
    """Identity on a block's output; backwards, gradients bypass the block while it is dropped."""

    @staticmethod
    def forward(ctx: Any, entered: Tensor, left: Tensor, layer: int, dropped: Dropped) -> Tensor:
        ctx.layer, ctx.dropped = layer, dropped
        return left.view_as(left)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (grads[0], None, None, None) if ctx.dropped.layer == ctx.layer else (None, grads[0], None, None)


@contextmanager
def droppable_blocks(layout: Layout, layers: Collection[int]) -> Iterator[Dropped]:
    """Let backward passes leave out one block at a time: `out = in + stopgrad(out − in)` for the dropped block.

    The yielded value selects the block, and may be changed between backward passes over one forward pass made inside
    the context. Enter it before registering other hooks on the same blocks, so that those see the switch's output.
    """
    dropped, thread = Dropped(), get_ident()

    def switch(layer: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> Any:
            if get_ident() != thread:
                return None
            entered = args[0] if args else kwargs["hidden_states"]
            return _with_first(output, _Droppable.apply(entered, first_of(output), layer, dropped))

        return hook

    with ExitStack() as stack:
        for layer in layers:
            handle = layout.blocks[layer].register_forward_hook(switch(layer), with_kwargs=True)
            stack.callback(handle.remove)
        yield dropped
