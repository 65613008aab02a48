"""Interventions on latents: small frozen values that say what to write, where. They compose in the order given."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saepatch.dictionaries.latents import Latents
from saepatch.errors import UserError
from saepatch.model.positions import Pass, Positions, from_prompt
from saepatch.model.sites import Site

Ids = int | Sequence[int] | None  # one latent, several, or None for all of the dictionary


@dataclass(frozen=True, eq=False)
class Context(Pass):
    """What an intervention sees of the forward pass and the site that it acts in.

    Attributes:
        site: The spliced site.
        where: The positions that the intervention was given; elsewhere its values are discarded.
        scale: What the latents are decoded with at each position, of a dictionary that normalises its input; else None.
        unedited: All latents of the site and its error term, before any intervention; None unless `Needs.error` asks
            for them.
    """

    site: Site
    where: Bool[Tensor, "batch pos"]
    scale: Float[Tensor, "batch pos 1"] | None = None
    unedited: Latents | None = None

    @property
    def error(self) -> Float[Tensor, "batch pos width"]:
        """The error term, before any intervention.

        Raises:
            UserError: the intervention does not ask for it.
        """
        if self.unedited is None:
            raise UserError("the error term was not computed: give the intervention `needs = Needs(error=True)`")
        return self.unedited.error


@dataclass(frozen=True)
class Needs:
    """What an intervention reads, so that nothing else is computed. Without an attribute `needs`: all but the error.

    Attributes:
        values: The latents' values; without, it only adds to them, the same whatever they are.
        scale: The scale of a dictionary that normalises its input: what is written is a latent's value times the scale.
            Without, and without `values`, the site gets what is added times the latent's row itself.
        error: The error term and all latents, in the context. The intervention may have a method
            `edit_error(error, context)`, which returns a new error term.
    """

    values: bool = True
    scale: bool = True
    error: bool = False


@runtime_checkable
class Intervention(Protocol):
    """What a splice applies: new values for some latents at some positions of one site.

    `site` may be None where only one site is spliced. An attribute `needs` says what is read (`Needs`). A context is
    the pass, too, so that functions of the latents and the pass alone, `edit(acts, seen)`, are interventions.
    """

    @property
    def latents(self) -> Ids: ...
    @property
    def positions(self) -> Positions: ...
    @property
    def site(self) -> Site | str | None: ...
    def edit(self, acts: Float[Tensor, "batch pos k"], context: Context, /) -> Float[Tensor, "batch pos k"]:
        """New values for the chosen latents at every position of the pass; those not selected are discarded."""
        ...


def needs_of(intervention: object) -> Needs:
    """What an intervention reads."""
    needs: Needs = getattr(intervention, "needs", Needs())
    return needs


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

    @property
    def needs(self) -> Needs:
        return Needs(error=self.error)

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

    def edit_error(self, error: Float[Tensor, "batch pos d_model"], seen: Pass) -> Float[Tensor, "batch pos d_model"]:
        """The error term to carry instead, where `self.error` asks for the source's."""
        return torch.where(self.lines_up(seen)[..., None], from_prompt(self.source.error, seen, fill=0.0), error)


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


def _in_units(value: float, unit: float | tuple[float, ...], acts: Tensor) -> Tensor:
    """A strength in units of each latent, broadcastable to the latents it is for."""
    units = torch.as_tensor(unit, dtype=acts.dtype, device=acts.device)
    if units.ndim and units.shape[0] != acts.shape[-1]:
        raise UserError(f"{units.shape[0]} units for {acts.shape[-1]} latents: give one, or one for each")
    return value * units


def _check_decay(decay: float) -> None:
    if not 0 < decay <= 1:
        raise UserError(f"decay = {decay}: use a share above 0, and at most 1 (which keeps the strength as it is)")


def _share_left(decay: float, acts: Float[Tensor, "batch pos k"], seen: Pass) -> Float[Tensor, "batch pos 1"]:
    """What is left of an intervention's change at each position: `decay^g` at generated token g, counted from 0."""
    generated = (seen.index - seen.n_prompt[:, None]).clamp(min=0)
    return (decay ** generated.to(acts.dtype))[..., None]


@dataclass(frozen=True)
class Clamp:
    """Set latents to `value` times `unit`; a latent's maximum over a corpus as unit makes strengths comparable.

    `unit` is one number, or one for each latent. The change is multiplied by `decay` with every generated token.
    """

    latents: Ids
    value: float
    unit: float | tuple[float, ...] = 1.0
    positions: Positions = "all"
    site: Site | str | None = None
    decay: float = 1.0

    def __post_init__(self) -> None:
        _check_decay(self.decay)

    def edit(self, acts: Float[Tensor, "batch pos k"], seen: Pass) -> Float[Tensor, "batch pos k"]:
        to = _in_units(self.value, self.unit, acts).expand_as(acts)
        return to if self.decay == 1 else acts + _share_left(self.decay, acts, seen) * (to - acts)


@dataclass(frozen=True)
class AtLeast:
    """Raise latents to `value` times `unit` where they are below it, and leave them where they are not.

    `unit` is one number, or one for each latent. The change is multiplied by `decay` with every generated token.
    """

    latents: Ids
    value: float
    unit: float | tuple[float, ...] = 1.0
    positions: Positions = "all"
    site: Site | str | None = None
    decay: float = 1.0

    def __post_init__(self) -> None:
        _check_decay(self.decay)

    def edit(self, acts: Float[Tensor, "batch pos k"], seen: Pass) -> Float[Tensor, "batch pos k"]:
        to = torch.maximum(acts, _in_units(self.value, self.unit, acts))
        return to if self.decay == 1 else acts + _share_left(self.decay, acts, seen) * (to - acts)


@dataclass(frozen=True)
class Steer:
    """Add `strength` times `unit` to latents.

    `unit` is one number, or one for each latent (their corpus maxima). The strength is multiplied by `decay` with every
    generated token: a constant strength can make text repeat. The first of them, like the prompt, has all of it.

    A dictionary that normalises its input writes a latent times that input's scale, so that what is added differs by
    position. With `scaled` off, the site gets `strength · unit · row` itself, whatever the scale. Other dictionaries
    have no scale.
    """

    latents: Ids
    strength: float
    unit: float | tuple[float, ...] = 1.0
    positions: Positions = "all"
    site: Site | str | None = None
    decay: float = 1.0
    scaled: bool = True

    def __post_init__(self) -> None:
        _check_decay(self.decay)

    @property
    def needs(self) -> Needs:
        return Needs(values=False, scale=self.scaled)

    def edit(self, acts: Float[Tensor, "batch pos k"], context: Context) -> Float[Tensor, "batch pos k"]:
        added = _in_units(self.strength, self.unit, acts)
        if context.scale is not None and not self.scaled:
            added = added / context.scale.clamp(min=1e-12)
        return acts + (added if self.decay == 1 else _share_left(self.decay, acts, context) * added)
