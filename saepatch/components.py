"""What a sweep can patch: latents, error terms, whole sites, attention heads, directions. All write one site."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saepatch.dictionaries import Dictionary
from saepatch.errors import UserError
from saepatch.models import LanguageModel
from saepatch.sites import Site


@dataclass(frozen=True, eq=False)
class Changes:
    """Where the units of a component differ between a base and a source run: one entry a (row, position, unit).

    `vectors(entries)` is what setting the unit to its source value adds to the site, [entries, width].
    """

    row: Int[Tensor, "entries"]
    pos: Int[Tensor, "entries"]
    unit: Int[Tensor, "entries"]
    vectors: Callable[[Int[Tensor, "some"]], Float[Tensor, "some width"]]

    def __len__(self) -> int:
        return len(self.row)


@runtime_checkable
class Component(Protocol):
    """Something that can be patched unit by unit at one site. `kind` says what a unit is: "latent", "head", …"""

    @property
    def kind(self) -> str: ...
    @property
    def site(self) -> Site: ...
    @property
    def units(self) -> int: ...
    def check(self, model: LanguageModel) -> None:
        """Raises UserError where the component does not belong to the model."""
        ...

    def changes(
        self,
        base: Float[Tensor, "batch pos width"],
        source: Float[Tensor, "batch pos width"],
        where: Bool[Tensor, "batch pos"],
    ) -> Changes:
        """What differs between the two runs' values of the site, at the positions where it may be patched."""
        ...


@dataclass(frozen=True)
class LatentUnits:
    """The latents of a dictionary, each a unit; the base run keeps its error term."""

    dictionary: Dictionary
    kind: str = "latent"

    @property
    def site(self) -> Site:
        return self.dictionary.site

    @property
    def units(self) -> int:
        return self.dictionary.d_sae

    def check(self, model: LanguageModel) -> None:
        self.dictionary.check(model)

    def changes(
        self,
        base: Float[Tensor, "batch pos width"],
        source: Float[Tensor, "batch pos width"],
        where: Bool[Tensor, "batch pos"],
    ) -> Changes:
        mine = self.dictionary.encode(base)
        change = self.dictionary.encode(source).acts.sub_(mine.acts)
        change *= where[..., None]
        row, pos, unit = change.nonzero(as_tuple=True)
        value = change[row, pos, unit]
        if mine.scale is not None:  # a dictionary that normalises its input writes in the scale of the base run
            value = value * mine.scale[row, pos, 0]
        rows = mine.rows
        return Changes(row, pos, unit, lambda some: value[some, None] * rows[unit[some]])


@dataclass(frozen=True)
class ErrorTerm:
    """What a dictionary does not explain: one unit."""

    dictionary: Dictionary
    kind: str = "error"
    units: int = 1

    @property
    def site(self) -> Site:
        return self.dictionary.site

    def check(self, model: LanguageModel) -> None:
        self.dictionary.check(model)

    def changes(
        self,
        base: Float[Tensor, "batch pos width"],
        source: Float[Tensor, "batch pos width"],
        where: Bool[Tensor, "batch pos"],
    ) -> Changes:
        return _whole(self.dictionary.encode(source).error - self.dictionary.encode(base).error, where)


@dataclass(frozen=True)
class Stream:
    """The whole value of a site at a position: one unit. `resid_post` sites make the classic layer × position map."""

    site: Site
    kind: str = "stream"
    units: int = 1

    def check(self, model: LanguageModel) -> None:
        model.layout.module(self.site)

    def changes(
        self,
        base: Float[Tensor, "batch pos width"],
        source: Float[Tensor, "batch pos width"],
        where: Bool[Tensor, "batch pos"],
    ) -> Changes:
        return _whole(source - base, where)


