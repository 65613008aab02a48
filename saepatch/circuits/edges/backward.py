"""Modified backward passes for linear estimates: GIM and RelP. Forward passes keep their values.

Every modification counts where it acted, and raises an error if that is nowhere.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saepatch.engine.passes.shortcuts import is_activation, with_slope
from saepatch.engine.softmax import additive_mask, attention_scores, refuse_unusual, repeated_heads
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.replaced import attention_replaced, forwards_replaced
from saepatch.model.sites import Site

Counts = Counter[str]  # places where a modification acted in the passes of one context
Backward = Callable[[LanguageModel], AbstractContextManager[Counts]]
GIM_TEMPERATURE = 2.0
GIM_QUERY_KEY, GIM_VALUE = 0.25, 0.5


def _scaled(x: Tensor, factor: float) -> Tensor:
    return with_slope(x, factor * x)


@contextmanager
def gim(model: LanguageModel) -> Iterator[Counts]:
    """Gradient interaction modifications (Edin et al. 2025, https://arxiv.org/abs/2505.17630).

    The scale of every norm is a constant; the softmax of attention has the Jacobian of a softmax at temperature 2
    (that is diag(p) − ppᵀ with p = softmax(scores / 2), as in the authors' code); gradients of queries and keys are
    multiplied by 1/4 and those of values by 1/2.

    Raises:
        UserError: the model has no norm or no attention that can be modified.
    """
    counts: Counts = Counter(norm=0, attention=0)
    with ExitStack() as stack:
        stack.enter_context(frozen_norms(model, counts))
        stack.enter_context(attention_replaced(model.hf, partial(_gim_attention, counts)))
        yield counts
    _refuse_none("GIM", counts)


@contextmanager
def relp(model: LanguageModel) -> Iterator[Counts]:
    """Relevance patching (Jafari et al. 2025, https://arxiv.org/abs/2508.21258): gradients by the rules of LRP.

    The scale of every norm and the pattern of every attention head are constants; an activation function has the slope
    of the line through the origin; the product of a gated MLP passes half to each factor.

    Raises:
        UserError: the model has no norm, attention or activation function that can be modified.
    """
    counts: Counts = Counter(norm=0, attention=0, activation=0)
    gated = [layer for layer, block in enumerate(model.layout.blocks) if _is_gated(block)]
    if gated:
        counts["gate"] = 0
    with ExitStack() as stack:
        stack.enter_context(frozen_norms(model, counts))
        stack.enter_context(attention_replaced(model.hf, partial(frozen_attention, counts)))
        activations = [m for block in model.layout.blocks for m in block.modules() if is_activation(m)]
        stack.enter_context(forwards_replaced({m: partial(_through_origin, counts, m.forward) for m in activations}))
        if gated:
            stack.enter_context(_products_halved(model, gated, counts))
        yield counts
    _refuse_none("RelP", counts)


def _refuse_none(name: str, counts: Counts) -> None:
    if idle := [place for place, n in counts.items() if not n]:
        raise UserError(
            f"{name} acted on no {' and no '.join(idle)} of the model, so its estimates would be plain gradients: "
            "use Linear() or Linear(steps=10)"
        )


@contextmanager
def frozen_norms(model: LanguageModel, counts: Counts) -> Iterator[None]:
    """Let norms have a constant scale in backward passes: LayerNorm keeps only its centring, RMSNorm nothing.

    Norms are the modules named so whose output is `x · scale · weight (+ bias)`; anything else named so is refused.
    """
    norms = [m for m in model.hf.modules() if "norm" in type(m).__name__.lower() and not list(m.children())]
    with forwards_replaced({m: partial(_frozen_norm, counts, m, m.forward) for m in norms}):
        yield


def _frozen_norm(counts: Counts, module: nn.Module, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    out = plain(x)
    with torch.no_grad():
        linear = _norm_as_linear(module, x, out)
    centred = x - x.mean(-1, keepdim=True) if linear.centres else x
    counts["norm"] += 1
    bias = getattr(module, "bias", None)
    shifted = centred * linear.gain if bias is None else centred * linear.gain + bias  # so it has a gradient too
    return with_slope(out, shifted.to(out.dtype))


@dataclass(frozen=True, eq=False)
class _LinearNorm:
    """A norm at the scale of one input: `gain · x (+ bias)`, after centring where it does."""

    centres: bool
    gain: Tensor


def _norm_as_linear(module: nn.Module, x: Tensor, out: Tensor) -> _LinearNorm:
    eps = next((float(getattr(module, name)) for name in ("eps", "variance_epsilon") if hasattr(module, name)), 0.0)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    rest = out.float() if bias is None else out.float() - bias.float()
    tolerance = (1e-4 if x.dtype == torch.float32 else 5e-2) * float(rest.abs().max().clamp(min=1e-6))
    weights = [torch.ones_like(rest)] if weight is None else [weight.float(), 1 + weight.float()]
    for centres in (True, False):
        wide = x.float() - x.float().mean(-1, keepdim=True) if centres else x.float()
        scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        for gain in (scale * own for own in weights):
            if float((wide * gain - rest).abs().max()) <= tolerance:
                return _LinearNorm(centres, gain)
    raise UserError(f"{type(module).__name__} is not a norm with one scale a position: use Linear()")


def frozen_attention(
    counts: Counts,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention whose pattern is a constant in backward passes."""
    with torch.no_grad():
        scores = _scores(module, query, key, attention_mask, scaling, softcap, options)
        pattern = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    counts["attention"] += 1
    return (pattern @ repeated_heads(value, query.shape[1])).transpose(1, 2).contiguous(), None


def _gim_attention(
    counts: Counts,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    query, key, value = _scaled(query, GIM_QUERY_KEY), _scaled(key, GIM_QUERY_KEY), _scaled(value, GIM_VALUE)
    scores = _scores(module, query, key, attention_mask, scaling, softcap, options)
    pattern = scores.softmax(-1, dtype=torch.float32)
    warm = GIM_TEMPERATURE * (scores / GIM_TEMPERATURE).softmax(-1, dtype=torch.float32)  # undoes the chain rule's 1/T
    pattern = with_slope(pattern, warm).to(value.dtype)
    counts["attention"] += 1
    return (pattern @ repeated_heads(value, query.shape[1])).transpose(1, 2).contiguous(), None


def _scores(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    options: dict[str, Any],
) -> Tensor:
    refuse_unusual(module, options)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention_scores(query, key, additive_mask(module, query, key, mask), scaling, softcap)


def _through_origin(counts: Counts, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    out = plain(x)
    with torch.no_grad():
        near = x.abs() < 1e-6
        at = torch.where(near, torch.full_like(x, 1e-6), x)
        slope = torch.where(near, plain(at), out) / at
    counts["activation"] += 1
    return with_slope(out, slope * x)


def _is_gated(block: nn.Module) -> bool:
    return any("gate" in name.rpartition(".")[2] for name, _ in block.named_modules())


@contextmanager
def _products_halved(model: LanguageModel, gated: list[int], counts: Counts) -> Iterator[None]:
    """Halve the gradient at the product of gate and value, which is what the output projection reads."""

    def halve(x: Tensor) -> Tensor:
        counts["gate"] += 1
        return _scaled(x, 0.5)

    forwards: Mapping[nn.Module, Any] = {
        (m := model.layout.module(Site(layer, "neurons"))): partial(_after, halve, m.forward) for layer in gated
    }
    with forwards_replaced(forwards):
        yield


def _after(change: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return plain(change(x))
