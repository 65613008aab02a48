"""Elementwise activation functions and their sparsity penalties, with gradients."""

from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import SAEConfig
from ..ranks import Ranks

aten = torch.ops.aten

_FLAT_BELOW = 1e-2  # activations below this have the slope of f^p at this value, since the slope is unbounded at 0

_Self = TypeVar("_Self", bound="Rule")


@dataclass(frozen=True, eq=False)
class Rule:
    """An activation function and its sparsity penalty, with the gradients of both.

    Pre-activations are [rows, d_sae], or [n] selected ones for a rule returned by `at`.

    Attributes:
        bias: Added to the product with the encoder; None: no bias.
        price: Coefficient of the penalty (`charge`).
    """

    bias: Float[Tensor, "d_sae"] | None
    price: Float[Tensor, ""]
    paths: ClassVar[int] = 1  # number of reconstructions

    @property
    def whole(self) -> bool:
        """Whether the coefficient depends on the whole batch."""
        return False

    @property
    def low(self) -> Tensor | float:
        """Pre-activations below this have neither a value nor a gradient."""
        return 0.0

    def at(self: _Self, latents: Tensor) -> _Self:
        return self

    def priced(self: _Self, codes: tuple[Tensor, ...], ranks: Ranks) -> _Self:
        """The rule with the coefficient computed from the batches of all processes, if it depends on them."""
        return self


@dataclass(frozen=True, eq=False)
class Standard(Rule):
    """ReLU with an L1 penalty; p-annealed while p < 1 (Karvonen et al. 2024, arXiv:2408.00113).

    With p-annealing, Σ f^p replaces L1, and its coefficient is rescaled in each batch so that the penalty's value is
    that of L1; the factor is treated as a constant.
    """

    p: Float[Tensor, ""] | None

    @property
    def whole(self) -> bool:
        return self.p is not None

    def codes(self, pre: Tensor) -> tuple[Tensor, ...]:
        """Inputs of the decoder, one array for each reconstruction."""
        return (torch.relu(pre),)

    def charge(self, codes: tuple[Tensor, ...], l0: Tensor) -> Tensor:
        """The penalty summed over the rows, before its coefficient."""
        return codes[0].sum()

    def priced(self, codes: tuple[Tensor, ...], ranks: Ranks) -> "Standard":
        if self.p is None:
            return self
        acts = codes[0].float()
        sums = torch.stack([acts.sum(), torch.pow(acts, self.p).sum().clamp(min=1e-30)])
        ranks.mean_([sums])
        return replace(self, price=self.price * sums[0] / sums[1])

    def gradients(self, pre: Tensor, grads: tuple[Tensor, ...], l0: Tensor) -> dict[str, Tensor]:
        """Gradients of `pre` (as `b_enc`) and of the latents' own weights at every value, given those of the codes."""
        slope = self.price
        if self.p is not None:
            slope = self.price * self.p * torch.pow(pre.clamp(min=_FLAT_BELOW), self.p - 1)
        return {"b_enc": aten.threshold_backward(grads[0] + slope, pre, 0)}


@dataclass(frozen=True, eq=False)
class Gated(Rule):
    """A gate and a magnitude from one encoder (Rajamanoharan et al. 2024, arXiv:2404.16014); L1 penalises the gate."""

    b_gate: Float[Tensor, "#values"]
    b_mag: Float[Tensor, "#values"]
    gain: Float[Tensor, "#values"]
    paths: ClassVar[int] = 2

    @property
    def low(self) -> Tensor:
        return -self.b_gate

    def at(self, latents: Tensor) -> "Gated":
        return replace(self, b_gate=self.b_gate[latents], b_mag=self.b_mag[latents], gain=self.gain[latents])

    def codes(self, pre: Tensor) -> tuple[Tensor, ...]:
        gate = torch.relu(pre + self.b_gate)
        return aten.threshold_backward(torch.relu(torch.addcmul(self.b_mag, pre, self.gain)), gate, 0), gate

    def charge(self, codes: tuple[Tensor, ...], l0: Tensor) -> Tensor:
        return codes[1].sum()

    def gradients(self, pre: Tensor, grads: tuple[Tensor, ...], l0: Tensor) -> dict[str, Tensor]:
        acts, gate = self.codes(pre)
        magnitude = aten.threshold_backward(grads[0], acts, 0)
        opening = aten.threshold_backward(grads[1] + self.price, gate, 0)
        scaled = magnitude * self.gain
        return {"b_enc": opening + scaled, "b_gate": opening, "b_mag": magnitude, "r_mag": scaled * pre}


@dataclass(frozen=True, eq=False)
class JumpReLU(Rule):
    """JumpReLU, with a straight-through estimator in a band about its threshold (Rajamanoharan et al. 2024,
    arXiv:2407.14435).

    The penalty is the L0, its squared distance from a target (Gemma Scope 2), or tanh (Anthropic, January 2025).
    """

    threshold: Float[Tensor, "#values"]
    config: SAEConfig

    @property
    def low(self) -> Tensor:
        return self.threshold - self.config.bandwidth / 2

    def at(self, latents: Tensor) -> "JumpReLU":
        return replace(self, threshold=self.threshold[latents])

    def codes(self, pre: Tensor) -> tuple[Tensor, ...]:
        return (aten.threshold_backward(pre, pre - self.threshold, 0),)

    def charge(self, codes: tuple[Tensor, ...], l0: Tensor) -> Tensor:
        if self.config.penalty == "tanh":
            return torch.tanh(self.config.tanh_scale * codes[0]).sum()
        if self.config.penalty == "quadratic":
            return (l0 - self.config.k).square().sum() * 2 / self.config.k
        return l0.sum()

    def gradients(self, pre: Tensor, grads: tuple[Tensor, ...], l0: Tensor) -> dict[str, Tensor]:
        gradient, over, width = grads[0], pre - self.threshold, self.config.bandwidth
        one_more = torch.zeros_like(l0)  # increase of the penalty by one more active latent in each row
        if self.config.penalty == "tanh":
            steepness = self.config.tanh_scale
            slope = 1 - torch.tanh(steepness * aten.threshold_backward(pre, over, 0)).square()
            gradient = gradient + self.price * steepness * slope
        elif self.config.penalty == "quadratic":
            one_more = self.price * 4 / self.config.k * (l0 - self.config.k)
        else:
            one_more = one_more + self.price
        # When a latent crosses its threshold, its value jumps by the threshold and the L0 by 1.
        jump = torch.addcmul(one_more / -width, self.threshold / -width, gradient)
        jump = aten.hardtanh_backward(jump, over, -width / 2, width / 2)
        encoder = aten.threshold_backward(gradient, over, 0)
        if self.config.estimate_inputs:
            encoder = encoder - jump
        return {"b_enc": encoder, "threshold": jump}


Rules = Standard | Gated | JumpReLU
