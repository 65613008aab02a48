"""Training steps of dictionaries with elementwise activation functions: standard, gated, JumpReLU.

Losses are those of sae_lens' training classes for decoder rows of norm 1: squared error and a sparsity penalty.
Gradients are written by hand, with five large matrix products (gated: eight) instead of autograd's six (fifteen).

The batch is processed in chunks of rows, so that few arrays of shape [batch, d_sae] exist at a time. If few latents
of the first chunk can have a value or a gradient, the step continues with these alone, and the product with the encoder
is the only large one. Both paths use the same formulas (`Standard`, `Gated`, `JumpReLU`).
"""

import logging
from collections.abc import Callable, Iterable
from functools import cache, partial
from itertools import chain
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..config import SAEConfig
from ..ranks import Ranks
from .rules import Gated, JumpReLU, Rules, Standard
from .selection import Encoder, ordered, product, product_dtype
from .step import Moment, Step, StepFunction, Weights

log = logging.getLogger(__name__)
aten = torch.ops.aten

_CHUNK = 2**24  # bytes of a float32 [rows, d_sae] array on the CPU; malloc would map and unmap larger ones every time
_CHUNK_ELSEWHERE = 2**29
_BLOCK = 2**21  # bytes processed at a time by elementwise passes, so that they stay in the CPU's cache
# Shares of active latents up to which gathered rows are faster than dense products, as measured on CPUs.
_SPARSE_UP_TO = {torch.float32: 0.05, torch.bfloat16: 0.02}

# A pass over a chunk of pre-activations, an array per reconstruction and the L0 of each row; returns sums over rows.
_Pass = Callable[[Rules, Tensor, tuple[Tensor, ...], Tensor], dict[str, Tensor]]


class _Passes(NamedTuple):
    """The elementwise passes over a chunk, in blocks or compiled."""

    forward: _Pass
    backward: _Pass


def _forward(rule: Rules, pre: Tensor, codes_out: tuple[Tensor, ...], l0: Tensor) -> dict[str, Tensor]:
    """Fill the codes and the L0; returns sums over the rows."""
    codes = rule.codes(pre)
    for out, code in zip(codes_out, codes):
        out.copy_(code)
    l0.copy_(codes[0].sign().sum(1))
    return {"l0": l0.sum(), "fired": codes[0].sum(0), "charge": rule.charge(codes, l0)}


def _backward(rule: Rules, pre: Tensor, grads: tuple[Tensor, ...], l0: Tensor) -> dict[str, Tensor]:
    """Overwrite the first codes' gradient with that of `pre`; returns the gradients of the latents' own weights."""
    parts = rule.gradients(pre, tuple(grad.float() for grad in grads), l0.unsqueeze(1))
    grads[0].copy_(parts["b_enc"])
    return {name: part.sum(0) for name, part in parts.items()}


def _in_blocks(act: _Pass, rule: Rules, pre: Tensor, arrays: tuple[Tensor, ...], l0: Tensor) -> dict[str, Tensor]:
    """Run the pass over blocks that fit into the CPU's cache."""
    size = len(pre) if pre.device.type != "cpu" else max(1, _BLOCK // (4 * pre.shape[1]))
    blocks = [slice(start, start + size) for start in range(0, len(pre), size)]
    parts = [act(rule, pre[block], tuple(array[block] for array in arrays), l0[block]) for block in blocks]
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}


_EAGER = _Passes(partial(_in_blocks, _forward), partial(_in_blocks, _backward))


def standard(
    weights: Weights,
    x: Float[Tensor, "batch d_in"],
    config: SAEConfig,
    now: Moment,
    ranks: Ranks,
    passes: _Passes = _EAGER,
) -> Step:
    """A step of the standard SAE. Losses: mse, sparsity (L1, or with `now.p` below 1 the p-annealed penalty)."""
    p = x.new_tensor(now.p, dtype=torch.float32) if now.p < 1 else None
    return _step(Standard(weights["b_enc"], _price(now, x), p), weights, x, config, ranks, passes)


