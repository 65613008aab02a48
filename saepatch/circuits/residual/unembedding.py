"""From the residual stream after the last block to logits: a linear map once the final norm's scale is fixed."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.lens import final_norm
from saepatch.model.sites import Site

EXACT, ROUNDED = 1e-4, 5e-2  # tolerances relative to the largest logit, for float32 models and for narrower ones


@dataclass(frozen=True, eq=False)
class Unembedding:
    """Logits of the stream x: `z_t = scale · (W_U[t] · (γ ⊙ P x / σ + β) + b_U[t])`, then a soft cap if there is one.

    P subtracts the mean (LayerNorm) or does nothing (RMSNorm); σ is the final norm's scale at a position. Where a model
    has no final norm, `normed` is the identity and σ is 1. All arithmetic is in float64.
    """

    normed: Callable[[Float[Tensor, "some d_model"]], Float[Tensor, "some d_model"]]
    gain: Float[Tensor, "d_model"]
    shift: Float[Tensor, "d_model"]
    centred: bool
    weight: Float[Tensor, "vocab d_model"]
    bias: Float[Tensor, "vocab"] | None
    scale: float
    cap: float | None

    def linear(self, x: Float[Tensor, "*some d_model"]) -> Float[Tensor, "*some d_model"]:
        """γ ⊙ P x: the final norm's output times its scale, without its bias."""
        x = x.double()
        return (x - x.mean(-1, keepdim=True) if self.centred else x) * self.gain

    def sigma(self, x: Float[Tensor, "some d_model"]) -> Float[Tensor, "some"]:
        """The final norm's scale σ at each position."""
        numerator, denominator = self.linear(x), self.normed(x) - self.shift
        return numerator.square().sum(-1) / (numerator * denominator).sum(-1)

    def directions(
        self, sigma: Float[Tensor, "some"], targets: Int[Tensor, "some targets"]
    ) -> Float[Tensor, "some targets d_model"]:
        """What one unit along each dimension of the stream adds to each target's logit while σ is fixed."""
        rows = self.weight[targets].double() * self.gain * self.scale
        rows = rows - rows.mean(-1, keepdim=True) if self.centred else rows
        return rows / sigma[:, None, None]

    def constants(
        self, targets: Int[Tensor, "some targets"]
    ) -> tuple[Float[Tensor, "some targets"], Float[Tensor, "some targets"]]:
        """What the final norm's bias β and the unembedding's bias b_U add to each target's logit."""
        beta = self.scale * (self.weight[targets].double() @ self.shift)
        return beta, torch.zeros_like(beta) if self.bias is None else self.scale * self.bias[targets].double()

    def logits(
        self, x: Float[Tensor, "some d_model"], targets: Int[Tensor, "some targets"]
    ) -> Float[Tensor, "some targets"]:
        """Logits of some targets before a soft cap."""
        z = torch.einsum("nd,ntd->nt", self.normed(x), self.weight[targets].double())
        return self.scale * (z if self.bias is None else z + self.bias[targets].double())

    def capped(self, logits: Float[Tensor, "*some"]) -> Float[Tensor, "*some"]:
        """Logits after the soft cap; unchanged where there is none."""
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def slope(self, logits: Float[Tensor, "*some"]) -> Float[Tensor, "*some"]:
        """d cap(z) / dz at uncapped logits; 1 where there is no soft cap."""
        return torch.ones_like(logits) if self.cap is None else 1 - torch.tanh(logits / self.cap) ** 2


@torch.no_grad()
def read_unembedding(model: LanguageModel) -> Unembedding:
    """Read a model's final norm, unembedding, multiplier and soft cap, and check them against its own logits.

    Raises:
        UserError: the model's logits are not what these give.
    """
    head: Any = model.hf.get_output_embeddings()  # type: ignore[operator]
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta or weight.ndim != 2 or weight.shape[1] != model.d_model:
        raise UserError(
            f"{model.name}: its unembedding is not one matrix of width {model.d_model} in memory: {_REFUSED}"
        )
    tokens, last = model.probe(), Site(model.n_layers - 1, "resid_post")
    x = model.capture(tokens, [last])[last][0]
    emitted = model.call(tokens)[0].double()
    text = model.config.get_text_config()
    cap = getattr(text, "final_logit_softcapping", None) or None
    normed, gain, shift, centred = _read_norm(final_norm(model), x)
    bias = getattr(head, "bias", None)
    read = Unembedding(normed, gain, shift, centred, weight.detach(), bias, 1.0, cap)
    raw = torch.nn.functional.linear(read.normed(x), weight.double(), None if bias is None else bias.double())
    fitted = float((raw * emitted).sum() / raw.square().sum())
    named = [1.0, getattr(text, "logit_scale", None), 1 / (getattr(text, "logits_scaling", None) or 1.0)]
    scales = [float(scale) for scale in named if scale] + ([] if cap else [fitted])
    tolerance = tolerance_of(model.dtype) * float(emitted.abs().max())
    for scale in scales:
        read = Unembedding(normed, gain, shift, centred, weight.detach(), bias, scale, cap)
        frozen = read.linear(x) / read.sigma(x)[:, None] + shift
        off = float((read.capped(scale * raw) - emitted).abs().max())
        if off <= tolerance and torch.allclose(
            frozen, read.normed(x), rtol=1e-4, atol=1e-4 * float(frozen.abs().max())
        ):
            return read
    raise UserError(f"{model.name}: its logits are not its final norm and unembedding times a factor: {_REFUSED}")


_REFUSED = "its logits cannot be attributed directly"


def tolerance_of(dtype: torch.dtype) -> float:
    """Allowed error of sums, relative to their largest part."""
    return EXACT if dtype in (torch.float32, torch.float64) else ROUNDED


def _read_norm(
    norm: nn.Module | None, x: Float[Tensor, "pos d_model"]
) -> tuple[Callable[[Tensor], Tensor], Float[Tensor, "d_model"], Float[Tensor, "d_model"], bool]:
    """The norm in float32, its γ and β, and whether it subtracts the mean; read from its outputs."""
    ones = torch.ones_like(x[0], dtype=torch.float64)
    if norm is None:
        return torch.Tensor.double, ones, torch.zeros_like(ones), False
    module = deepcopy(norm).float()

    def normed(vectors: Float[Tensor, "some d_model"]) -> Float[Tensor, "some d_model"]:
        return module(vectors.float()[None])[0].double()

    generator = torch.Generator().manual_seed(0)
    signs = (torch.randint(0, 2, x[0].shape, generator=generator) * 2 - 1).to(x.device, torch.float64)
    probe = 1e4 * signs  # so large that the norm's epsilon does not matter
    shift = normed(torch.zeros_like(probe)[None])[0]
    both = normed(torch.stack([probe, probe + 5e3]))
    centred = torch.allclose(both[0], both[1], rtol=1e-3, atol=1e-4 * float(both.abs().max()))
    inner = probe - probe.mean() if centred else probe
    gain = (both[0] - shift) * inner.square().mean().sqrt() / inner
    return normed, gain, shift, centred
