"""Training steps of dictionaries whose latents each decide for themselves: standard, gated, JumpReLU.

Losses are those of sae_lens' training classes, at decoder rows of norm 1: the squared error and a charge for activity.
Gradients are written by hand, in five large matrix products (gated: eight) instead of autograd's six (fifteen).

The batch goes through in chunks of rows, so that few arrays of shape [batch, d_sae] exist at a time. Where few latents
of the first chunk can have a value or a gradient, the step goes on with those alone, and the product with the encoder
is the only large one left. Whatever the path, the same formulas (`_Standard`, `_Gated`, `_JumpReLU`) act on the values.
"""

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import embedding_bag

from training.config import SAEConfig
from training.ranks import Ranks
from training.selection import ordered, product_dtype
from training.steps import Moment, Step, StepFunction, Weights

log = logging.getLogger(__name__)
aten = torch.ops.aten

_CHUNK = 2**24  # bytes of a [rows, d_sae] array on the CPU: larger ones are mapped anew each time, page by page
_CHUNK_ELSEWHERE = 2**29
_BLOCK = 2**21  # bytes that elementwise passes go over at a time: they stay in the CPU's cache
# Shares of latents up to which a step of gathered rows beats the dense products, as measured on CPUs.
_SPARSE_UP_TO = {torch.float32: 0.1, torch.bfloat16: 0.03}
_FLAT_BELOW = 1e-2  # activation under which the slope of f^p stays as it is there: it has no bound at 0


class _Tally(NamedTuple):
    """What a forward pass counts: active latents a row, latents that fired, the summed charge, the sum of f^p."""

    l0: Float[Tensor, "rows"]
    fired: Float[Tensor, "d_sae"]
    charge: Float[Tensor, ""]
    powers: Float[Tensor, ""]


