"""Causal scrubbing: tests a hypothesis by resampling everything that should not matter under it (Chan et al. 2022).

A hypothesis is a tree. Each node names an image in the model and a feature φ of the input: it claims that the image may
be computed on any other input with the same φ. The model is evaluated as a tree, so that one activation reached by two
branches may carry two inputs.
"""

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from saepatch.engine.components import Changes, Component, ErrorTerm, LatentUnits
from saepatch.errors import UserError
from saepatch.model.hooks import edit_sites
from saepatch.model.inputs.tokens import without_tokens
from saepatch.model.language_model import LanguageModel, Tokens, refuse_training
from saepatch.model.sites import Site
from saepatch.records.statistics import Interval, bootstrap_ratio
from saepatch.records.tables import text_table

log = logging.getLogger(__name__)

Feature = Callable[[str], Hashable]
Draws = Int[ndarray, "examples"]
Read = TypeVar("Read")


@runtime_checkable
class Sampler(Protocol):
    """Draws a replacement input for every reference; `name` identifies it in results."""

    @property
    def name(self) -> str: ...
    def draw(self, references: Draws, features: Sequence[Hashable], rng: np.random.Generator) -> Draws:
        """Inputs, as indices into the data set, for the references; `features` are φ of every input."""
        ...


@dataclass(frozen=True)
class Matching:
    """Uniform, with replacement, among the inputs with the reference's φ (the reference itself among them)."""

    name: str = "matching"

    def draw(self, references: Draws, features: Sequence[Hashable], rng: np.random.Generator) -> Draws:
        members: dict[Hashable, list[int]] = {}
        for number, feature in enumerate(features):
            members.setdefault(feature, []).append(number)
        return np.array([int(rng.choice(members[features[i]])) for i in references.tolist()])


@dataclass(frozen=True)
class Unconditional:
    """Uniform among all inputs."""

    name: str = "unconditional"

    def draw(self, references: Draws, features: Sequence[Hashable], rng: np.random.Generator) -> Draws:
        return rng.integers(len(features), size=len(references))


@dataclass(frozen=True)
class Exact:
    """The reference itself: the node is not scrubbed."""

    name: str = "exact"

    def draw(self, references: Draws, features: Sequence[Hashable], rng: np.random.Generator) -> Draws:
        return references


@dataclass(frozen=True)
class Fixed:
    """One input for all references."""

    index: int
    name: str = "fixed"

    def draw(self, references: Draws, features: Sequence[Hashable], rng: np.random.Generator) -> Draws:
        return np.full(len(references), self.index)


@dataclass(frozen=True, eq=False)
class HypothesisNode:
    """A node of a hypothesis: `image` computes what φ (`feature`) says of the input, from its `children`.

    The image is a component at one site: latents (`LatentUnits`, some ids of a dictionary), `Heads`, a `Stream`. With
    `units` only these of them (as the component numbers them), at `position` of the prompt's own tokens (from 0, or
    from the end; None: at all). Children lie at earlier sites; whatever else leads to the image is unimportant.
    """

    image: Component
    feature: Feature
    units: tuple[int, ...] | None = None
    position: int | None = None
    children: tuple["HypothesisNode", ...] = ()
    sampler: Sampler = field(default_factory=Matching)

    def __str__(self) -> str:
        units = "" if self.units is None else " " + ",".join(map(str, self.units))
        return f"{self.image.site} {self.image.kind}{units}" + ("" if self.position is None else f" at {self.position}")

    def __post_init__(self) -> None:
        """Raises UserError for a child that does not lie before the image."""
        for child in self.children:
            if not child.image.site.order < self.image.site.order:
                raise UserError(f"{child} cannot be a cause of {self}: children lie at earlier sites")


