"""Interventions on latents: small frozen values that say what to write, where. They compose in the order given."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saepatch.errors import UserError
from saepatch.latents import Latents
from saepatch.positions import Pass, Positions, from_prompt
from saepatch.sites import Site

Ids = int | Sequence[int] | None  # one latent, several, or None for all of the dictionary


@runtime_checkable
class Intervention(Protocol):
    """What a splice applies: new values for some latents at some positions of one site.

    `site` may be None where only one site is spliced.
    """

    @property
    def latents(self) -> Ids: ...
    @property
    def positions(self) -> Positions: ...
    @property
    def site(self) -> Site | str | None: ...
    def edit(self, acts: Float[Tensor, "batch pos k"], seen: Pass) -> Float[Tensor, "batch pos k"]:
        """New values for the chosen latents at every position of the pass; those not selected are discarded."""
        ...


def ids_of(latents: Ids) -> tuple[int, ...] | None:
    """The chosen latents as a tuple, or None for all."""
    if latents is None:
        return None
    ids = tuple(map(index, latents)) if isinstance(latents, Sequence) else (index(latents),)
    if len(set(ids)) != len(ids):
        raise UserError(f"latents {list(ids)} name one twice: give each once")
    return ids


def _columns(values: Tensor, latents: Ids) -> Tensor:
    ids = ids_of(latents)
    return values if ids is None else values[..., list(ids)]


def _last(real: Bool[Tensor, "batch pos"]) -> Tensor:
    """Column of each row's last token."""
    return real.shape[1] - 1 - real.int().flip(-1).argmax(-1)


@dataclass(frozen=True, eq=False)
class Patch:
    """Overwrite latents with those a source run had at the same place.

    `source` holds the latents of prompts that line up with the patched ones, token for token. With `error`, the
    source's error term is written as well (by default the patched run keeps its own); together with all latents that is
    the source's own value, but for dictionaries that normalise their input, whose scale stays the patched run's.
    """

    source: Latents
    latents: Ids = None
    positions: Positions = "all"
    error: bool = False
    site: Site | str | None = None

    def lines_up(self, seen: Pass) -> Bool[Tensor, "batch pos"]:
        """Where both the patched prompt and the source have a token, and no ordinary token stands against a BOS."""
        if self.source.real is None or self.source.ordinary is None:
            return seen.in_prompt
        real, ordinary = (from_prompt(mask, seen, fill=False) for mask in (self.source.real, self.source.ordinary))
        return seen.in_prompt & real & (ordinary | ~seen.ordinary)

    def edit(self, acts: Float[Tensor, "batch pos k"], seen: Pass) -> Float[Tensor, "batch pos k"]:
        expected = (len(seen.input_ids), seen.width)
        if self.source.acts.shape[:2] != expected:
            raise UserError(
                f"the source run has shape {tuple(self.source.acts.shape[:2])}, the patched prompts {expected}: "
                "patch between prompts of equal number and token length (for several sequences a prompt, repeat the "
                "source's prompts as often)"
            )
        if self.source.real is not None and seen.start == 0:
            mine, theirs = (_last(real) for real in (seen.in_prompt[:, : seen.width], self.source.real))
            if not torch.equal(mine, theirs):
                raise UserError(
                    "the source's prompts end in other columns than the patched ones: tokenize both with the same side "
                    "(generation pads on the left)"
                )
        values = from_prompt(_columns(self.source.acts, self.latents), seen, fill=0.0)
        return torch.where(self.lines_up(seen)[..., None], values, acts)