class _Standard(NamedTuple):
    """ReLU, charged its L1; while p < 1, p-annealed (Karvonen et al. 2024, arXiv:2408.00113).

    There, Σ f^p stands for L1, its coefficient rescaled so that its value is L1's; here in each batch, the factor taken
    as a constant.
    """

    bias: Float[Tensor, "#values"]
    price: Float[Tensor, ""]
    p: Float[Tensor, ""] | None

    @property
    def paths(self) -> int:
        """Reconstructions from the codes."""
        return 1

    @property
    def whole(self) -> bool:
        """Whether the price depends on the whole batch."""
        return self.p is not None

    @property
    def low(self) -> Tensor:
        """Products with the encoder above this have a value or a gradient; others have neither."""
        return -self.bias

    def at(self, latents: Tensor) -> "_Standard":
        return self._replace(bias=self.bias[latents])

    def codes(self, h: Tensor) -> tuple[Tensor, ...]:
        """What the decoder reads, one array for each reconstruction, from products with the encoder."""
        return (torch.relu(h + self.bias),)

    def charge(self, codes: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The summed charge before its price, and the sum of f^p."""
        acts = codes[0]
        return acts.sum(), acts.sum() if self.p is None else torch.pow(acts, self.p).sum()

    def priced(self, tally: _Tally) -> "_Standard":
        """With the price of the batch, now that its activity is known."""
        if self.p is None:
            return self
        return self._replace(price=self.price * tally.charge / tally.powers.clamp(min=1e-30))

    def loss(self, tally: _Tally) -> Tensor:
        return self.price * tally.charge

    def row_prices(self, l0: Tensor) -> Tensor:
        """Cost of one more active latent in each row."""
        return torch.zeros_like(l0)

    def gradients(self, h: Tensor, grads: tuple[Tensor, ...], rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradient of h, and of each latent's own weights at every value, from those of the codes."""
        pre = h + self.bias
        slope = self.price
        if self.p is not None:
            slope = self.price * self.p * torch.pow(pre.clamp(min=_FLAT_BELOW), self.p - 1)
        gradient = aten.threshold_backward(grads[0] + slope, pre, 0)
        return gradient, {"b_enc": gradient}

    def hidden_sum(self, found: Weights) -> Tensor:
        """The gradient of h summed over the rows, from those of the latents' own weights."""
        return found["b_enc"]


class _Gated(NamedTuple):
    """A gate and a magnitude from one encoder (Rajamanoharan et al. 2024, arXiv:2404.16014); the gate pays its L1."""

    b_gate: Float[Tensor, "#values"]
    b_mag: Float[Tensor, "#values"]
    gain: Float[Tensor, "#values"]
    price: Float[Tensor, ""]

    @property
    def paths(self) -> int:
        return 2

    @property
    def whole(self) -> bool:
        return False

    @property
    def low(self) -> Tensor:
        return -self.b_gate

    def at(self, latents: Tensor) -> "_Gated":
        return self._replace(b_gate=self.b_gate[latents], b_mag=self.b_mag[latents], gain=self.gain[latents])

    def codes(self, h: Tensor) -> tuple[Tensor, ...]:
        gate = torch.relu(h + self.b_gate)
        return aten.threshold_backward(torch.relu(torch.addcmul(self.b_mag, h, self.gain)), gate, 0), gate

    def charge(self, codes: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        charge = codes[1].sum()
        return charge, charge

    def priced(self, tally: _Tally) -> "_Gated":
        return self

    def loss(self, tally: _Tally) -> Tensor:
        return self.price * tally.charge

    def row_prices(self, l0: Tensor) -> Tensor:
        return torch.zeros_like(l0)

    def gradients(self, h: Tensor, grads: tuple[Tensor, ...], rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        acts, gate = self.codes(h)
        magnitude = aten.threshold_backward(grads[0], acts, 0)
        opening = aten.threshold_backward(grads[1] + self.price, gate, 0)
        scaled = magnitude * self.gain
        return opening + scaled, {"b_gate": opening, "b_mag": magnitude, "r_mag": scaled * h}

    def hidden_sum(self, found: Weights) -> Tensor:
        return found["b_gate"] + found["b_mag"] * self.gain


class _JumpReLU(NamedTuple):
    """JumpReLU, with a straight-through estimator in a band about its threshold (Rajamanoharan et al. 2024,
    arXiv:2407.14435).

    The charge is the L0, its squared distance from a target (Gemma Scope 2), or tanh (Anthropic, January 2025).
    """

    bias: Float[Tensor, "#values"]
    threshold: Float[Tensor, "#values"]
    price: Float[Tensor, ""]
    bandwidth: float
    penalty: str
    target: int
    tanh_scale: float
    estimate_inputs: bool

    @property
    def paths(self) -> int:
        return 1

    @property
    def whole(self) -> bool:
        return False

    @property
    def low(self) -> Tensor:
        return self.threshold - self.bandwidth / 2 - self.bias

    def at(self, latents: Tensor) -> "_JumpReLU":
        return self._replace(bias=self.bias[latents], threshold=self.threshold[latents])

    def codes(self, h: Tensor) -> tuple[Tensor, ...]:
        pre = h + self.bias
        return (aten.threshold_backward(pre, pre - self.threshold, 0),)

    def charge(self, codes: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        acts = codes[0]
        charge = torch.tanh(self.tanh_scale * acts).sum() if self.penalty == "tanh" else acts.new_zeros(())
        return charge, charge

    def priced(self, tally: _Tally) -> "_JumpReLU":
        return self

    def loss(self, tally: _Tally) -> Tensor:
        if self.penalty == "tanh":
            return self.price * tally.charge
        if self.penalty == "quadratic":
            return self.price * 2 / self.target * (tally.l0 - self.target).square().sum()
        return self.price * tally.l0.sum()

    def row_prices(self, l0: Tensor) -> Tensor:
        if self.penalty == "tanh":
            return torch.zeros_like(l0)
        return self.price * (
            4 / self.target * (l0 - self.target) if self.penalty == "quadratic" else torch.ones_like(l0)
        )

    def gradients(self, h: Tensor, grads: tuple[Tensor, ...], rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        pre = h + self.bias
        over = pre - self.threshold
        gradient = grads[0]
        if self.penalty == "tanh":
            slope = 1 - torch.tanh(self.tanh_scale * aten.threshold_backward(pre, over, 0)).square()
            gradient = gradient + self.price * self.tanh_scale * slope
        # What a latent's crossing of its threshold changes: its value jumps by the threshold, and the L0 by 1.
        jump = torch.addcmul(rows, self.threshold, gradient).mul_(-1 / self.bandwidth)
        jump = aten.hardtanh_backward(jump, over, -self.bandwidth / 2, self.bandwidth / 2)
        encoder = aten.threshold_backward(gradient, over, 0)
        if self.estimate_inputs:
            encoder = encoder - jump
        return encoder, {"b_enc": encoder, "threshold": jump}

    def hidden_sum(self, found: Weights) -> Tensor:
        return found["b_enc"]


_Rule = _Standard | _Gated | _JumpReLU


def _forward(rule: _Rule, h: Tensor, codes_out: Tensor) -> _Tally:
    """Fill `codes_out` [paths, rows, d_sae] from h [rows, d_sae]."""
    codes = rule.codes(h.float())
    for out, code in zip(codes_out, codes):
        out.copy_(code)
    acts = codes[0]
    return _Tally(acts.sign().sum(1), acts.sum(0), *rule.charge(codes))


def _backward(rule: _Rule, h: Tensor, grads: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """Replace h by its gradient; the gradients of each latent's own weights."""
    gradient, values = rule.gradients(h.float(), tuple(grad.float() for grad in grads), rows.unsqueeze(1))
    h.copy_(gradient)
    return {name: value.sum(0) for name, value in values.items()}


class _Passes(NamedTuple):
    """The elementwise passes over a chunk."""

    forward: Callable[[_Rule, Tensor, Tensor], _Tally]
    backward: Callable[[_Rule, Tensor, Tensor, Tensor], dict[str, Tensor]]


def _blocks(h: Tensor) -> list[slice]:
    size = len(h) if h.device.type != "cpu" else max(1, _BLOCK // (4 * h.shape[1]))
    return [slice(start, start + size) for start in range(0, len(h), size)]


def _forward_by_blocks(rule: _Rule, h: Tensor, codes_out: Tensor) -> _Tally:
    tallies = [_forward(rule, h[block], codes_out[:, block]) for block in _blocks(h)]
    return _joined(tallies)


def _joined(tallies: list[_Tally]) -> _Tally:
    l0, fired, charge, powers = zip(*tallies)
    return _Tally(torch.cat(l0), torch.stack(fired).sum(0), torch.stack(charge).sum(), torch.stack(powers).sum())


def _backward_by_blocks(rule: _Rule, h: Tensor, grads: Tensor, rows: Tensor) -> dict[str, Tensor]:
    found = [_backward(rule, h[block], grads[:, block], rows[block]) for block in _blocks(h)]
    return {name: torch.stack([part[name] for part in found]).sum(0) for name in found[0]}


_EAGER = _Passes(_forward_by_blocks, _backward_by_blocks)


def standard(
    weights: Weights,
    x: Float[Tensor, "batch d_in"],
    config: SAEConfig,
    now: Moment,
    ranks: Ranks,
    passes: _Passes = _EAGER,
) -> Step:
    """A step of the standard SAE. Losses: mse, sparsity (L1, or while `now.p` is below 1 as `_Standard` has it)."""
    p = x.new_tensor(now.p, dtype=torch.float32) if now.p < 1 else None
    return _step(_Standard(weights["b_enc"], _price(now, x), p), weights, x, config, passes)


def gated(
    weights: Weights,
    x: Float[Tensor, "batch d_in"],
    config: SAEConfig,
    now: Moment,
    ranks: Ranks,
    passes: _Passes = _EAGER,
) -> Step:
    """A step of the gated SAE. Losses: mse, sparsity (L1 of the gates), auxiliary (squared error of decoding them).

    As in sae_lens, the auxiliary loss reaches the decoder, too.
    """
    rule = _Gated(weights["b_gate"], weights["b_mag"], weights["r_mag"].exp(), _price(now, x))
    return _step(rule, weights, x, config, passes)


def jumprelu(
    weights: Weights,
    x: Float[Tensor, "batch d_in"],
    config: SAEConfig,
    now: Moment,
    ranks: Ranks,
    passes: _Passes = _EAGER,
) -> Step:
    """A step of the JumpReLU SAE; thresholds are 0 or more. Losses: mse, sparsity (`config.penalty`)."""
    rule = _JumpReLU(
        weights["b_enc"],
        weights["threshold"],
        _price(now, x),
        config.bandwidth,
        config.penalty,
        config.k,
        config.tanh_scale,
        config.estimate_inputs,
    )
    return _step(rule, weights, x, config, passes)


def compiled(step: StepFunction) -> StepFunction:
    """The step with its elementwise passes compiled; the step itself where that gains nothing, or cannot be done."""
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
        log.warning("torch cannot compile here, so steps run as they are: %s", reason[0] if reason else type(error))
        return None
    return _Passes(torch.compile(_forward, dynamic=False), torch.compile(_backward, dynamic=False))


def _price(now: Moment, x: Tensor) -> Tensor:
    return x.new_tensor(now.sparsity / len(x), dtype=torch.float32)


class _Data(NamedTuple):
    """What all chunks share; matrices in the precision of the large products."""

    x: Float[Tensor, "batch d_in"]
    centred: Shaped[Tensor, "batch d_in"]
    W_enc: Shaped[Tensor, "d_sae d_in"]
    W_dec: Shaped[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, "d_in"]

    def encode(self, chunk: slice, out: Tensor) -> Tensor:
        centred = self.centred[chunk]
        return torch.mm(centred, self.W_enc.T, out=out[: len(centred)])


@torch.no_grad()
def _step(rule: _Rule, weights: Weights, x: Tensor, config: SAEConfig, passes: _Passes) -> Step:
    dtype = product_dtype(config, x.device)
    d_sae = len(weights["W_enc"])
    data = _Data(
        x,
        (x - weights["b_dec"]).to(dtype),
        weights["W_enc"].to(dtype),
        weights["W_dec"].to(dtype),
        weights["b_dec"],
    )
    limit = _CHUNK if x.device.type == "cpu" else _CHUNK_ELSEWHERE
    # The price of p-annealing is known once the whole batch is: it cannot go in chunks.
    size = len(x) if rule.whole else min(len(x), max(1, limit // (rule.paths * d_sae * dtype.itemsize)))
    chunks = [slice(start, min(start + size, len(x))) for start in range(0, len(x), size)]
    h = data.encode(chunks[0], x.new_empty(size, d_sae, dtype=dtype))
    if x.device.type == "cpu":
        above = h >= rule.low.to(dtype)
        if torch.count_nonzero(above) <= _SPARSE_UP_TO[dtype] * h.numel():
            return _sparse(rule, data, weights, chunks, h, above)
    return _dense(rule, data, weights, chunks, h, passes)


def _dense(rule: _Rule, data: _Data, weights: Weights, chunks: list[slice], h: Tensor, passes: _Passes) -> Step:
    """All products as dense ones. `h` is a buffer for products with the encoder, and holds those of the first chunk."""
    size, d_sae = h.shape
    buffers = [h.new_empty(rule.paths * size, d_sae) for _ in range(2)]
    squares, slopes = data.x.new_zeros(rule.paths), torch.zeros_like(data.b_dec)
    found: dict[str, Tensor] = {}
    tallies = []
    for chunk in chunks:
        hidden = h if chunk.start == 0 else data.encode(chunk, h)
        shape = (rule.paths, len(hidden), d_sae)
        codes, grads = (buffer[: shape[0] * shape[1]] for buffer in buffers)
        tally = passes.forward(rule, hidden, codes.view(shape))
        residual = (codes @ data.W_dec).float().view(rule.paths, len(hidden), -1).add_(data.b_dec).sub_(data.x[chunk])
        squares += residual.square().sum((1, 2))
        slope = residual.mul_(2 / len(data.x)).view(len(codes), -1)
        slopes += slope.sum(0)
        slope = slope.to(h.dtype)
        torch.mm(slope, data.W_dec.T, out=grads)
        parts = passes.backward(rule.priced(tally), hidden, grads.view(shape), rule.row_prices(tally.l0))
        _add_product(found, "W_dec", codes, slope)
        _add_product(found, "W_enc", hidden, data.centred[chunk])
        for name, part in parts.items():
            found[name] = found[name].add_(part) if name in found else part
        tallies.append(tally)
    return _found(rule, _joined(tallies), squares / len(data.x), slopes, found, weights)


def _add_product(found: Weights, name: str, left: Tensor, right: Tensor) -> None:
    """Add left.T @ right to what was found, in float32."""
    if name not in found:
        found[name] = (left.T @ right).float()
    elif left.dtype == torch.float32:
        found[name].addmm_(left.T, right)
    else:
        found[name] += left.T @ right


def _sparse(rule: _Rule, data: _Data, weights: Weights, chunks: list[slice], h: Tensor, above: Tensor) -> Step:
    """Values and gradients at those places alone that can have one; `h` as in `_dense`, `above` such places in it."""
    d_sae, batch = h.shape[1], len(data.x)
    places, values = [], []
    low = rule.low.to(h.dtype)
    for chunk in chunks:
        hidden = h if chunk.start == 0 else data.encode(chunk, h)
        if chunk.start:
            above = torch.ge(hidden, low, out=above[: len(hidden)])
        place = above.view(-1).nonzero().squeeze(1)
        values.append(hidden.view(-1)[place].float())
        places.append(place.add_(chunk.start * d_sae))
    place, value = torch.cat(places), torch.cat(values)
    rows = place // d_sae
    latents = place - rows * d_sae
    local = rule.at(latents)
    codes = local.codes(value)
    l0 = data.x.new_zeros(batch).index_add_(0, rows, codes[0].sign())
    tally = _Tally(l0, data.x.new_zeros(d_sae).index_add_(0, latents, codes[0]), *rule.charge(codes))

    by_row = torch.searchsorted(rows, torch.arange(batch, device=rows.device))
    W_dec, slopes, grads, squares = weights["W_dec"], [], [], []
    for code in codes:
        residual = embedding_bag(latents, W_dec, by_row, mode="sum", per_sample_weights=code).add_(data.b_dec)
        residual -= data.x
        squares.append(residual.square().sum() / batch)
        slopes.append(residual.mul_(2 / batch))
        # The gradient of the codes: dot products of slopes and decoder rows, at these places.
        grads.append(aten._embedding_bag_per_sample_weights_backward(slopes[-1], W_dec, latents, by_row, rows, 0))
    gradient, parts = local.priced(tally).gradients(value, tuple(grads), rule.row_prices(l0)[rows])
    found = {name: data.x.new_zeros(d_sae).index_add_(0, latents, part) for name, part in parts.items()}

    order, by_latent = ordered(latents, d_sae)
    gathered = partial(embedding_bag, rows[order], offsets=by_latent, mode="sum", include_last_offset=True)
    found["W_enc"] = gathered(data.x - data.b_dec, per_sample_weights=gradient[order])
    found["W_dec"] = gathered(slopes[0], per_sample_weights=codes[0][order])
    for slope, code in zip(slopes[1:], codes[1:]):
        found["W_dec"] += gathered(slope, per_sample_weights=code[order])
    return _found(rule, tally, torch.stack(squares), torch.stack(slopes).sum((0, 1)), found, weights)


def _found(rule: _Rule, tally: _Tally, squares: Tensor, slopes: Tensor, found: Weights, weights: Weights) -> Step:
    losses = {"mse": squares[0], "sparsity": rule.loss(tally)}
    if rule.paths == 2:
        losses["auxiliary"] = squares[1]
    # b_dec is added to the reconstructions, and taken from what the encoder reads.
    found["b_dec"] = slopes - rule.hidden_sum(found) @ weights["W_enc"]
    gradients = {name: found[name] for name in weights}
    return Step(losses, gradients, tally.fired > 0, tally.l0.mean())