@dataclass(frozen=True, eq=False)
class Scrubbed:
    """Losses of each example: of the model, of the scrubbed model, and of the model against another example's label.

    `recovered = (scrubbed − random) / (model − random)`: 1 where scrubbing changes nothing, 0 at the floor. `vacuous`
    names claims and the share of inputs whose matching set has one member: there the test tests nothing.
    """

    model: Float[ndarray, "examples"]
    scrubbed: Float[ndarray, "examples"]
    random: Float[ndarray, "examples"]
    samplers: tuple[str, ...]
    vacuous: tuple[tuple[str, float], ...]
    draws: tuple[tuple[str, Draws], ...]

    def __repr__(self) -> str:
        vacuous = f", {len(self.vacuous)} claims vacuous in part" if self.vacuous else ""
        means = ", ".join(f"{loss.mean():.3g}" for loss in (self.model, self.scrubbed, self.random))
        return (
            f"Scrubbed: {self.recovered} of the loss recovered on {len(self.model)} examples{vacuous}\n"
            f"mean loss of the model, scrubbed, with random labels: {means} (summary() has more)"
        )

    @property
    def recovered(self) -> Interval:
        """The share of the loss that the hypothesis recovers, a ratio of means with its interval over examples."""
        return bootstrap_ratio(self.scrubbed - self.random, self.model - self.random)

    def summary(self) -> str:
        """The losses and the recovered share as a table, the samplers, and the vacuous claims."""
        means = [("model", self.model), ("scrubbed", self.scrubbed), ("random labels", self.random)]
        lines = [text_table(["loss", "mean"], [[name, f"{loss.mean():.4f}"] for name, loss in means])]
        lines.append(f"recovered share {self.recovered}, n = {len(self.model)}; samplers: {', '.join(self.samplers)}")
        lines += [f"vacuous: {share:.0%} of inputs match no other in φ of {name}" for name, share in self.vacuous]
        return "\n".join(lines)


@torch.no_grad()
def scrub(
    model: LanguageModel,
    claims: Sequence[HypothesisNode],
    inputs: Sequence[str],
    labels: Sequence[int],
    others: Sampler | None = None,
    seed: int = 0,
    batch_size: int = 64,
    apart: Sequence[Component] = (),
) -> Scrubbed:
    """Test a hypothesis by causal scrubbing (Chan et al. 2022).

    The output runs on an input drawn by `others`, with the images of `claims` set to what they are on inputs drawn by
    each claim's sampler for the reference; an image with children is computed likewise, on a run of its own: the model
    is evaluated as a tree. All that a run does not name, error terms too, comes from its one drawn input ("together"),
    except the units of `apart`, each of which is computed on a drawn input of its own ("independent"), which breaks
    what only matters in combination. Images of dictionaries are not set at tokens that these were not trained on.

    Args:
        model: The model.
        claims: What the output depends on, each with its own children.
        inputs: Prompts of one token length.
        labels: The token id that follows each prompt; the loss is its cross-entropy at the last position.
        others: Draws the inputs of runs, for all that no claim names; by default `Unconditional`.
        seed: Of all draws.
        batch_size: Prompts per forward pass.
        apart: Components of few units, such as `Heads`, MLPs as `Stream`, or chosen latents.

    Returns:
        Losses, the draws, and `recovered`, whose floor is the model's mean loss on all inputs' labels.

    Raises:
        UserError: prompts differ in length, labels or images do not fit, an image is at one position and its dictionary
            was not trained on a token there, or a component of `apart` shares its site with an image of another kind.
    """
    refuse_training(model)
    tokens = model.tokenize(list(inputs))
    if tokens.padded:
        raise UserError("inputs differ in their number of tokens: causal scrubbing swaps positions, give equal lengths")
    if len(labels) != len(inputs):
        raise UserError(f"{len(labels)} labels for {len(inputs)} inputs: give one each")
    others, rng = others or Unconditional(), np.random.default_rng(seed)
    tree = _Tree(model, tokens, list(inputs), others, rng, batch_size, tuple(apart))
    tree.check(_all(claims))
    references = np.arange(len(inputs))
    wanted = torch.tensor(list(labels), device=model.device)
    own = torch.cat([model.next_logits(part) for part in tokens.batches(batch_size)]).double().log_softmax(-1)
    scrubbed = tree.output(claims, references).double().log_softmax(-1)
    vacuous = [(str(claim), share) for claim in _all(claims) if (share := tree.alone(claim)) > 0]
    for name, share in vacuous:
        log.warning("%s: %.0f %% of inputs match no other input, so scrubbing tests nothing there", name, 100 * share)
    return Scrubbed(
        model=-own.gather(1, wanted[:, None])[:, 0].cpu().numpy(),
        scrubbed=-scrubbed.gather(1, wanted[:, None])[:, 0].cpu().numpy(),
        random=-own[:, wanted].mean(1).cpu().numpy(),
        samplers=tuple(dict.fromkeys([*(claim.sampler.name for claim in _all(claims)), *tree.of_others])),
        vacuous=tuple(vacuous),
        draws=tuple(tree.draws),
    )