@dataclass(frozen=True, eq=False)
class Ablate:
    """Replace latents by 0, by a mean ([k], or [pos, k] for one mean a position), or by other examples' values."""

    latents: Ids = None
    to: float | Float[Tensor, "*pos k"] = 0.0
    positions: Positions = "all"
    site: Site | str | None = None

    def edit(self, acts: Float[Tensor, "batch pos k"], seen: Pass) -> Float[Tensor, "batch pos k"]:
        if not isinstance(self.to, Tensor):
            return torch.full_like(acts, self.to)
        if self.to.shape[-1] != acts.shape[-1]:
            raise UserError(
                f"ablation values are for {self.to.shape[-1]} latents, but {acts.shape[-1]} are ablated: "
                "give one for each, as in mean[ids]"
            )
        to = self.to.to(acts)
        if to.ndim == 1:
            return to.expand_as(acts)
        by_position = to if to.ndim == 3 else to.expand(len(acts), *to.shape)
        if by_position.shape[:2] != (len(acts), seen.width):
            raise UserError(f"ablation values are for {by_position.shape[:2]} positions, not {(len(acts), seen.width)}")
        return torch.where(seen.in_prompt[..., None], from_prompt(by_position, seen, fill=0.0), acts)

    @classmethod
    def resample(cls, source: Latents, latents: Ids = None, positions: Positions = "all", seed: int = 0) -> "Ablate":
        """Replace each example's latents by those of another example of `source` with as many tokens.

        The ablation is for the batch that `source` was recorded on.

        Raises:
            UserError: an example is the only one of its length.
        """
        n = len(source.acts)
        real = torch.ones(source.acts.shape[:2], dtype=torch.bool) if source.real is None else source.real.cpu()
        generator, other = torch.Generator().manual_seed(seed), torch.arange(n)
        for pattern in real.unique(dim=0):
            rows = (real == pattern).all(-1).nonzero().flatten()
            if len(rows) < 2:
                raise UserError(
                    f"example {int(rows[0])} is the only one of its {int(pattern.sum())} tokens, so there is none to "
                    "resample from: give prompts of equal lengths, or ablate to zero or a mean"
                )
            order = rows[torch.randperm(len(rows), generator=generator)]
            other[order] = order.roll(1)  # one step round a random circle: nobody receives their own
        return cls(latents, _columns(source.acts[other.to(source.acts.device)], latents), positions)


@dataclass(frozen=True)
class Clamp:
    """Set latents to a value, in units of `unit` (a latent's maximum over a corpus makes strengths comparable)."""

    latents: Ids
    value: float
    unit: float = 1.0
    positions: Positions = "all"
    site: Site | str | None = None

    def edit(self, acts: Float[Tensor, "batch pos k"], seen: Pass) -> Float[Tensor, "batch pos k"]:
        return torch.full_like(acts, self.value * self.unit)


@dataclass(frozen=True)
class Steer:
    """Add `strength` times `unit` to latents; `unit` is one number, or one for each latent (their corpus maxima)."""

    latents: Ids
    strength: float
    unit: float | tuple[float, ...] = 1.0
    positions: Positions = "all"
    site: Site | str | None = None

    def edit(self, acts: Float[Tensor, "batch pos k"], seen: Pass) -> Float[Tensor, "batch pos k"]:
        unit = torch.as_tensor(self.unit, dtype=acts.dtype, device=acts.device)
        if unit.ndim and unit.shape[0] != acts.shape[-1]:
            raise UserError(f"{unit.shape[0]} units for {acts.shape[-1]} latents: give one, or one for each")
        return acts + self.strength * unit


@dataclass(frozen=True)
class Restore:
    """While text is generated, overwrite latents with those of a donor run that reads the same generated tokens.

    `donors` are the clean prompts, one for each prompt generated from. At each step the donor reads its clean prompt
    and the tokens generated so far, unpatched; the last `template` prompt positions (aligned from the right) and every
    generated position receive its latents. This is dynamic activation patching (Chen et al. 2024) on latents, with one
    model and two prompts.
    """

    donors: tuple[str, ...]
    latents: Ids = None
    template: int = 1
    site: Site | str | None = None
    donor_acts: Float[Tensor, "batch reach d_sae"] | None = None  # filled in by the splice, right-aligned

    @property
    def positions(self) -> Positions:
        return "all"

    def given(self, acts: Float[Tensor, "batch reach d_sae"]) -> "Restore":
        """The same restoration with the donor's latents for the `template` last prompt and all generated columns."""
        return replace(self, donor_acts=acts)

    def edit(self, acts: Float[Tensor, "batch pos k"], seen: Pass) -> Float[Tensor, "batch pos k"]:
        assert self.donor_acts is not None, "the splice runs the donor first"
        first = seen.width - self.template  # the whole row's column that donor_acts starts at
        columns = torch.arange(seen.start, seen.start + acts.shape[1], device=acts.device) - first
        inside = (columns >= 0) & seen.real
        values = _columns(self.donor_acts, self.latents)[:, columns.clamp(min=0)]
        return torch.where(inside[..., None], values, acts)
