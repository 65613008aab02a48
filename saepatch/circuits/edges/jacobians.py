"""Linear estimates of all edges into one site, by batched vector-Jacobian products.

A downstream node reads its site's value x; with G the gradient of the metric at the site, the node contributes
`⟨G, written(x)⟩` to the metric. The gradient of that at an upstream site, times the change of an upstream node, is the
edge. Rows of a batch do not act on each other, so each product carries one node of every row; nodes at one position
share a graph in which queries and MLPs of the last block run at that position alone.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saepatch.circuits.nodes import NodeSite
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.components import Changes, Component, ErrorTerm, Heads, LatentUnits
from saepatch.engine.spans import SpanGraph, batched_gradients, flat_cache, is_close
from saepatch.model.sites import Site

log = logging.getLogger(__name__)

MEMORY = 2**28  # limit in bytes for the gradients of one chunk of products
SLOPES = {"standard", "jumprelu", "topk", "abstopk", "gated"}  # encoders that are linear between changes of activity


@dataclass(frozen=True, eq=False)
class Readers:
    """Nodes of one downstream component, and the gradient at their site of each node's contribution to the metric."""

    component: Component
    row: Int[Tensor, "nodes"]
    pos: Int[Tensor, "nodes"]
    unit: Int[Tensor, "nodes"]
    x: Float[Tensor, "batch pos width"]
    gradient: Float[Tensor, "batch pos width"]
    active: Bool[Tensor, "batch pos d_sae"] | None = None  # which latents of a dictionary are, where the value is `x`
    slopes: Float[Tensor, "d_sae"] | None = None  # of its encoder, as by `encoder_slopes`

    def __len__(self) -> int:
        return len(self.row)

    def at(self, x: Float[Tensor, "batch pos width"]) -> "Readers":
        """The same nodes where the site's value is `x`."""
        return self if x is self.x else replace(self, x=x, active=_active(self.component, x))

    def only(self, chosen: Bool[Tensor, "nodes"]) -> "Readers":
        """Some of the nodes."""
        return replace(self, row=self.row[chosen], pos=self.pos[chosen], unit=self.unit[chosen])

    def cotangents(self, some: Int[Tensor, "some"]) -> Float[Tensor, "some width"]:
        """Gradients at the site of these nodes' contributions."""
        g = self.gradient[self.row[some], self.pos[some]]
        component, unit = self.component, self.unit[some]
        if isinstance(component, Heads):
            mask = nn.functional.one_hot(unit, component.units).to(g.dtype)
            return (g.unflatten(-1, (component.units, -1)) * mask[..., None]).flatten(1)
        if isinstance(component, LatentUnits):
            worth = (g.to(component.dictionary.dtype) * component.dictionary.rows[unit]).sum(-1, keepdim=True)
            return (worth * self._of_latents(component.dictionary, some)).to(g.dtype)
        if isinstance(component, ErrorTerm):
            return self._of_errors(component.dictionary, some).to(g.dtype)
        return g

    def _of_latents(self, dictionary: Dictionary, some: Int[Tensor, "some"]) -> Float[Tensor, "some width"]:
        row, pos, unit = self.row[some], self.pos[some], self.unit[some]
        if self.slopes is not None:
            assert self.active is not None
            columns = dictionary.sae.W_enc.detach().T[unit]  # type: ignore[operator]
            return columns * (self.slopes[unit] * self.active[row, pos, unit])[:, None]
        with torch.enable_grad():
            x = self.x[row, pos][:, None].detach().to(dictionary.dtype).requires_grad_()
            acts = dictionary.sae.encode(x)  # type: ignore[operator]
            return torch.autograd.grad(acts[:, 0].gather(1, unit[:, None]).sum(), x)[0][:, 0]

    def _of_errors(self, dictionary: Dictionary, some: Int[Tensor, "some"]) -> Float[Tensor, "some width"]:
        """`g − ∂⟨g, reconstruction⟩/∂x`."""
        row, pos = self.row[some], self.pos[some]
        g = self.gradient[row, pos].to(dictionary.dtype)
        if self.slopes is not None:
            assert self.active is not None
            node, unit = self.active[row, pos].nonzero(as_tuple=True)
            worth = (g[node] * dictionary.rows[unit]).sum(-1) * self.slopes[unit]
            columns = dictionary.sae.W_enc.detach().T[unit]  # type: ignore[operator]
            return g.clone().index_add_(0, node, -worth[:, None] * columns)
        with torch.enable_grad():
            leaf = self.x[row, pos][:, None].detach().to(dictionary.dtype).requires_grad_()
            rebuilt = dictionary.sae.decode(dictionary.sae.encode(leaf))  # type: ignore[operator]
            return g - torch.autograd.grad((rebuilt[:, 0] * g).sum(), leaf)[0][:, 0]


