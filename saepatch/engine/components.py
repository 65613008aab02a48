"""Components that a sweep can patch, each at one site: latents, error terms, streams, attention heads, directions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site


@dataclass(frozen=True, eq=False)
class Changes:
    """Differences of a component's units between a base and a source run: one entry per (row, position, unit).

    `vectors(entries)` [entries, width] is what setting the units to their source values adds to the site.
    """

    row: Int[Tensor, "entries"]
    pos: Int[Tensor, "entries"]
    unit: Int[Tensor, "entries"]
    vectors: Callable[[Int[Tensor, "some"]], Float[Tensor, "some width"]]

    def __len__(self) -> int:
        return len(self.row)

    def only(self, chosen: Bool[Tensor, "entries"]) -> "Changes":
        """Some of the changes."""
        numbers = chosen.nonzero().flatten()
        row, pos, unit = self.row[numbers], self.pos[numbers], self.unit[numbers]
        return Changes(row, pos, unit, lambda some: self.vectors(numbers[some]))

    def reversed(self) -> "Changes":
        """The changes from the source run to the base run."""
        return replace(self, vectors=lambda some: -self.vectors(some))

    def applied(self, x: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
        """The site's value with all changes made."""
        # at least float32: many small changes may add up at one position
        dtype, place = torch.promote_types(x.dtype, torch.float32), self.row * x.shape[1] + self.pos
        total = torch.zeros(x.shape[0] * x.shape[1], x.shape[2], dtype=dtype, device=x.device)
        for some in torch.arange(len(self), device=x.device).split(2**14):  # bounds the memory for vectors
            total.index_add_(0, place[some], self.vectors(some).to(dtype))
        return (x + total.view(x.shape)).to(x.dtype)


