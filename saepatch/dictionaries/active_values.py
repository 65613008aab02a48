"""Quantiles of latents' activations over a stream of text, in memory that does not grow with it: a unit of strength.

A model's massive activations (Sun et al. 2024) make the largest activation of some latents tens of times larger than
any other, so the default unit is a quantile. At a share of 0.95 it is at most 20 times the mean active value, whatever
the outliers (Markov's inequality), and up to one active token in 20 may be an outlier; 0.99 allows one in 100 only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saepatch.errors import UserError

QUANTILE = 0.95
APART = 10  # warn where the largest activation is more times the unit
_DROPPED = 15  # low bits of a float32 that a bin leaves out: bins of at most 1/256 of their value
_PENDING = 2**22  # counts held before they are merged


class ActiveValues:
    """Counts of each latent's positive activations in narrow bins, and their maximum.

    The order of the values and the batches they come in do not matter. Memory grows with the number of bins in use, at
    most a few hundred for each latent that fires.
    """

    def __init__(self, latents: int) -> None:
        self.latents = latents
        self.maximum = torch.zeros(latents)
        self._counted = [(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))]

    @torch.no_grad()
    def add(self, acts: Float[Tensor, "positions latents"]) -> None:
        """Add the activations at some positions; only positive ones count."""
        if not len(acts):
            return
        acts = acts.float()
        self.maximum = torch.maximum(self.maximum, acts.amax(0).cpu())
        latent = (active := acts > 0).nonzero()[:, 1]
        # The bits of positive floats are ordered as their values are.
        bins = acts[active].view(torch.int32).long() >> _DROPPED
        keys, counts = ((latent << 32) + bins).unique(return_counts=True)
        self._counted.append((keys.cpu(), counts.cpu()))
        if sum(len(keys) for keys, _ in self._counted[1:]) > _PENDING:
            self._merged()

    def _merged(self) -> tuple[Int[Tensor, "bins"], Int[Tensor, "bins"]]:
        if len(self._counted) > 1:
            keys, place = torch.cat([keys for keys, _ in self._counted]).unique(return_inverse=True)
            counts = torch.zeros(len(keys), dtype=torch.long)
            self._counted = [(keys, counts.scatter_add_(0, place, torch.cat([n for _, n in self._counted])))]
        return self._counted[0]

    def quantile(self, share: float = QUANTILE) -> Float[Tensor, "latents"]:
        """The smallest value that this share of each latent's positive activations does not exceed, to 1/512 of it.

        1 is the maximum, as is any share of so few activations that the largest one is needed (19 or fewer for 0.95).
        0 for a latent that is never active.

        Raises:
            UserError: the share is not above 0 and at most 1.
        """
        check_quantile(share)
        keys, counts = self._merged()
        ends = torch.searchsorted(keys, torch.arange(1, self.latents + 1) << 32)
        total = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
        below = total[torch.cat([torch.zeros(1, dtype=torch.long), ends[:-1]])]
        n = total[ends] - below
        rank = (share * n.double() * (1 - 1e-12)).ceil().long()  # the product may be rounded up
        there = torch.searchsorted(total[1:], below + rank).clamp(max=max(0, len(keys) - 1))
        if not len(keys):
            return self.maximum.clone()
        lower = (keys[there] & 0xFFFFFFFF) << _DROPPED
        middle = (lower + (1 << (_DROPPED - 1))).int().view(torch.float32)
        value = torch.where(rank >= n, self.maximum, torch.minimum(middle, self.maximum))
        return torch.where(n > 0, value, torch.zeros_like(value))


def check_quantile(share: float) -> None:
    """Raises UserError for a share that is not above 0 and at most 1."""
    given: object = share
    if not (isinstance(given, int | float) and 0 < given <= 1):
        raise UserError(f"quantile = {share!r}: use a share above 0 and at most 1 (the largest activation)")


@dataclass(frozen=True, eq=False)
class StrengthUnits:
    """Activations that one unit of strength can mean for some latents.

    Attributes:
        unit: The quantile `quantile` of each latent's positive activations; 0 for one that is never active.
        maximum: Its largest activation.
    """

    unit: Float[Tensor, "latents"]
    maximum: Float[Tensor, "latents"]
    quantile: float = QUANTILE

    def of(self, ids: Sequence[int]) -> "StrengthUnits":
        """Those of some of the latents."""
        return StrengthUnits(self.unit[list(ids)], self.maximum[list(ids)], self.quantile)

    def warnings(self, latents: Sequence[int]) -> list[str]:
        """A sentence for each latent whose largest activation is more than ten times its unit."""
        return [
            f"latent {latent}: its largest activation, {maximum:.4g}, is {maximum / unit:.0f} times the "
            f"{self.quantile:g} quantile of its activations, {unit:.4g}: an outlier, such as at a text's first tokens "
            "or at white space"
            for latent, unit, maximum in zip(latents, self.unit.tolist(), self.maximum.tolist(), strict=True)
            if unit > 0 and maximum > APART * unit
        ]
