"""What a sweep can patch: latents, error terms, whole sites, attention heads, directions. All write one site."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.kept_run import KeptRun
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site


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

    def reversed(self) -> "Changes":
        """The way back."""
        return replace(self, vectors=lambda some: -self.vectors(some))

    def applied(self, x: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
        """The site's value with all of them made."""
        # in float32 at least: many small changes may add up at one position
        dtype, place = torch.promote_types(x.dtype, torch.float32), self.row * x.shape[1] + self.pos
        total = torch.zeros(x.shape[0] * x.shape[1], x.shape[2], dtype=dtype, device=x.device)
        for some in torch.arange(len(self), device=x.device).split(2**14):  # as many vectors as surely fit
            total.index_add_(0, place[some], self.vectors(some).to(dtype))
        return (x + total.view(x.shape)).to(x.dtype)


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

    def read(self, x: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos values"]:
        """What the units hold where the site holds `x`."""
        ...

    def write(
        self,
        base: Float[Tensor, "batch pos width"],
        values: Float[Tensor, "batch pos values"],
        where: Bool[Tensor, "batch pos"],
    ) -> Changes:
        """What setting the units to `values` changes at a site that holds `base`, at the positions where it may."""
        ...


@dataclass(frozen=True)
class LatentUnits:
    """The latents of a dictionary, each a unit; the base run keeps its error term. `ids` leaves out all others."""

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
        if scale is not None:  # a dictionary that normalises its input writes in the scale of the base run
            value = value * scale[row, pos, 0]
        rows = self.dictionary.rows if self.ids is None else self.dictionary.rows[list(self.ids)]
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

    def read(self, x: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
        return self.dictionary.encode(x).error

    def write(
        self,
        base: Float[Tensor, "batch pos width"],
        values: Float[Tensor, "batch pos width"],
        where: Bool[Tensor, "batch pos"],
    ) -> Changes:
        return _whole(values - self.dictionary.encode(base).error, where)


@dataclass(frozen=True)
class Stream:
    """The whole value of a site at a position: one unit. `resid_post` sites make the classic layer × position map."""

    site: Site
    kind: str = "stream"
    units: int = 1

    def check(self, model: LanguageModel) -> None:
        model.layout.module(self.site)

    def read(self, x: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
        return x

    def write(
        self,
        base: Float[Tensor, "batch pos width"],
        values: Float[Tensor, "batch pos width"],
        where: Bool[Tensor, "batch pos"],
    ) -> Changes:
        return _whole(values - base, where)


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

    def read(self, x: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
        return x

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

    def read(self, x: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos units"]:
        return x.to(self._dtype(x)) @ self.rows.to(x.device, self._dtype(x)).T

    @staticmethod
    def _dtype(x: Tensor) -> torch.dtype:
        # in bfloat16 the difference of two coordinates would be little more than their rounding
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


def _whole(change: Float[Tensor, "batch pos width"], where: Bool[Tensor, "batch pos"]) -> Changes:
    row, pos = (where & change.ne(0).any(-1)).nonzero(as_tuple=True)
    return Changes(row, pos, torch.zeros_like(row), lambda some: change[row[some], pos[some]])


def between(component: Component, base: KeptRun, source: KeptRun, where: Bool[Tensor, "batch pos"]) -> Changes:
    """What patching each unit from one run into another changes, at the positions where it may be patched.

    Where one of them is the other with the units written over (an ablation), they are what was written: read again,
    they could be others, for an encoder's nonlinearity is not run on edited latents.
    """
    site = component.site
    if base.written is not None:
        return component.write(source.values[site], base.written, where).reversed()
    values = component.read(source.values[site]) if source.written is None else source.written
    return component.write(base.values[site], values, where)


Patchable = Dictionary | Component


def as_components(model: LanguageModel, given: Patchable | Sequence[Patchable]) -> list[Component]:
    """Components, a dictionary standing for its latents; each is checked against the model.

    Raises:
        UserError: none, two of one kind at one site, or one that does not belong to the model.
    """
    several = list(given) if isinstance(given, Sequence) else [given]
    components: list[Component] = [LatentUnits(each) if isinstance(each, Dictionary) else each for each in several]
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
    """Units of one component that an edit sets, at one position or (None) at all that were chosen.

    They are set to their values in the source run; with `frozen`, to those in the base run, so that nothing the edit
    changes upstream gets through them. Frozen units without a position are held at every token, chosen or not.
    """

    site: Site
    units: tuple[int, ...]
    position: int | None = None
    kind: str = "latent"
    frozen: bool = False
    beside: tuple[int, ...] = ()  # the units whose control these are


@dataclass(frozen=True, order=True)
class Edit:
    """What one run patches: some units of a component together, at one position or (None) at all that were chosen.

    `position` counts a prompt's own tokens from 0, or back from -1 where prompts are aligned from the right. `role`
    says why these units: "single" (all are swept), "given", "top", "random", "matched", "differing" or "every".

    `others` are further parts of the same edit, at other sites or positions. Each part sets its units in the edited run
    itself: where `x` is what its site holds once the parts upstream have acted, the site goes on with
    `x + decode(new) − decode(old)`, `old` the units' values read from `x`, `new` the same with the part's units at
    their values in the source run. So a part is set to its source value, and not only moved by the difference between
    the runs; and a part that is the same in both runs still undoes what the others change in it. Parts of one tensor
    all read what the tensor holds before any of them acts.
    """

    site: Site
    units: tuple[int, ...]
    position: int | None = None
    kind: str = "latent"
    role: str = "single"
    beside: tuple[int, ...] = ()  # the units whose control this is
    others: tuple[EditPart, ...] = ()

    @classmethod
    def of(cls, parts: Sequence[EditPart], role: str = "given") -> "Edit":
        """One edit made of parts.

        Raises:
            UserError: no part, or none that is not frozen.
        """
        acting = [part for part in parts if not part.frozen]
        if not acting:
            raise UserError(f"an edit of {len(parts)} parts, none of which takes values of the source run: give one")
        first = acting[0]
        others = tuple(part for part in parts if part is not first)
        return cls(first.site, first.units, first.position, first.kind, role, first.beside, others)

    @property
    def parts(self) -> tuple[EditPart, ...]:
        return (EditPart(self.site, self.units, self.position, self.kind, False, self.beside), *self.others)

    @property
    def place(self) -> str:
        """The site; of an edit at several, all of them: `resid_post.3 | resid_post.4`."""
        return " | ".join(str(part.site) for part in self.parts)

    @property
    def key(self) -> Key:
        """Which units of which components are patched, wherever in the prompt."""
        return tuple((part.site, part.kind, part.frozen, part.units) for part in self.parts)

    @property
    def beside_key(self) -> Key:
        """The key of the edit that this one is a control of."""
        return tuple((part.site, part.kind, part.frozen, part.beside) for part in self.parts)

    def at(self, position: int) -> "Edit":
        """The same at one position; frozen parts stay where they are."""
        others = tuple(part if part.frozen else replace(part, position=position) for part in self.others)
        return replace(self, position=position, others=others)