@runtime_checkable
class Component(Protocol):
    """Something that can be patched unit by unit at one site. `kind` is the kind of its units: "latent", "head", …"""

    @property
    def kind(self) -> str: ...
    @property
    def site(self) -> Site: ...
    @property
    def units(self) -> int: ...
    def check(self, model: LanguageModel) -> None:
        """Raises UserError where the component does not fit the model."""
        ...

    def read(self, x: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos values"]:
        """Values of the units where the site's value is `x`."""
        ...

    def write(
        self,
        base: Float[Tensor, "batch pos width"],
        values: Float[Tensor, "batch pos values"],
        where: Bool[Tensor, "batch pos"],
    ) -> Changes:
        """Changes from `base`, the site's value, when the units are set to `values`, at the positions in `where`."""
        ...


@dataclass(frozen=True)
class LatentUnits:
    """The latents of a dictionary as units; the base run keeps its error term. `ids` restricts them to a subset."""

    dictionary: Dictionary
    kind: str = "latent"
    ids: tuple[int, ...] | None = None

    @property
    def site(self) -> Site:
        return self.dictionary.site

    @property
    def units(self) -> int:
        return self.dictionary.d_sae if self.ids is None else len(self.ids)

    def check(self, model: LanguageModel) -> None:
        self.dictionary.check(model)

    def read(self, x: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos units"]:
        return self._activations(x)[0]

    @cached_property
    def _alone(self) -> Dictionary | None:
        few = self.ids is not None and 2 * len(self.ids) <= self.dictionary.d_sae
        return self.dictionary.alone(self.ids or ()) if few else None

    def _activations(
        self, x: Float[Tensor, "batch pos width"]
    ) -> tuple[Float[Tensor, "batch pos units"], Float[Tensor, "batch pos 1"] | None]:
        if self._alone is not None:
            return self._alone.activations(x)
        acts, scale = self.dictionary.activations(x)
        return acts if self.ids is None else acts[..., list(self.ids)], scale

    def write(
        self,
        base: Float[Tensor, "batch pos width"],
        values: Float[Tensor, "batch pos units"],
        where: Bool[Tensor, "batch pos"],
    ) -> Changes:
        acts, scale = self._activations(base)
        change = values - acts
        change *= where[..., None]
        row, pos, unit = change.nonzero(as_tuple=True)
        value = change[row, pos, unit]
        if scale is not None:  # a dictionary that normalises its input decodes with the base run's scale
            value = value * scale[row, pos, 0]
        rows = self.dictionary.rows if self.ids is None else self.dictionary.rows[list(self.ids)]
        return Changes(row, pos, unit, lambda some: value[some, None] * rows[unit[some]])


class _SiteValue:
    """Base of components whose values have the site's width: by default, one unit that is the site's whole value."""

    def read(self, x: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
        return x

    def write(
        self,
        base: Float[Tensor, "batch pos width"],
        values: Float[Tensor, "batch pos width"],
        where: Bool[Tensor, "batch pos"],
    ) -> Changes:
        change = values - self.read(base)
        row, pos = (where & change.ne(0).any(-1)).nonzero(as_tuple=True)
        return Changes(row, pos, torch.zeros_like(row), lambda some: change[row[some], pos[some]])


@dataclass(frozen=True)
class ErrorTerm(_SiteValue):
    """The error term of a dictionary as one unit."""

    dictionary: Dictionary
    kind: str = "error"
    units: int = 1

    @property
    def site(self) -> Site:
        return self.dictionary.site

    def check(self, model: LanguageModel) -> None:
        self.dictionary.check(model)

    def read(self, x: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
        return self.dictionary.encode(x).error


@dataclass(frozen=True)
class Stream(_SiteValue):
    """The whole value of a site at a position as one unit. `resid_post` sites give the classic layer × position map."""

    site: Site
    kind: str = "stream"
    units: int = 1

    def check(self, model: LanguageModel) -> None:
        model.layout.module(self.site)


@dataclass(frozen=True)
class Heads(_SiteValue):
    """The attention heads of a layer as units: each head's output z, before the output projection."""

    layer: int
    units: int
    kind: str = "head"

    @property
    def site(self) -> Site:
        return Site(self.layer, "z")

    def check(self, model: LanguageModel) -> None:
        model.layout.module(self.site)
        if self.units != model.n_heads:
            raise UserError(
                f"{self.units} heads at layer {self.layer}, but {model.name} has {model.n_heads}: name these"
            )

    def write(
        self,
        base: Float[Tensor, "batch pos width"],
        values: Float[Tensor, "batch pos width"],
        where: Bool[Tensor, "batch pos"],
    ) -> Changes:
        by_head = (values - base).unflatten(-1, (self.units, -1)) * where[..., None, None]
        row, pos, unit = by_head.ne(0).any(-1).nonzero(as_tuple=True)

        def vectors(some: Int[Tensor, "some"]) -> Float[Tensor, "some width"]:
            out = torch.zeros(len(some), *by_head.shape[2:], dtype=by_head.dtype, device=by_head.device)
            out[torch.arange(len(some), device=by_head.device), unit[some]] = by_head[row[some], pos[some], unit[some]]
            return out.flatten(1)

        return Changes(row, pos, unit, vectors)


@dataclass(frozen=True, eq=False)
class Directions:
    """Orthonormal directions of a site as units, whose values are the site's coordinates along them.

    Baselines for latents: single dimensions (`dimensions`), principal components and the dense difference of means
    (`principal_components`, `difference_of_means`).
    """

    site: Site
    rows: Float[Tensor, "units width"]
    name: str
    kind: str = "direction"

    def __post_init__(self) -> None:
        gram = self.rows.double() @ self.rows.double().T
        if (worst := float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max())) > 1e-4:
            raise UserError(
                f"directions {self.name!r} are not orthonormal (off by {worst:.1e}), so patching several would count "
                "shared parts twice: orthonormalise them first (torch.linalg.qr)"
            )

    @property
    def units(self) -> int:
        return len(self.rows)

    def check(self, model: LanguageModel) -> None:
        if self.rows.shape[1] != model.width(self.site):
            raise UserError(
                f"directions {self.name!r} have width {self.rows.shape[1]}, but {self.site} of {model.name} has "
                f"{model.width(self.site)}"
            )

    def read(self, x: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos units"]:
        return x.to(self._dtype(x)) @ self.rows.to(x.device, self._dtype(x)).T

    @staticmethod
    def _dtype(x: Tensor) -> torch.dtype:
        # in bfloat16, rounding would dominate the difference of two coordinates
        return torch.promote_types(x.dtype, torch.float32)

    def write(
        self,
        base: Float[Tensor, "batch pos width"],
        values: Float[Tensor, "batch pos units"],
        where: Bool[Tensor, "batch pos"],
    ) -> Changes:
        rows = self.rows.to(base.device, self._dtype(base))
        change = (values - self.read(base)) * where[..., None]
        row, pos, unit = change.nonzero(as_tuple=True)
        value = change[row, pos, unit]
        return Changes(row, pos, unit, lambda some: value[some, None] * rows[unit[some]])


Patchable = Dictionary | Component


def as_components(model: LanguageModel, patchables: Patchable | Sequence[Patchable]) -> list[Component]:
    """Components, with dictionaries replaced by their latents; each is checked against the model.

    Raises:
        UserError: there are none, two are of the same kind at one site, or one does not fit the model.
    """
    several = list(patchables) if isinstance(patchables, Sequence) else [patchables]
    components: list[Component] = [LatentUnits(item) if isinstance(item, Dictionary) else item for item in several]
    if not components:
        raise UserError("there is nothing to patch: give at least one dictionary or component")
    seen: set[tuple[Site, str]] = set()
    for component in components:
        component.check(model)
        if (component.site, component.kind) in seen:
            raise UserError(f"two components of kind {component.kind!r} at {component.site}: patch them one by one")
        seen.add((component.site, component.kind))
    return components


# denoise: clean values into the corrupted run; noise: corrupted values into the clean one
PatchDirection = Literal["denoise", "noise"]
PATCH_DIRECTIONS: tuple[PatchDirection, PatchDirection] = ("denoise", "noise")


Key = tuple[tuple[Site, str, bool, tuple[int, ...]], ...]  # of each part: site, kind, whether frozen, units


@dataclass(frozen=True, order=True)
class EditPart:
    """Units of one component that an edit sets, at one position or (None) at all chosen positions.

    They are set to their values in the source run; with `frozen`, to those in the base run, which blocks the effects
    of upstream changes through them. Frozen units without a position are frozen at every token, chosen or not.
    """

    site: Site
    units: tuple[int, ...]
    position: int | None = None
    kind: str = "latent"
    frozen: bool = False
    beside: tuple[int, ...] = ()  # the units of which these are a control


@dataclass(frozen=True, order=True)
class Edit:
    """One edit: some units of a component patched together, at one position or (None) at all chosen positions.

    `position` is an index into a prompt's own tokens, from 0, or from the end (-1) where prompts are aligned from the
    right. `role` is why the units were chosen: "single" (all are swept), "given", "top", "random", "matched",
    "differing" or "every".

    `others` are further parts of the same edit, at other sites or positions. Each part sets its units in the edited
    run: where `x` is the site's value after the upstream parts have acted, it becomes `x + decode(new) − decode(old)`,
    with `old` the units' values read from `x`, and `new` the same with the part's units at their source values. So a
    part is set to its source value, not shifted by the difference between the runs; and a part with equal values in
    both runs still undoes upstream changes of its units. Parts of the same tensor all read its value before any of
    them acts.
    """

    site: Site
    units: tuple[int, ...]
    position: int | None = None
    kind: str = "latent"
    role: str = "single"
    beside: tuple[int, ...] = ()  # the units of which this is a control
    others: tuple[EditPart, ...] = ()

    @classmethod
    def of(cls, parts: Sequence[EditPart], role: str = "given") -> "Edit":
        """One edit made of parts.

        Raises:
            UserError: there are no parts, or all are frozen.
        """
        acting = [part for part in parts if not part.frozen]
        if not acting:
            raise UserError(
                f"none of the edit's {len(parts)} parts takes values of the source run: give one that is not frozen"
            )
        first = acting[0]
        others = tuple(part for part in parts if part is not first)
        return cls(first.site, first.units, first.position, first.kind, role, first.beside, others)

    @property
    def parts(self) -> tuple[EditPart, ...]:
        return (EditPart(self.site, self.units, self.position, self.kind, False, self.beside), *self.others)

    @property
    def place(self) -> str:
        """The sites of all parts: `resid_post.3 | resid_post.4`."""
        return " | ".join(str(part.site) for part in self.parts)

    @property
    def key(self) -> Key:
        """The patched units of each component, regardless of position."""
        return tuple((part.site, part.kind, part.frozen, part.units) for part in self.parts)

    @property
    def beside_key(self) -> Key:
        """The key of the edit of which this one is a control."""
        return tuple((part.site, part.kind, part.frozen, part.beside) for part in self.parts)

    def at(self, position: int) -> "Edit":
        """The same edit at one position; frozen parts keep theirs."""
        others = tuple(part if part.frozen else replace(part, position=position) for part in self.others)
        return replace(self, position=position, others=others)
