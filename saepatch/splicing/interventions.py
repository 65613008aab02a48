"""Interventions on latents: frozen values that define what to write at which positions. They compose in order."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    """The forward pass and site in which an intervention acts.

    Attributes:
        site: The spliced site.
        where: The intervention's positions; values elsewhere are discarded.
        scale: Decoding scale at each position for a dictionary that normalises its input; otherwise None.
        unedited: All latents of the site and its error term, before any intervention; None unless requested by
            `Needs.error`.
    """

    site: Site
    where: Bool[Tensor, "batch pos"]
    scale: Float[Tensor, "batch pos 1"] | None = None
    unedited: Latents | None = None

    @property
    def error(self) -> Float[Tensor, "batch pos width"]:
        """The error term, before any intervention.

        Raises:
            UserError: the intervention did not request it.
        """
        if self.unedited is None:
            raise UserError("the error term was not computed: give the intervention `needs = Needs(error=True)`")
        return self.unedited.error


@dataclass(frozen=True)
class Needs:
    """The inputs of an intervention, so that nothing else is computed. Default: all but the error term.

    Attributes:
        values: The latents' current values. Off: the intervention only adds to them, independently of their values.
        scale: The scale of a dictionary that normalises its input, by which latents are multiplied on decoding. Off,
            together with `values`: the added amount times the latent's row is added to the site, without the scale.
        error: The error term and all latents, in the context. The intervention may define
            `edit_error(error, context)`, which returns a new error term.
        neighbours: Other positions' values. Off: the new values at a position depend on no other position's, and long
            prompts may be edited in parts, which bounds the memory.
    """

    values: bool = True
    scale: bool = True
    error: bool = False
    neighbours: bool = True


@runtime_checkable
class Intervention(Protocol):
    """New values for some latents at some positions of one site, applied by a splice.

    `site` may be None where only one site is spliced. An optional attribute `needs` declares the inputs (`Needs`). A
    `Context` is also a `Pass`, so that `edit(acts, seen)` may be written in terms of the pass alone.
    """

    @property
    def latents(self) -> Ids: ...
    @property
    def positions(self) -> Positions: ...
    @property
    def site(self) -> Site | str | None: ...
    def edit(self, acts: Float[Tensor, "batch pos k"], context: Context, /) -> Float[Tensor, "batch pos k"]:
        """New values for the latents at every position of the pass; values at unselected positions are discarded."""
        ...


def needs_of(intervention: object) -> Needs:
    """The inputs that an intervention declares; a class that edits in its own way has to say anew what it reads."""
    needs: Needs = getattr(intervention, "needs", Needs())
    if needs.neighbours or "needs" in getattr(intervention, "__dict__", {}):
        return needs
    for kind in map(vars, type(intervention).__mro__):
        if "needs" in kind:
            break
        if "edit" in kind or "edit_error" in kind:
            return replace(needs, neighbours=True)
    return needs


def ids_of(latents: Ids) -> tuple[int, ...] | None:
    """The chosen latents as a tuple, or None for all."""
    if latents is None:
        return None
    ids = tuple(map(index, latents)) if isinstance(latents, Sequence) else (index(latents),)
    if len(set(ids)) != len(ids):
        raise UserError(f"latents {list(ids)} contain a latent twice: give each once")
    return ids


def _columns(values: Tensor, latents: Ids) -> Tensor:
    ids = ids_of(latents)
    return values if ids is None else values[..., list(ids)]


def _last(real: Bool[Tensor, "batch pos"]) -> Tensor:
    """Column of each row's last token."""
    return real.shape[1] - 1 - real.int().flip(-1).argmax(-1)


