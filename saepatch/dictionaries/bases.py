"""Neurons, dimensions and directions of a site as a dictionary: baselines for everything that acts on latents."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import adopt
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site

ORTHONORMAL = 1e-4  # tolerance on the inner products of directions, which must be 0 or 1


@dataclass
class BasisConfig:
    """The config fields of a sae_lens SAE that this package reads."""

    d_in: int
    d_sae: int
    normalize_activations: str = "none"
    metadata: dict[str, Any] = field(default_factory=dict)

    def architecture(self) -> str:
        return "basis"


class Basis(nn.Module):
    """Signed coordinates along orthonormal directions; the component orthogonal to all of them is the error term."""

    def __init__(self, directions: Float[Tensor, "n width"]) -> None:
        super().__init__()
        self.W_dec = nn.Parameter(directions, requires_grad=False)
        self.cfg = BasisConfig(directions.shape[1], directions.shape[0])

    def encode(self, x: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos n"]:
        return x @ self.W_dec.T

    def decode(self, acts: Float[Tensor, "batch pos n"]) -> Float[Tensor, "batch pos width"]:
        return acts @ self.W_dec


class Units(Basis):
    """Every coordinate of a site as a latent."""

    def __init__(self, width: int) -> None:
        super().__init__(torch.eye(width))

    def encode(self, x: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
        return x

    def decode(self, acts: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
        return acts


def units_of(model: LanguageModel, site: Site | str) -> Dictionary:
    """The coordinates of a site as a dictionary: neurons (`neurons.3`), or dimensions of the residual stream.

    Latents are the coordinates' values, which may be negative, and the error term is 0. Memory: an identity matrix of
    the site's width.

    Raises:
        UserError: the model has no such site.
    """
    site = Site.parse(site)
    return adopt(Units(model.width(site)).to(model.device, model.dtype), site, f"units of {site}")


def directions_of(directions: Float[Tensor, "n width"], site: Site | str, name: str = "directions") -> Dictionary:
    """Orthonormal directions at a site as a dictionary: latents are signed coordinates, the rest is the error term.

    Raises:
        UserError: the directions are not orthonormal.
    """
    products = (directions.double() @ directions.double().T).cpu()
    if not torch.allclose(products, torch.eye(len(directions), dtype=torch.float64), atol=ORTHONORMAL):
        raise UserError("the directions are not orthonormal: orthonormalise them, as with torch.linalg.qr")
    return adopt(Basis(directions.clone()), Site.parse(site), name)
