"""Computation that the first and the last block of a resumed pass can skip, found by probing blocks, not by family.

Only the next token's logits are needed, so in the last block a linear map whose output affects only its own position
(the output projection, the MLP, usually the queries too) runs only at the last position. And where a single position of
the site is edited, a linear map of the first block whose input depends only on its own position (queries, keys, values;
the MLP as well where it runs parallel to attention) runs only at that position; elsewhere it returns the kept run's
output.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saepatch.model.hooks import edit_sites
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.replaced import forwards_replaced, skip_blocks
from saepatch.model.sites import Site

Forward = Callable[..., Any]
MOST_MAPS = 24  # blocks with more linear maps (such as a mixture of experts) are not probed
_KNOWN: WeakKeyDictionary[nn.Module, "Maps"] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Maps:
    """Linear maps of one block: inputs of `own` and effects of `stays` are confined to one position.

    Maps in `wide` must return every position, though only the last one is used.
    """

    own: tuple[nn.Module, ...] = ()
    stays: tuple[nn.Module, ...] = ()
    wide: frozenset[nn.Module] = frozenset()


def quick_activations(blocks: Iterable[nn.Module]) -> dict[nn.Module, Forward]:
    """Fused kernels for activations implemented as separate operations (GPT-2's, ten times slower).

    Activations whose forward is replaced already, as by a modified backward pass, are left alone.
    """
    from transformers.activations import NewGELUActivation

    quick = partial(nn.functional.gelu, approximate="tanh")
    slow = (m for block in blocks for m in block.modules() if isinstance(m, NewGELUActivation))
    return {m: quick for m in slow if "forward" not in vars(m)}


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation function, elementwise."""
    known = (nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU)
    return isinstance(module, known) or type(module).__module__ == "transformers.activations"


def with_slope(value: Tensor, linear: Tensor) -> Tensor:
    """`value` going forward, with the derivative of `linear` going backward."""
    return value.detach() + (linear - linear.detach())


def linear_activations(blocks: Iterable[nn.Module]) -> dict[nn.Module, Forward]:
    """Activations with their slopes computed once, for many backward passes through one graph.

    Several derivatives (that of tanh) have no batched kernel in torch, which then runs once a vector.
    """
    found = (m for block in blocks for m in block.modules() if is_activation(m))
    return {m: partial(_linear, m.forward) for m in found}


def _linear(plain: Forward, x: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        out = plain(leaf)
        (slope,) = torch.autograd.grad(out.sum(), leaf)
    return with_slope(out, slope * x)


def at_last(module: nn.Module, wide: bool) -> Forward:
    """A forward that computes only the last position."""
    plain = module.forward

    def forward(x: Tensor) -> Tensor:
        if x.ndim != 3 or x.shape[1] == 1:
            return plain(x)
        out = plain(x[:, -1:].contiguous())  # of a slice, torch multiplies every row on its own
        return out.expand(-1, x.shape[1], -1) if wide else out

    return forward


def at_edited(module: nn.Module, kept: Float[Tensor, "edits columns out"], column: Int[Tensor, "edits"]) -> Forward:
    """A forward that computes only the edited position; `kept` holds the other outputs, and is written into."""
    plain = module.forward

    def forward(x: Tensor) -> Tensor:
        edits = torch.arange(len(x), device=x.device)
        kept[edits, column] = plain(x[edits, column])
        return kept

    return forward


def find_maps(model: LanguageModel, layer: int) -> Maps:
    """Probe one block with a few tokens; the result is cached."""
    block = model.layout.blocks[layer]
    if block not in _KNOWN:
        try:
            _KNOWN[block] = _probe(model, layer)
        except (RuntimeError, TypeError, ValueError, IndexError):
            _KNOWN[block] = Maps()  # a block that cannot be probed has no shortcuts; it still runs
    return _KNOWN[block]


def forget_maps(model: LanguageModel) -> bool:
    """Discard the cached probes of the model's blocks; returns whether there were any."""
    known = [_KNOWN.pop(block, None) for block in model.layout.blocks]
    return any(maps is not None for maps in known)


@torch.no_grad()
def kept_outputs(
    model: LanguageModel, layer: int, x: Float[Tensor, "batch pos d_model"], tokens: Tokens
) -> dict[nn.Module, Float[Tensor, "batch pos out"]]:
    """Outputs of a block's `own` maps for an input of the block."""
    maps, seen = find_maps(model, layer).own, {}

    def watched(module: nn.Module, plain: Forward) -> Forward:
        def forward(x: Tensor) -> Tensor:
            seen[module] = plain(x)
            return seen[module]

        return forward

    with forwards_replaced({module: watched(module, module.forward) for module in maps}):
        _block(model, layer, x, tokens)
    return seen


def _block(model: LanguageModel, layer: int, x: Tensor, tokens: Tokens) -> Tensor:
    """Output of one block for an input, run by the model itself."""
    after = Site(layer)
    with skip_blocks(model.layout, layer), edit_sites(model.layout, {Site(layer, "resid_pre"): lambda _: x}):
        return model.capture(tokens, [after])[after]


@torch.no_grad()
def _probe(model: LanguageModel, layer: int) -> Maps:
    from transformers.pytorch_utils import Conv1D

    block = model.layout.blocks[layer]
    linear = [m for m in block.modules() if isinstance(m, (nn.Linear, Conv1D))]
    if not 0 < len(linear) <= MOST_MAPS:
        return Maps()
    tokens = model.probe()
    x = torch.randn(1, 6, model.d_model, generator=torch.Generator().manual_seed(1)).to(model.device, model.dtype)
    other = x.clone()
    other[:, 0] = other[:, 0].roll(1, -1)
    seen: dict[nn.Module, list[Tensor]] = {module: [] for module in linear}

    def watched(module: nn.Module, plain: Forward) -> Forward:
        def forward(x: Tensor) -> Tensor:
            seen[module].append(x)
            return plain(x)

        return forward

    with forwards_replaced({module: watched(module, module.forward) for module in linear}):
        expected = _block(model, layer, x, tokens)
        _block(model, layer, other, tokens)
    called_once = [m for m in linear if len(seen[m]) == 2 and seen[m][0].shape[:2] == (1, 6)]
    own = [m for m in called_once if torch.equal(seen[m][0][:, 1:], seen[m][1][:, 1:])]
    stays: dict[nn.Module, Forward] = {}  # confirmed together, since one map's shape may make up for another's
    wide: set[nn.Module] = set()

    def runs(forwards: dict[nn.Module, Forward]) -> Tensor | None:
        with forwards_replaced(forwards):
            try:
                return _block(model, layer, x, tokens)
            except RuntimeError:  # shapes that no longer fit
                return None

    def nudged(plain: Forward, x: Tensor) -> Tensor:
        out = plain(x).clone()
        out[:, 0] += out.std() + 1
        return out

    for module in called_once:
        moved = runs({module: partial(nudged, module.forward)})
        if moved is None or not torch.equal(moved[:, 1:], expected[:, 1:]):
            continue
        for as_wide in (False, True):
            forwards = stays | {module: at_last(module, as_wide)}
            out = runs(forwards)
            if (
                out is not None
                and out.shape == expected.shape
                and torch.allclose(out[:, -1], expected[:, -1], 1e-3, 1e-4)
            ):
                stays = forwards
                wide |= {module} if as_wide else set()
                break
    return Maps(tuple(own), tuple(stays), frozenset(wide))