def _all(claims: Sequence[HypothesisNode]) -> list[HypothesisNode]:
    return [some for claim in claims for some in (claim, *_all(claim.children))]


@dataclass(frozen=True, eq=False)
class _Tree:
    """Evaluates claims, each on runs of its own."""

    model: LanguageModel
    tokens: Tokens
    inputs: list[str]
    others: Sampler
    rng: np.random.Generator
    batch_size: int
    apart: tuple[Component, ...] = ()
    draws: list[tuple[str, Draws]] = field(default_factory=list)

    def check(self, claims: Sequence[HypothesisNode]) -> None:
        """Raises UserError for images that do not fit the model, the inputs or the components that are drawn apart."""
        for component in (*(claim.image for claim in claims), *self.apart):
            component.check(self.model)
        for claim in claims:
            for other in self.apart:
                if (other.site, other.kind) != (claim.image.site, claim.image.kind) and other.site == claim.image.site:
                    raise UserError(
                        f"{claim} shares its site with the {other.kind} drawn apart: give one kind of units"
                    )
            if claim.position is not None and not bool(self._known(claim.image, self.tokens)[:, claim.position].all()):
                raise UserError(
                    f"{claim}: the dictionary was not trained on a token that is there in some inputs: leave these "
                    "out, or load it with every_position=True"
                )

    @property
    def of_others(self) -> list[str]:
        return [f"{self.others.name} together", *([f"{self.others.name} independent"] if self.apart else [])]

    def _known(self, image: Component, tokens: Tokens) -> Bool[Tensor, "batch pos"]:
        """Where an image can be set: its dictionary, if it has one, was trained on the token."""
        everywhere = torch.ones_like(tokens.input_ids, dtype=torch.bool)
        if not isinstance(image, LatentUnits | ErrorTerm):
            return everywhere
        return without_tokens(tokens.input_ids, everywhere, image.dictionary.excluded_tokens(self.model))

    def alone(self, claim: HypothesisNode) -> float:
        """Share of inputs whose matching set has one member; 0 for samplers that match nothing."""
        if not isinstance(claim.sampler, Matching):
            return 0.0
        counts = Counter(features := [claim.feature(text) for text in self.inputs])
        return float(np.mean([counts[feature] == 1 for feature in features]))

    def output(self, claims: Sequence[HypothesisNode], references: Draws) -> Float[Tensor, "examples vocab"]:
        return torch.cat(self._run(claims, references, self.model.next_logits))

    def _image(self, claim: HypothesisNode, references: Draws) -> "_DrawnImage":
        """The values of a claim's units for references."""
        site, features = claim.image.site, [claim.feature(text) for text in self.inputs]
        drawn = claim.sampler.draw(references, features, self.rng)
        self.draws.append((str(claim), drawn))

        def read(tokens: Tokens) -> tuple[Tensor, Tensor]:
            value = claim.image.read(self.model.capture(tokens, [site])[site])
            return value, self._known(claim.image, tokens)

        if claim.children:
            parts = self._run(claim.children, drawn, read, site)
        else:
            parts = [read(part) for part in self.tokens.rows(drawn.tolist()).batches(self.batch_size)]
        values, known = (torch.cat(some) for some in zip(*parts, strict=True))
        return _DrawnImage(claim, values, known)

    def _independent(self, claims: Sequence[HypothesisNode], before: Site | None) -> list[HypothesisNode]:
        """A claim for each unit that is drawn apart, on an input of its own, in a run up to a site."""
        mine = [some for some in self.apart if before is None or some.site.order < before.order]
        named = {(c.image.site, c.image.kind, unit) for c in claims if c.position is None for unit in _ids_of(c)}
        every = [
            HypothesisNode(some, _nothing, (unit,), sampler=self.others) for some in mine for unit in range(some.units)
        ]
        return [claim for claim in every if (claim.image.site, claim.image.kind, *_ids_of(claim)) not in named]

    def _run(
        self,
        claims: Sequence[HypothesisNode],
        references: Draws,
        read: Callable[[Tokens], Read],
        before: Site | None = None,
    ) -> list[Read]:
        """What `read` gives on inputs drawn for all that is not named, with the claims' images set."""
        images = [self._image(claim, references) for claim in (*claims, *self._independent(claims, before))]
        base = self.others.draw(references, [None] * len(self.inputs), self.rng)
        out = []
        for start in range(0, len(base), self.batch_size):
            part = self.tokens.rows(base[start : start + self.batch_size].tolist())
            some = [image.rows(slice(start, start + self.batch_size)) for image in images]
            some = [replace(image, known=image.known & self._known(image.claim.image, part)) for image in some]
            edits = {
                site: partial(_set, [image for image in some if image.claim.image.site == site])
                for site in dict.fromkeys(image.claim.image.site for image in some)
            }
            with edit_sites(self.model.layout, edits) if edits else nullcontext():
                out.append(read(part))
        return out