def encoder_slopes(dictionary: Dictionary, x: Float[Tensor, "some width"]) -> Float[Tensor, "d_sae"] | None:
    """`∂f_j/∂x = slope_j · W_enc[:, j]` for active latents; None where automatic differentiation says otherwise."""
    if dictionary.architecture not in SLOPES or not hasattr(dictionary.sae, "W_enc"):
        return None
    slopes = torch.ones(dictionary.d_sae, dtype=dictionary.dtype, device=x.device)
    if dictionary.architecture == "gated":
        slopes = dictionary.sae.r_mag.detach().exp()  # type: ignore[operator]
    elif getattr(dictionary.cfg, "rescale_acts_by_decoder_norm", False):
        slopes = dictionary.W_dec.norm(dim=-1)
    with torch.enable_grad():
        leaf = x[:, None].detach().to(dictionary.dtype).requires_grad_()
        acts = dictionary.sae.encode(leaf)  # type: ignore[operator]
        weights = torch.randn(acts.shape, generator=torch.Generator().manual_seed(0)).to(acts)
        expected = torch.autograd.grad((acts * weights).sum(), leaf)[0]
    ours = (weights * slopes * acts.detach().ne(0)) @ dictionary.sae.W_enc.detach().T  # type: ignore[operator]
    close = torch.allclose(ours, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max().clamp(min=1e-6)))
    return slopes if close else None


def readers_at(
    node: NodeSite,
    x: Float[Tensor, "batch pos width"],
    gradient: Float[Tensor, "batch pos width"],
    where: Bool[Tensor, "batch pos"],
    also: Sequence[Float[Tensor, "batch pos width"]] = (),
) -> list[Readers]:
    """The nodes of a site whose values may move to first order: latents active at one of the values, and all others."""
    out = []
    first, active, slopes = node.components[0], _active(node.components[0], x), None
    if isinstance(first, LatentUnits) and bool(where.any()):
        row, pos = where.nonzero(as_tuple=True)
        slopes = encoder_slopes(first.dictionary, x[row[:4], pos[:4]])
    for component in node.components:
        chosen = where[..., None]
        if isinstance(component, LatentUnits):
            assert active is not None
            ever = [active, *(some for value in also if (some := _active(component, value)) is not None)]
            chosen = torch.stack(ever).any(0) & chosen
        else:
            chosen = chosen.expand(*where.shape, component.units)
        row, pos, unit = chosen.nonzero(as_tuple=True)
        out.append(Readers(component, row, pos, unit, x, gradient, active, slopes))
    return out


def _active(component: Component, x: Float[Tensor, "batch pos width"]) -> Bool[Tensor, "batch pos d_sae"] | None:
    if not isinstance(component, LatentUnits | ErrorTerm):
        return None
    return component.dictionary.activations(x)[0].ne(0)


@dataclass(frozen=True, eq=False)
class Movers:
    """The changes of one upstream site's nodes, padded to as many at every position: `vectors` are what they add.

    `component` and `unit` name each; `there` marks those that are not padding.
    """

    site: Site
    vectors: Float[Tensor, "batch pos most width"]
    component: Int[Tensor, "batch pos most"]
    unit: Int[Tensor, "batch pos most"]
    there: Bool[Tensor, "batch pos most"]

    @classmethod
    def of(cls, site: Site, changes: Sequence[Changes], x: Float[Tensor, "batch pos width"]) -> "Movers":
        batch, pos, width = x.shape
        row = torch.cat([some.row for some in changes])
        place = row * pos + torch.cat([some.pos for some in changes])
        order = place.argsort(stable=True)
        counts = torch.bincount(place, minlength=batch * pos)
        starts = counts.cumsum(0) - counts
        rank = torch.empty_like(place)
        rank[order] = torch.arange(len(place), device=x.device) - starts[place[order]]
        most = max(1, int(counts.max()))
        dtype = torch.promote_types(x.dtype, torch.float32)
        vectors = torch.zeros(batch * pos, most, width, dtype=dtype, device=x.device)
        names = torch.zeros(3, batch * pos, most, dtype=torch.long, device=x.device)
        offset = 0
        for number, some in enumerate(changes):
            mine = slice(offset, offset + len(some))
            offset += len(some)
            for part in torch.arange(len(some), device=x.device).split(2**14):
                at = place[mine][part], rank[mine][part]
                vectors[at] = some.vectors(part).to(dtype)
            names[:, place[mine], rank[mine]] = torch.stack(
                [torch.full_like(some.unit, number), some.unit, torch.ones_like(some.unit)]
            )
        component, unit, there = names.unflatten(1, (batch, pos))
        return cls(site, vectors.unflatten(0, (batch, pos)), component, unit, there.bool())


@dataclass(frozen=True, eq=False)
class Products:
    """Estimates of the edges from one upstream site's movers to some readers, at most one a row in each of `n`.

    `reader[n, row]` is the reader's number, -1 where there is none; movers are those of the first columns.
    """

    movers: Movers
    readers: Readers
    reader: Int[Tensor, "n batch"]
    scores: Float[Tensor, "n batch columns most"]


