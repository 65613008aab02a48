"""The latents of one site together with the error term."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saepatch.errors import UserError

NUMBERS = 2**26  # latents at all positions of a batch up to which they are made at once


@dataclass(frozen=True, eq=False, repr=False)
class Latents:
    """Latents of a batch, and the error term: the part of the site that the dictionary does not reconstruct.

    `rows` are the vectors that one unit of each latent adds to the site, before `scale`; `scale` is the per-position
    factor of dictionaries that normalise their input (None for others). `reconstruction + error` is the site's value.
    """

    acts: Float[Tensor, "batch pos d_sae"]
    error: Float[Tensor, "batch pos d_model"]
    reconstruction: Float[Tensor, "batch pos d_model"]
    rows: Float[Tensor, "d_sae d_model"]
    scale: Float[Tensor, "batch pos 1"] | None = None
    real: Bool[Tensor, "batch pos"] | None = None  # positions that are not padding; None: all
    ordinary: Bool[Tensor, "batch pos"] | None = None  # positions that are neither padding nor BOS; None: all

    def __repr__(self) -> str:
        return f"Latents(acts {list(self.acts.shape)}, error {list(self.error.shape)}: .acts, .error, .reconstruction)"

    @classmethod
    def joined(cls, parts: "Sequence[Latents]") -> "Latents":
        """The latents of successive positions as one value."""
        if len(parts) == 1:
            return parts[0]
        whole = {
            name: None if value is None else torch.cat([getattr(part, name) for part in parts], 1)
            for name, value in vars(parts[0]).items()
            if name != "rows"
        }
        return replace(parts[0], **whole)  # type: ignore[arg-type]

    @property
    def beside(self) -> Float[Tensor, "batch pos d_model"]:
        """The site's value minus what its latents write: the error term plus the decoder's bias and shift."""
        written = decode_sparsely(self.acts, self.rows)
        written = written if self.scale is None else written * self.scale
        return self.error + (self.reconstruction - written)

    def delta(self, acts: Float[Tensor, "batch pos d_sae"]) -> Float[Tensor, "batch pos d_model"]:
        """The change of the site when the latents change to `acts`: exactly `Δf · W_dec` for a linear decoder.

        Only latents that change somewhere in the batch are decoded.
        """
        if acts.shape != self.acts.shape:
            raise UserError(
                f"edited latents have shape {tuple(acts.shape)}, not {tuple(self.acts.shape)}: return the shape given"
            )
        moved = decode_sparsely(acts - self.acts, self.rows)
        return moved if self.scale is None else moved * self.scale


def decode_sparsely(
    change: Float[Tensor, "batch pos k"], rows: Float[Tensor, "k d_model"]
) -> Float[Tensor, "batch pos d_model"]:
    """`change @ rows`, skipping latents whose change is 0 throughout the batch."""
    ids = change.flatten(0, 1).ne(0).any(0).nonzero().flatten()
    return change[..., ids] @ rows[ids]
