"""The linear map at the end of an MLP, whose weights hold facts: it maps keys to values."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site


@dataclass(frozen=True, eq=False)
class Projection:
    """An MLP's output projection. `name` is its weight's name in the model.

    `transposed`: the weight is stored as [in, out] (GPT-2's `Conv1D`), so that shapes alone would not show a mistake
    where the matrix is square.
    """

    layer: int
    name: str
    module: nn.Module
    transposed: bool

    @property
    def weight(self) -> nn.Parameter:
        return self.module.weight  # type: ignore[return-value]

    @property
    def matrix(self) -> Float[Tensor, "out keys"]:
        """The weight in column form, in float64: what maps a key to a value."""
        weight = self.weight.detach().double()
        return weight.T if self.transposed else weight

    def value(self, key: Float[Tensor, "... keys"]) -> Float[Tensor, "... out"]:
        """What the projection makes of keys, in float64."""
        bias: Any = self.module.bias
        value = key.double() @ self.matrix.T
        return value if bias is None else value + bias.detach().double()


def projection(model: LanguageModel, layer: int) -> Projection:
    """The output projection of a layer's MLP.

    Raises:
        UserError: there is no such layer, its MLP has no single output projection (a mixture of experts), or the weight
            is quantised, not in memory, or shared by several layers.
    """
    module: Any = model.layout.module(Site(layer, "neurons"))
    if not isinstance(module, nn.Linear | Conv1D):
        raise UserError(
            f"the MLP of layer {layer} ends in a {type(module).__name__}, not in a linear map: merge adapters first"
        )
    weight: Any = module.weight
    if weight.is_meta or not weight.is_floating_point() or is_traceable_wrapper_subclass(weight):
        raise UserError(
            f"the weight of layer {layer} is quantised or not in memory ({weight.dtype}, {weight.device}): load the "
            "model in float32 or bfloat16, without offloading"
        )
    names = [name for name, other in model.hf.named_parameters() if other is weight]
    users = [site.layer for site in model.layout.of_stream("neurons") if _weight(model, site) is weight]
    if len(users) > 1:
        raise UserError(f"layers {', '.join(map(str, users))} share one weight, so an edit would change all of them")
    return Projection(layer, names[0], module, isinstance(module, Conv1D))


def _weight(model: LanguageModel, site: Site) -> object:
    return getattr(model.layout.module(site), "weight", None)


@torch.no_grad()
def for_stream(
    model: LanguageModel, at: Projection, key: Float[Tensor, "facts keys"], change: Float[Tensor, "facts d_model"]
) -> Float[Tensor, "facts out"]:
    """Changes of the projection's output that change the residual stream by `change`.

    They are equal, unless an RMS norm follows the MLP (Gemma 2 and 3, OLMo 2). Its output has a fixed length in units
    of its gain g, so that only the direction can be met: y/rms(y)·g = n + change for a multiple of y + change·rms(y)/g.

    Raises:
        UserError: the module that follows the MLP is not an RMS norm.
    """
    writer = model.layout.module(Site(at.layer, "mlp_out"))
    if any(module is at.module for module in writer.modules()):
        return change
    y = at.value(key)
    dtype = at.weight.dtype
    scale = y.square().mean(-1, keepdim=True).sqrt()
    gain = writer(torch.ones_like(y[:1], dtype=dtype)).double()
    normed = writer(y.to(dtype)).double()
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    if float((normed - y / scale * gain).abs().max()) > tolerance * float(normed.abs().max()):
        raise UserError(
            f"layer {at.layer}: the MLP is followed by a {type(writer).__name__} that is not an RMS norm, so no "
            "residual can be spread over layers: use Rome, which edits the projection's own output"
        )
    small = gain.abs() < 1e-4 * gain.abs().max()
    return torch.where(small, 0.0, change * scale / torch.where(small, 1.0, gain))