@dataclass(frozen=True, eq=False)
class EdgeSpan:
    """The estimates of all edges from some movers to readers of one site, whose value is a graph of the movers' sites.

    Where a column reads earlier ones through keys and values of its own block only, movers are carried forward to
    these once, and each product goes back no further than to them.
    """

    graph: SpanGraph
    movers: Sequence[Movers]

    def products(self, readers: Readers, at_once: int = 0) -> Iterator[Products]:
        """In chunks of bounded memory."""
        for p in readers.pos.unique().tolist():
            mine = (readers.pos == p).nonzero().flatten()
            table = _by_row(mine, readers.row[mine], len(readers.x))
            for chunk in table.split(at_once or _at_once(readers, p + 1)):
                scores = self._scores(p, _cotangents(readers, chunk))
                for some, of_these in zip(self.movers, scores, strict=True):
                    yield Products(some, readers, chunk, of_these)

    def _scores(self, p: int, cotangent: Float[Tensor, "n batch 1 width"]) -> list[Float[Tensor, "n batch _ most"]]:
        if self._carried is None:
            return self._from_leaves(p, cotangent)
        return self._from_cache(p, cotangent, self._carried)

    @cached_property
    def _first(self) -> int:
        """The first column with a mover."""
        return min(int(some.there.any(0).any(-1).int().argmax()) for some in self.movers)

    @cached_property
    def _carried(self) -> list[Float[Tensor, "batch pos most size"]] | None:
        """What each site's movers change in keys and values, from the first column on; None if that is not all."""
        if not self.graph.is_local():
            return None
        carried = [
            self.graph.carried(some.site, some.vectors[:, self._first : -1], self._first) for some in self.movers
        ]
        last = self.graph.whole.shape[1] - 1
        noise = torch.randn(self.graph.whole[:, -1:].shape, generator=torch.Generator().manual_seed(0))
        noise = noise[None].to(self.graph.whole)
        both = zip(self._from_cache(last, noise, carried), self._from_leaves(last, noise), strict=True)
        if all(is_close(ours, expected) for ours, expected in both) and self.graph.cache:
            return carried
        log.warning("edges by keys and values differ from those by whole passes, which are used")
        return None

    def _from_cache(
        self, p: int, cotangent: Float[Tensor, "n batch 1 width"], carried: Sequence[Tensor]
    ) -> list[Float[Tensor, "n batch columns most"]]:
        column, first = self.graph.column_on_cache(p), min(self._first, p)
        wanted = [column.leaves[some.site] for some in self.movers]
        gradients = batched_gradients(column.value, [*wanted, *column.cache], cotangent)
        here, before = gradients[: len(wanted)], flat_cache([x[..., first:, :] for x in gradients[len(wanted) :]])
        scores = [
            torch.cat([_worth(before, changes[:, : p - first]), _worth(gradient, some.vectors[:, p : p + 1])], 2)
            for some, changes, gradient in zip(self.movers, carried, here, strict=True)
        ]
        return [nn.functional.pad(some, (0, 0, first, 0)) for some in scores]

    def _from_leaves(
        self, p: int, cotangent: Float[Tensor, "n batch 1 width"]
    ) -> list[Float[Tensor, "n batch _ most"]]:
        leaves = [self.graph.leaves[some.site] for some in self.movers]
        gradients = batched_gradients(self.graph.column(p), leaves, cotangent)
        return [
            _worth(gradient[:, :, : p + 1], some.vectors[:, : p + 1])
            for some, gradient in zip(self.movers, gradients, strict=True)
        ]


def _cotangents(readers: Readers, chunk: Int[Tensor, "n batch"]) -> Float[Tensor, "n batch 1 width"]:
    out = readers.x.new_zeros(*chunk.shape, 1, readers.x.shape[-1])
    filled = chunk >= 0
    out[filled] = readers.cotangents(chunk[filled])[:, None].to(out.dtype)
    return out


def _worth(
    gradient: Float[Tensor, "n batch columns width"], vectors: Float[Tensor, "batch columns most width"]
) -> Float[Tensor, "n batch columns most"]:
    by_row = [gradient[:, row].transpose(0, 1).to(own.dtype) @ own.transpose(-1, -2) for row, own in enumerate(vectors)]
    return torch.stack(by_row).permute(2, 0, 1, 3)


def _by_row(numbers: Int[Tensor, "nodes"], row: Int[Tensor, "nodes"], rows: int) -> Int[Tensor, "most rows"]:
    """Numbers as a table with a column a row, filled up with -1."""
    counts = torch.bincount(row, minlength=rows)
    order = row.argsort(stable=True)
    rank = torch.empty_like(row)
    rank[order] = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row[order]]
    table = torch.full((max(1, int(counts.max())), rows), -1, dtype=torch.long, device=row.device)
    table[rank, row] = numbers
    return table


def _at_once(readers: Readers, columns: int) -> int:
    """Number of products in a chunk: each holds about a dozen vectors of the site's width at every column."""
    batch, _, width = readers.x.shape
    return max(1, MEMORY // (48 * batch * columns * width))
