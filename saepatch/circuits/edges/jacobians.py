"""Linear estimates of all edges into one site, by batched vector-Jacobian products.

A downstream node reads its site's value x; with G the gradient of the metric at the site, the node contributes
`⟨G, written(x)⟩` to the metric. The gradient of that at an upstream site, times the change of an upstream node, is the
edge. Rows of a batch do not act on each other, so each product carries one node of every row; nodes at one position
share a graph in which queries and MLPs of the last block run at that position alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saepatch.circuits.nodes import NodeSite
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.components import Changes, Component, ErrorTerm, Heads, LatentUnits
from saepatch.engine.spans import SpanGraph
from saepatch.model.sites import Site

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

    def __len__(self) -> int:
        return len(self.row)

    def at(self, x: Float[Tensor, "batch pos width"]) -> "Readers":
        """The same nodes where the site's value is `x`."""
        return replace(self, x=x)

    def only(self, chosen: Bool[Tensor, "nodes"]) -> "Readers":
        """Some of the nodes."""
        return replace(self, row=self.row[chosen], pos=self.pos[chosen], unit=self.unit[chosen])

    @cached_property
    def _active(self) -> Bool[Tensor, "nodes"]:
        """Which latents are active."""
        return self.component.read(self.x)[self.row, self.pos, self.unit].ne(0)

    @cached_property
    def _slopes(self) -> Float[Tensor, "d_sae"] | None:
        assert isinstance(self.component, LatentUnits | ErrorTerm)
        return encoder_slopes(self.component.dictionary, self.x[self.row[:4], self.pos[:4]])

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
        if self._slopes is not None:
            columns = dictionary.sae.W_enc.detach().T[unit]  # type: ignore[operator]
            return columns * (self._slopes[unit] * self._active[some])[:, None]
        with torch.enable_grad():
            x = self.x[row, pos][:, None].detach().to(dictionary.dtype).requires_grad_()
            acts = dictionary.sae.encode(x)  # type: ignore[operator]
            return torch.autograd.grad(acts[:, 0].gather(1, unit[:, None]).sum(), x)[0][:, 0]

    def _of_errors(self, dictionary: Dictionary, some: Int[Tensor, "some"]) -> Float[Tensor, "some width"]:
        """`g − ∂⟨g, reconstruction⟩/∂x`."""
        x = self.x[self.row[some], self.pos[some]][:, None].detach().to(dictionary.dtype)
        g = self.gradient[self.row[some], self.pos[some]].to(dictionary.dtype)
        if self._slopes is not None:
            node, unit = dictionary.activations(x)[0][:, 0].nonzero(as_tuple=True)
            worth = (g[node] * dictionary.rows[unit]).sum(-1) * self._slopes[unit]
            columns = dictionary.sae.W_enc.detach().T[unit]  # type: ignore[operator]
            return g.clone().index_add_(0, node, -worth[:, None] * columns)
        with torch.enable_grad():
            leaf = x.requires_grad_()
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
    for component in node.components:
        if isinstance(component, LatentUnits):
            active = torch.stack([component.read(value).ne(0) for value in (x, *also)]).any(0)
            chosen = active & where[..., None]
        else:
            chosen = where[..., None].expand(*where.shape, component.units)
        row, pos, unit = chosen.nonzero(as_tuple=True)
        out.append(Readers(component, row, pos, unit, x, gradient))
    return out


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


def products(graph: SpanGraph, readers: Readers, movers: Sequence[Movers], at_once: int = 0) -> Iterator[Products]:
    """Estimates of all edges from `movers` to `readers`, in chunks of bounded memory."""
    for p in readers.pos.unique().tolist():
        mine = (readers.pos == p).nonzero().flatten()
        table = _by_row(mine, readers.row[mine], len(readers.x))
        column = graph.column(p)
        for chunk in table.split(at_once or _at_once(readers, p + 1)):
            cotangent = readers.x.new_zeros(*chunk.shape, 1, readers.x.shape[-1])
            filled = chunk >= 0
            cotangent[filled] = readers.cotangents(chunk[filled])[:, None].to(cotangent.dtype)
            yield from _chunk(graph.leaves, column, cotangent, chunk, readers, movers, p + 1)


def _chunk(
    leaves: Mapping[Site, Tensor],
    column: Float[Tensor, "batch 1 width"],
    cotangent: Float[Tensor, "n batch 1 width"],
    reader: Int[Tensor, "n batch"],
    readers: Readers,
    movers: Sequence[Movers],
    columns: int,
) -> Iterator[Products]:
    wanted = [leaves[some.site] for some in movers]
    gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
        column, wanted, cotangent, is_grads_batched=True, retain_graph=True, allow_unused=True
    )
    for some, gradient in zip(movers, gradients, strict=True):
        vectors = some.vectors[:, :columns]
        if gradient is None:
            yield Products(some, readers, reader, vectors.new_zeros(*reader.shape, columns, vectors.shape[2]))
            continue
        # [batch, pos, n, width] @ [batch, pos, width, most]
        by_place = gradient[:, :, :columns].to(vectors.dtype).permute(1, 2, 0, 3) @ vectors.transpose(-1, -2)
        yield Products(some, readers, reader, by_place.permute(2, 0, 1, 3))


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
