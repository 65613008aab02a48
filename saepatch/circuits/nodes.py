"""Nodes of a circuit: units at sites whose nodes together make up the site's whole value, and the logits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.transcoder import refuse_transcoder
from saepatch.engine.components import (
    Changes,
    Component,
    ErrorTerm,
    Heads,
    LatentUnits,
    Patchable,
    Stream,
    as_components,
)
from saepatch.engine.passes.kept_run import KeptRun
from saepatch.errors import UserError
from saepatch.measure.attribution import BY_POSITION
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.sites import Site

LOGITS = "logits"
RESIDUAL = ("resid_pre", "resid_post")


@dataclass(frozen=True)
class Node:
    """A unit at one position of a prompt, or (None) at all of its positions.

    `kind` is that of a component's units ("latent", "error", "head", "stream"), or "logits": the target, which has no
    site. Positions are indices into a prompt's own tokens, from 0.
    """

    site: Site | None
    unit: int = 0
    position: int | None = None
    kind: str = "latent"

    def __str__(self) -> str:
        if self.site is None:
            return LOGITS
        unit = "" if self.kind in ("error", "stream") else f" {self.unit}"
        return f"{self.site} {self.kind}{unit}" + ("" if self.position is None else f" at {self.position}")

    @property
    def order(self) -> tuple[int, int, int, int, str]:
        """Sort key: by order in the forward pass, position, unit; the logits come last."""
        first = (1_000_000_000, 0) if self.site is None else self.site.order
        return (*first, -1 if self.position is None else self.position, self.unit, self.kind)


@dataclass(frozen=True)
class Edge:
    """The part of the effect of `up` that reaches `down` directly."""

    up: Node
    down: Node

    def __post_init__(self) -> None:
        """Raises UserError where `up` cannot act on `down`: at the same or a later site, or at a later position."""
        up, down = self.up, self.down
        if up.site is None or (down.site is not None and not up.site.order < down.site.order):
            raise UserError(f"no edge from {up} to {down}: an edge leads to a later site")
        if None not in (up.position, down.position) and up.position > down.position:  # type: ignore[operator]
            raise UserError(f"no edge from {up} to {down}: later positions do not act on earlier ones")

    def __str__(self) -> str:
        return f"{self.up} → {self.down}"


@dataclass(frozen=True, eq=False)
class NodeSite:
    """A site, and the components whose units are its nodes: together they make up its whole value."""

    site: Site
    components: tuple[Component, ...]

    @property
    def cuts(self) -> bool:
        """Whether everything passes the site through its nodes: it is the residual stream."""
        return self.site.stream in RESIDUAL


def node_sites(model: LanguageModel, patchables: Patchable | Sequence[Patchable]) -> list[NodeSite]:
    """Sites with nodes, in the order of the forward pass.

    A dictionary stands for its latents and its error term, `Heads` for all heads of a layer, `Stream` for a whole
    site: an MLP's output at `mlp_out`, the token embeddings at `resid_pre.0`.

    Raises:
        UserError: a component does not fit the model, is only a part of its site, or shares a tensor with another.
    """
    given = list(patchables) if isinstance(patchables, Sequence) else [patchables]
    listed: list[Component] = []
    for item in given:
        if isinstance(item, Dictionary):
            refuse_transcoder(item, "circuits")
            if item.normalises:
                raise UserError(
                    f"dictionary {item.name} normalises its input, so its latents and error term do not make up "
                    f"{item.site}: use one that does not normalise"
                )
            if item.architecture not in BY_POSITION:
                raise UserError(
                    f"dictionary {item.name} ({item.architecture}) encodes positions together, so its latents have no "
                    f"edges of their own: use one of {', '.join(sorted(BY_POSITION))}"
                )
            listed += [LatentUnits(item), ErrorTerm(item)]
        elif isinstance(item, Heads | Stream):
            listed.append(item)
        else:
            raise UserError(
                f"{type(item).__name__} at {item.site} is only a part of its site: give dictionaries, Heads or Stream"
            )
    by_site: dict[Site, list[Component]] = {}
    for component in as_components(model, listed):
        by_site.setdefault(component.site, []).append(component)
    sites = sorted((NodeSite(site, tuple(parts)) for site, parts in by_site.items()), key=lambda some: some.site.order)
    for number, here in enumerate(sites):
        for other in sites[:number]:
            if here.site.same_tensor(other.site):
                raise UserError(f"{other.site} and {here.site} are one tensor: give nodes of one of them")
        if len({type(part) for part in here.components} & {LatentUnits, Heads, Stream}) > 1:
            raise UserError(f"{here.site} has nodes of several kinds that overlap: give one of them")
    return sites


def every_component(model: LanguageModel) -> list[Heads | Stream]:
    """The nodes of a model without dictionaries: every attention head, every MLP and the token embeddings."""
    heads = [Heads(site.layer, model.n_heads) for site in model.layout.of_stream("z")]
    mlps = [Stream(site) for site in model.layout.of_stream("mlp_out")]
    return [Stream(Site(0, "resid_pre")), *heads, *mlps]


@dataclass(frozen=True)
class Paths:
    """Which parts of the model are open between two nodes, besides the residual stream; nodes never are.

    What is closed keeps its value of the base run: `attention=False` holds the output of every attention layer between
    the nodes, `mlp=False` that of every MLP.
    """

    attention: bool = True
    mlp: bool = True

    @property
    def name(self) -> str:
        through = [name for name, is_open in (("attention", self.attention), ("MLPs", self.mlp)) if is_open]
        return " and ".join(["the residual stream", *through]) if len(through) < 2 else "all parts"

    def closed(self, model: LanguageModel, nodes: Sequence[NodeSite]) -> list[Site]:
        """Sites that are held wherever they lie between two nodes.

        What is a function of nodes within its own layer (the attention output where heads are nodes) is left to them.

        Raises:
            UserError: the model does not offer a site that is to be held.
        """
        own = {node.site for node in nodes}
        closed = []
        for is_open, stream, inner in ((self.attention, "attn_out", "z"), (self.mlp, "mlp_out", "neurons")):
            if is_open:
                continue
            for layer in range(model.n_layers):
                site = Site(layer, stream)
                model.layout.module(site)
                if site not in own and Site(layer, inner) not in own:
                    closed.append(site)
        return closed


def between(closed: Sequence[Site], nodes: Sequence[NodeSite], up: Site, down: Site | None) -> list[Site]:
    """The sites between two nodes that are held at the base run: closed ones, and those of other nodes."""
    others = [*closed, *(node.site for node in nodes)]
    return [site for site in others if up.order < site.order and (down is None or site.order < down.order)]


def upstream(nodes: Sequence[NodeSite], down: Site | None) -> list[NodeSite]:
    """The sites whose nodes may have edges to a site: from the last one that everything passes through."""
    before = [node for node in nodes if down is None or node.site.order < down.order]
    cut = max((number for number, node in enumerate(before) if node.cuts), default=0)
    return before[cut:]


def refuse_blocks(model: LanguageModel, tokens: Tokens) -> None:
    """Raises UserError for pictures whose tokens read later ones: edges lead to the same or a later position."""
    if tokens.images is not None and bool(tokens.images.after.any()):
        raise UserError(
            f"in {model.name} tokens of a picture read later ones, and edges lead to the same or a later position "
            "alone: find the nodes without edges (--edges 0, FindOptions(edges=None))"
        )


def changes_at(node: NodeSite, base: KeptRun, source: KeptRun, where: Bool[Tensor, "batch pos"]) -> list[Changes]:
    """The differences between the runs of each of a site's components, at positions in `where`, in their order.

    Differences after identical tokens are rounding, and are left out.
    """
    x, other = base.values[node.site], source.values[node.site]
    rounding = 8 * torch.finfo(x.dtype).eps * x.abs().amax(-1)
    same = base.tokens.same_start(source.tokens) & ((other - x).abs().amax(-1) <= rounding)
    where = where & ~same
    first = node.components[0]
    if isinstance(first, LatentUnits):
        return _dictionary_changes(first, x, other, where)
    return [component.write(x, component.read(other), where) for component in node.components]


def _dictionary_changes(
    latents: LatentUnits,
    x: Float[Tensor, "batch pos width"],
    other: Float[Tensor, "batch pos width"],
    where: Bool[Tensor, "batch pos"],
) -> list[Changes]:
    """The changes of a dictionary's latents and, as the rest of the site's change, of its error term."""
    row, pos = where.nonzero(as_tuple=True)
    here, there = (latents.read(value[row, pos][:, None])[:, 0] for value in (x, other))
    change = there - here
    place, unit = change.nonzero(as_tuple=True)
    value, rows = change[place, unit], latents.dictionary.rows
    of_latents = Changes(row[place], pos[place], unit, lambda some: value[some, None] * rows[unit[some]])
    rest = (other[row, pos] - x[row, pos]).to(rows.dtype)
    for some in torch.arange(len(place), device=x.device).split(2**14):
        rest.index_add_(0, place[some], -of_latents.vectors(some))
    return [of_latents, Changes(row, pos, torch.zeros_like(row), lambda some: rest[some])]


def written(
    component: Component,
    units: Sequence[int],
    x: Float[Tensor, "some width"],
    moved: Float[Tensor, "some width"],
) -> Float[Tensor, "some width"]:
    """What one unit each adds to its site, of value `x`, when it takes the value it has where the site is `moved`."""
    unit = torch.tensor(list(units), device=x.device)
    if isinstance(component, LatentUnits):
        ids = torch.tensor(sorted(set(units)), device=x.device)
        component, unit = replace(component, ids=tuple(ids.tolist())), torch.searchsorted(ids, unit)
    everywhere = torch.ones(len(x), 1, dtype=torch.bool, device=x.device)
    changes = component.write(x[:, None], component.read(moved[:, None]), everywhere)
    mine = (changes.unit == unit[changes.row]).nonzero().flatten()
    out = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    out[changes.row[mine]] = changes.vectors(mine).to(out.dtype)
    return out