@dataclass(frozen=True, eq=False)
class Patch:
    """Overwrite latents with those of a source run at the same positions (activation patching).

    `source` holds the latents of prompts that are aligned with the patched ones, token by token. With `error`, the
    source's error term is written as well (by default the patched run keeps its own); together with all latents, the
    site then has the source's value, except for dictionaries that normalise their input: they keep the patched run's
    scale.
    """

    source: Latents
    latents: Ids = None
    positions: Positions = "all"
    error: bool = False
    site: Site | str | None = None

    @property
    def needs(self) -> Needs:
        return Needs(error=self.error, neighbours=False)

    def lines_up(self, seen: Pass) -> Bool[Tensor, "batch pos"]:
        """Mask of positions where patched prompt and source both have a token, and not a BOS against another token."""
        if self.source.real is None or self.source.ordinary is None:
            return seen.in_prompt
        real, ordinary = (from_prompt(mask, seen, fill=False) for mask in (self.source.real, self.source.ordinary))
        return seen.in_prompt & real & (ordinary | ~seen.ordinary)

    def edit(self, acts: Float[Tensor, "batch pos k"], seen: Pass) -> Float[Tensor, "batch pos k"]:
        expected = (len(seen.input_ids), seen.width)
        if self.source.acts.shape[:2] != expected:
            raise UserError(
                f"the source run has shape {tuple(self.source.acts.shape[:2])}, the patched prompts {expected}: "
                "patch between equally many prompts of equal token length (for several sequences per prompt, repeat "
                "the source's prompts as often)"
            )
        if self.source.real is not None:
            row, column = (seen.in_prompt & (seen.index == seen.n_prompt[:, None] - 1)).nonzero(as_tuple=True)
            if not torch.equal(column + seen.start, _last(self.source.real)[row]):
                raise UserError(
                    "the source's prompts end in other columns than the patched ones: pad both on the same side "
                    "(generation pads on the left)"
                )
        values = from_prompt(_columns(self.source.acts, self.latents), seen, fill=0.0)
        return torch.where(self.lines_up(seen)[..., None], values, acts)

    def edit_error(self, error: Float[Tensor, "batch pos d_model"], seen: Pass) -> Float[Tensor, "batch pos d_model"]:
        """The source's error term where both runs have a token; called only with `self.error`."""
        return torch.where(self.lines_up(seen)[..., None], from_prompt(self.source.error, seen, fill=0.0), error)


@dataclass(frozen=True, eq=False)
class Ablate:
    """Replace latents by a constant (default 0), a mean ([k], or [pos, k] by position), or other examples' values."""

    latents: Ids = None
    to: float | Float[Tensor, "*pos k"] = 0.0
    positions: Positions = "all"
    site: Site | str | None = None
    needs = Needs(neighbours=False)

    def edit(self, acts: Float[Tensor, "batch pos k"], seen: Pass) -> Float[Tensor, "batch pos k"]:
        if not isinstance(self.to, Tensor):
            return torch.full_like(acts, self.to)
        if self.to.shape[-1] != acts.shape[-1]:
            raise UserError(
                f"ablation values are for {self.to.shape[-1]} latents, but {acts.shape[-1]} are ablated: "
                "give one per latent, as in mean[ids]"
            )
        to = self.to.to(acts)
        if to.ndim == 1:
            return to.expand_as(acts)
        by_position = to if to.ndim == 3 else to.expand(len(acts), *to.shape)
        if by_position.shape[:2] != (len(acts), seen.width):
            raise UserError(
                f"ablation values have shape {tuple(by_position.shape[:2])} in batch and positions: "
                f"give {(len(acts), seen.width)}"
            )
        return torch.where(seen.in_prompt[..., None], from_prompt(by_position, seen, fill=0.0), acts)

    @classmethod
    def resample(cls, source: Latents, latents: Ids = None, positions: Positions = "all", seed: int = 0) -> "Ablate":
        """Replace each example's latents by those of another example of `source` of the same length.

        The ablation applies to the batch on which `source` was recorded.

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
                    f"example {int(rows[0])} is the only one with {int(pattern.sum())} tokens, so there is no other to "
                    "resample from: give prompts of equal lengths, or ablate to zero or a mean"
                )
            order = rows[torch.randperm(len(rows), generator=generator)]
            other[order] = order.roll(1)  # a random cycle: no example receives its own values
        return cls(latents, _columns(source.acts[other.to(source.acts.device)], latents), positions)


def _in_units(value: float, unit: float | tuple[float, ...], acts: Tensor) -> Tensor:
    """A strength times each latent's unit, broadcastable to the latents."""
    units = torch.as_tensor(unit, dtype=acts.dtype, device=acts.device)
    if units.ndim and units.shape[0] != acts.shape[-1]:
        raise UserError(f"{units.shape[0]} units for {acts.shape[-1]} latents: give one, or one per latent")
    return value * units


def _check_decay(decay: float) -> None:
    if not 0 < decay <= 1:
        raise UserError(f"decay = {decay}: use a number above 0 and at most 1 (no decay)")