def gated(
    weights: Weights,
    x: Float[Tensor, "batch d_in"],
    config: SAEConfig,
    now: Moment,
    ranks: Ranks,
    passes: _Passes = _EAGER,
) -> Step:
    """A step of the gated SAE. Losses: mse, sparsity (L1 of the gates), auxiliary (squared error of decoding them).

    As in sae_lens, the auxiliary loss also trains the decoder.
    """
    rule = Gated(None, _price(now, x), weights["b_gate"], weights["b_mag"], weights["r_mag"].exp())
    return _step(rule, weights, x, config, ranks, passes)


def jumprelu(
    weights: Weights,
    x: Float[Tensor, "batch d_in"],
    config: SAEConfig,
    now: Moment,
    ranks: Ranks,
    passes: _Passes = _EAGER,
) -> Step:
    """A step of the JumpReLU SAE; thresholds are 0 or more. Losses: mse, sparsity (`config.penalty`)."""
    rule = JumpReLU(weights["b_enc"], _price(now, x), weights["threshold"], config)
    return _step(rule, weights, x, config, ranks, passes)


def compiled(step: StepFunction) -> StepFunction:
    """The step with compiled elementwise passes; the step itself if compiling gains nothing or is not possible."""
    if step not in (standard, gated, jumprelu):
        return step
    passes = _compiled_passes()
    return partial(step, passes=passes) if passes else step


@cache
def _compiled_passes() -> _Passes | None:
    try:
        torch.compile(torch.sin, dynamic=False)(torch.zeros(8))
    except Exception as error:  # torch raises many kinds, from a missing compiler to an unsupported Python
        reason = str(error).strip().splitlines()
        log.warning("torch cannot compile here, so steps run uncompiled: %s", reason[0] if reason else type(error))
        return None
    return _Passes(torch.compile(_forward, dynamic=False), torch.compile(_backward, dynamic=False))


def _price(now: Moment, x: Tensor) -> Tensor:
    return x.new_tensor(now.sparsity / len(x), dtype=torch.float32)