@dataclass(frozen=True, eq=False)
class _DrawnImage:
    """The values of a claim's units for each reference, and where they can be set."""

    claim: HypothesisNode
    value: Float[Tensor, "examples pos values"]
    known: Bool[Tensor, "examples pos"]

    def rows(self, some: slice) -> "_DrawnImage":
        return replace(self, value=self.value[some], known=self.known[some])


def _nothing(text: str) -> Hashable:
    return None


def _ids_of(claim: HypothesisNode) -> list[int]:
    """A claim's units, latents by their number in the dictionary."""
    image, units = claim.image, claim.units
    ids = list(image.ids) if isinstance(image, LatentUnits) and image.ids is not None else list(range(image.units))
    return ids if units is None else [ids[unit] for unit in units]


def _set(images: Sequence[_DrawnImage], x: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
    """The site's value with the claims' units set; all read the same value before any acts."""
    out = x
    taken: dict[int, Tensor] = {}  # where earlier claims have set a unit
    for image in images:
        claim = image.claim
        where = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        where[:, slice(None) if claim.position is None else claim.position] = True
        named = where[0].clone()
        if claim.feature is _nothing:
            (unit,) = _ids_of(claim)
            where &= ~taken.get(unit, torch.zeros_like(named))
        else:
            taken |= {unit: named | taken.get(unit, torch.zeros_like(named)) for unit in _ids_of(claim)}
        changes = claim.image.write(x, image.value, where & image.known)
        if claim.units is not None:
            mine = torch.isin(changes.unit, torch.tensor(claim.units, device=x.device)).nonzero().flatten()
            vectors = partial(_some_vectors, changes.vectors, mine)
            changes = Changes(changes.row[mine], changes.pos[mine], changes.unit[mine], vectors)
        out = out + (changes.applied(x) - x)
    return out


def _some_vectors(
    vectors: Callable[[Tensor], Tensor], mine: Int[Tensor, "mine"], some: Int[Tensor, "some"]
) -> Float[Tensor, "some width"]:
    return vectors(mine[some])
