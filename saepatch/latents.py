"""What interventions edit: the latents of one site, with the error term they leave."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from saepatch.errors import UserError


@dataclass(frozen=True, eq=False)
class Latents:
    """Latents of a batch and the part of the site that the dictionary does not explain.

    `rows` are the directions one unit of each latent adds to the site, before `scale`; `scale` is the per-position
    factor of dictionaries that normalise their input (1 for all others). `reconstruction + error` is the site's value.
    """

    acts: Float[Tensor, "batch pos d_sae"]
    error: Float[Tensor, "batch pos d_model"]
    reconstruction: Float[Tensor, "batch pos d_model"]
    rows: Float[Tensor, "d_sae d_model"]
    scale: Float[Tensor, "batch pos 1"] | None = None
    real: Bool[Tensor, "batch pos"] | None = None  # where the batch holds a token, not padding; None: everywhere
    ordinary: Bool[Tensor, "batch pos"] | None = None  # where that token is not BOS either; None: everywhere

    def delta(self, acts: Float[Tensor, "batch pos d_sae"]) -> Float[Tensor, "batch pos d_model"]:
        """What changing the latents to `acts` adds to the site: exactly `Δf · W_dec` for a linear decoder.

        Only the latents that change somewhere in the batch are decoded.
        """
        if acts.shape != self.acts.shape:
            raise UserError(f"edited latents have shape {tuple(acts.shape)}, not {tuple(self.acts.shape)}")
        change = acts - self.acts
        ids = change.flatten(0, 1).ne(0).any(0).nonzero().flatten()
        moved = change[..., ids] @ self.rows[ids]
        return moved if self.scale is None else moved * self.scale