@torch.no_grad()
def _step(rule: Rules, weights: Weights, x: Tensor, config: SAEConfig, ranks: Ranks, passes: _Passes) -> Step:
    dtype = product_dtype(config, x.device)
    on_cpu = x.device.type == "cpu"
    size = max(1, (_CHUNK if on_cpu else _CHUNK_ELSEWHERE) // (4 * len(weights["W_enc"])))
    encoder = Encoder(
        x - weights["b_dec"],
        weights["W_enc"].to(dtype),
        rule.bias if rule.bias is None else rule.bias.to(dtype),
        # The coefficient of p-annealing depends on the whole batch, which therefore cannot be split into chunks.
        len(x) if rule.whole else size,
    )
    chunks = encoder.chunks()
    first = next(chunks)
    chunks = chain([first], chunks)
    few = on_cpu and torch.count_nonzero(first[1] >= rule.low) <= _SPARSE_UP_TO[dtype] * first[1].numel()
    if few:
        sums = _sparse(rule, encoder, chunks, weights["W_dec"], ranks)
    else:
        sums = _dense(rule, encoder, chunks, weights["W_dec"].to(dtype), ranks, passes)
    losses = {"mse": sums["squares_0"] / len(x), "sparsity": rule.price * sums["charge"]}
    if isinstance(rule, Gated):
        losses["auxiliary"] = sums["squares_1"] / len(x)
    # b_dec is added to the reconstructions and subtracted from the encoder's input.
    sums["b_dec"] = sums["b_dec"] - sums["b_enc"] @ weights["W_enc"]
    return Step(losses, {name: sums[name] for name in weights}, sums["fired"] > 0, sums["l0"] / len(x))


def _dense(
    rule: Rules,
    encoder: Encoder,
    chunks: Iterable[tuple[int, Tensor]],
    W_dec: Shaped[Tensor, "d_sae d_in"],
    ranks: Ranks,
    passes: _Passes,
) -> dict[str, Tensor]:
    """With dense products; returns sums over the batch of the gradients and statistics, by name."""
    sums: dict[str, Tensor] = {}

    def add(**parts: Tensor) -> None:
        for name, part in parts.items():
            sums[name] = sums[name].add_(part) if name in sums else part.float()

    for start, pre in chunks:
        centred = encoder.x[start : start + len(pre)]
        codes = tuple(torch.empty_like(pre, dtype=W_dec.dtype) for _ in range(rule.paths))
        l0 = pre.new_empty(len(pre))
        add(**passes.forward(rule, pre, codes, l0))
        grads: list[Tensor] = []
        for code in codes:
            residual = product(code, W_dec.T).float().sub_(centred)
            add(**{f"squares_{len(grads)}": residual.square().sum()})
            slope = residual.mul_(2 / len(encoder.x))
            add(b_dec=slope.sum(0))
            slope = slope.to(W_dec.dtype)
            add(W_dec=product(slope.T, code.T))
            grads.append(product(slope, W_dec))
        add(**passes.backward(rule.priced(codes, ranks), pre, tuple(grads), l0))
        add(W_enc=product(centred.to(W_dec.dtype).T, grads[0].T))
    # oneDNN is fastest with weight gradients of shape [d_in, d_sae].
    return sums | {name: sums[name].T.contiguous() for name in ("W_enc", "W_dec")}


def _sparse(
    rule: Rules,
    encoder: Encoder,
    chunks: Iterable[tuple[int, Tensor]],
    W_dec: Float[Tensor, "d_sae d_in"],
    ranks: Ranks,
) -> dict[str, Tensor]:
    """Like `_dense`, but only with values that can differ from 0 or have a gradient."""
    batch, d_sae = len(encoder.x), len(W_dec)
    places, values = [], []
    for start, pre in chunks:
        place = (pre >= rule.low).view(-1).nonzero().squeeze(1)
        values.append(pre.view(-1)[place])
        places.append(place.add_(start * d_sae))
    place, value = torch.cat(places), torch.cat(values)
    rows = place // d_sae
    latents = place - rows * d_sae

    def by_latent(part: Tensor) -> Tensor:
        return part.new_zeros(d_sae).index_add_(0, latents, part)

    local = rule.at(latents)
    codes = local.codes(value)
    l0 = value.new_zeros(batch).index_add_(0, rows, codes[0].sign())
    sums = {"l0": l0.sum(), "fired": by_latent(codes[0]), "charge": rule.charge(codes, l0)}

    bags = torch.searchsorted(rows, torch.arange(batch, device=rows.device))
    slopes: list[Tensor] = []
    grads: list[Tensor] = []
    for code in codes:
        residual = embedding_bag(latents, W_dec, bags, mode="sum", per_sample_weights=code).sub_(encoder.x)
        sums[f"squares_{len(slopes)}"] = residual.square().sum()
        slopes.append(residual.mul_(2 / batch))
        # The gradient of the codes: dot products of slopes and decoder rows at these entries.
        grads.append(aten._embedding_bag_per_sample_weights_backward(slopes[-1], W_dec, latents, bags, rows, 0))
    parts = local.priced(codes, ranks).gradients(value, tuple(grads), l0[rows])

    order, ends = ordered(latents, d_sae)
    gathered = partial(embedding_bag, rows[order], offsets=ends, mode="sum", include_last_offset=True)
    sums["W_enc"] = gathered(encoder.x, per_sample_weights=parts["b_enc"][order])
    sums["W_dec"] = gathered(slopes[0], per_sample_weights=codes[0][order])
    for slope, code in zip(slopes[1:], codes[1:]):
        sums["W_dec"] += gathered(slope, per_sample_weights=code[order])
    sums["b_dec"] = torch.stack(slopes).sum((0, 1))
    return sums | {name: by_latent(part) for name, part in parts.items()}