@dataclass(frozen=True)
class Heads:
    """The attention heads of a layer: each head's output z, before the output projection, is a unit."""

    layer: int
    units: int
    kind: str = "head"

    @property
    def site(self) -> Site:
        return Site(self.layer, "z")

    def check(self, model: LanguageModel) -> None:
        model.layout.module(self.site)
        if self.units != model.n_heads:
            raise UserError(f"{self.units} heads named at layer {self.layer}, but {model.name} has {model.n_heads}")

    def changes(
        self,
        base: Float[Tensor, "batch pos width"],
        source: Float[Tensor, "batch pos width"],
        where: Bool[Tensor, "batch pos"],
    ) -> Changes:
        by_head = (source - base).unflatten(-1, (self.units, -1)) * where[..., None, None]
        row, pos, unit = by_head.ne(0).any(-1).nonzero(as_tuple=True)

        def vectors(some: Int[Tensor, "some"]) -> Float[Tensor, "some width"]:
            out = torch.zeros(len(some), *by_head.shape[2:], dtype=by_head.dtype, device=by_head.device)
            each = torch.arange(len(some), device=by_head.device)
            out[each, unit[some]] = by_head[row[some], pos[some], unit[some]]
            return out.flatten(1)

        return Changes(row, pos, unit, vectors)


@dataclass(frozen=True, eq=False)
class Directions:
    """Orthonormal directions of a site, each a unit whose value is the site's coordinate along it.

    The baselines that latents are compared with: single dimensions (`dimensions`), principal components and the dense
    difference of means (`principal_components`, `difference_of_means`).
    """

    site: Site
    rows: Float[Tensor, "units width"]
    name: str
    kind: str = "direction"

    def __post_init__(self) -> None:
        gram = self.rows.double() @ self.rows.double().T
        if (worst := float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max())) > 1e-4:
            raise UserError(
                f"directions {self.name!r} are not orthonormal (off by {worst:.1e}), so patching several would write "
                "one change twice: orthonormalise them first (torch.linalg.qr)"
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

    def changes(
        self,
        base: Float[Tensor, "batch pos width"],
        source: Float[Tensor, "batch pos width"],
        where: Bool[Tensor, "batch pos"],
    ) -> Changes:
        rows = self.rows.to(base)
        change = ((source - base) @ rows.T) * where[..., None]
        row, pos, unit = change.nonzero(as_tuple=True)
        value = change[row, pos, unit]
        return Changes(row, pos, unit, lambda some: value[some, None] * rows[unit[some]])


def _whole(change: Float[Tensor, "batch pos width"], where: Bool[Tensor, "batch pos"]) -> Changes:
    row, pos = (where & change.ne(0).any(-1)).nonzero(as_tuple=True)
    return Changes(row, pos, torch.zeros_like(row), lambda some: change[row[some], pos[some]])


Patchable = Dictionary | Component


def as_components(model: LanguageModel, given: Patchable | Sequence[Patchable]) -> list[Component]:
    """Components, a dictionary standing for its latents; each is checked against the model.

    Raises:
        UserError: none, two of one kind at one site, or one that does not belong to the model.
    """
    several = list(given) if isinstance(given, Sequence) else [given]
    components: list[Component] = [LatentUnits(one) if isinstance(one, Dictionary) else one for one in several]
    if not components:
        raise UserError("there is nothing to patch: give at least one dictionary or component")
    seen: set[tuple[Site, str]] = set()
    for component in components:
        component.check(model)
        if (component.site, component.kind) in seen:
            raise UserError(f"two components of kind {component.kind!r} at {component.site}: patch them one by one")
        seen.add((component.site, component.kind))
    return components


@dataclass(frozen=True, order=True)
class Edit:
    """What one run patches: some units of a component together, at one position or (None) at all that were chosen.

    `position` counts a prompt's own tokens from 0, or back from -1 where prompts are aligned from the right. `role`
    says why these units: "single", "top", "random", "matched", "differing" or "every".
    """

    site: Site
    units: tuple[int, ...]
    position: int | None = None
    kind: str = "latent"
    role: str = "single"
    beside: tuple[int, ...] = ()  # the units whose control this is