def _share_left(decay: float, acts: Float[Tensor, "batch pos k"], seen: Pass) -> Float[Tensor, "batch pos 1"]:
    """Share of an intervention's change that remains at each position: `decay^g` at generated token g, from 0."""
    generated = (seen.index - seen.n_prompt[:, None]).clamp(min=0)
    return (decay ** generated.to(acts.dtype))[..., None]


@dataclass(frozen=True)
class Clamp:
    """Set latents to `value` times `unit`; units as of `corpus_units` make strengths comparable between latents.

    `unit` is one number, or one per latent. The change is multiplied by `decay` with every generated token after the
    first.
    """

    latents: Ids
    value: float
    unit: float | tuple[float, ...] = 1.0
    positions: Positions = "all"
    site: Site | str | None = None
    decay: float = 1.0
    needs = Needs(neighbours=False)

    def __post_init__(self) -> None:
        _check_decay(self.decay)

    def edit(self, acts: Float[Tensor, "batch pos k"], seen: Pass) -> Float[Tensor, "batch pos k"]:
        target = self._target(acts)
        return target if self.decay == 1 else acts + _share_left(self.decay, acts, seen) * (target - acts)

    def _target(self, acts: Float[Tensor, "batch pos k"]) -> Float[Tensor, "batch pos k"]:
        return _in_units(self.value, self.unit, acts).expand_as(acts)


@dataclass(frozen=True)
class AtLeast(Clamp):
    """Raise latents to `value` times `unit` where they are below it; parameters as for `Clamp`."""

    def _target(self, acts: Float[Tensor, "batch pos k"]) -> Float[Tensor, "batch pos k"]:
        return torch.maximum(acts, _in_units(self.value, self.unit, acts))


@dataclass(frozen=True)
class Steer:
    """Add `strength` times `unit` to latents.

    `unit` is one number, or one per latent (as of `corpus_units`). The strength is multiplied by `decay` with every
    generated token after the first, since a constant strength can make text repetitive; the prompt and the first
    generated token get the full strength.

    A dictionary that normalises its input multiplies latents by the input's scale on decoding, so that a strength adds
    different amounts at different positions. With `scaled` off, exactly `strength · unit · row` is added to the site.
    Other dictionaries have no scale.
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
        return Needs(values=False, scale=self.scaled, neighbours=False)

    def edit(self, acts: Float[Tensor, "batch pos k"], context: Context) -> Float[Tensor, "batch pos k"]:
        added = _in_units(self.strength, self.unit, acts)
        if context.scale is not None and not self.scaled:
            added = added / context.scale.clamp(min=1e-12)
        return acts + (added if self.decay == 1 else _share_left(self.decay, acts, context) * added)


@dataclass(frozen=True)
class SteerAtNorm:
    """Add `strength` times `unit` to latents, and rescale the site to the norm that it had.

    At generated token t (from 0) the strength is multiplied by (1 / (1 + `fade` · t))^`power`; the prompt has it in
    full. Both keep a constant push from running away: the norm over layers, the fading over tokens. All of the site is
    rescaled, the error term included.
    """

    latents: Ids
    strength: float
    unit: float | tuple[float, ...] = 1.0
    positions: Positions = "all"
    site: Site | str | None = None
    fade: float = 0.0
    power: float = 1.0

    def __post_init__(self) -> None:
        if self.fade < 0 or self.power < 0:
            raise UserError(f"fade = {self.fade}, power = {self.power}: use numbers of at least 0")

    @property
    def needs(self) -> Needs:
        return Needs(error=True, neighbours=False)

    def edit(self, acts: Float[Tensor, "batch pos k"], context: Context) -> Float[Tensor, "batch pos k"]:
        return acts  # the site is written through its error term, since rescaling it is no change of latents

    def edit_error(
        self, error: Float[Tensor, "batch pos d_model"], context: Context
    ) -> Float[Tensor, "batch pos d_model"]:
        """The error term with which the site is what was described."""
        before = context.unedited
        assert before is not None  # needs
        token = (context.index - context.n_prompt[:, None]).clamp(min=0).to(before.acts.dtype)
        left = (1 / (1 + self.fade * token)) ** self.power
        ids = slice(None) if ids_of(self.latents) is None else list(ids_of(self.latents) or ())
        acts = before.acts.clone()
        acts[..., ids] += left[..., None] * _in_units(self.strength, self.unit, acts[..., ids])
        site = before.reconstruction + before.error
        moved = site + before.delta(acts)
        size = site.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        return error + (moved * size - site)
