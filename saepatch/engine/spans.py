"""Passes that start at one site of a kept run and end at a later one: its value there, or a graph of it.

Both skip the blocks before the first site and, where a cache allows it, the columns before the first one that matters.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache
from transformers.cache_utils import Cache

from saepatch.engine.gradients import Readout
from saepatch.engine.metrics import metric_name
from saepatch.engine.passes.kept_cache import Before, cache_before
from saepatch.engine.passes.kept_run import ON_CACHE, WAYS, KeptRun, entry
from saepatch.engine.passes.shortcuts import linear_activations
from saepatch.errors import UserError
from saepatch.model.hooks import Edit, SpliceError, edit_sites
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.replaced import forwards_replaced, skip_blocks
from saepatch.model.sites import Site

log = logging.getLogger(__name__)


class _ReachedSite(Exception):
    """Raised at the site where a pass may end."""


def run_to(
    model: LanguageModel,
    tokens: Tokens,
    edits: Mapping[Site, Edit],
    target: Site,
    start: int = 0,
    cache: Any = None,
    skip: int = 0,
) -> Float[Tensor, "batch columns width"]:
    """The value of a site in a pass with edits, from column `start` on; later blocks do not run.

    Raises:
        SpliceError: the pass did not run through the target or an edited site.
    """
    reached: list[Tensor] = []
    fired: set[Site] = set()

    def noted(site: Site, edit: Edit) -> Edit:
        def run(x: Tensor) -> Tensor:
            fired.add(site)
            return edit(x)

        return run

    def stop(x: Tensor) -> Tensor:
        reached.append(x)
        raise _ReachedSite

    hooks = {site: noted(site, edit) for site, edit in edits.items()} | {target: stop}
    try:
        with skip_blocks(model.layout, skip), edit_sites(model.layout, hooks):
            model.call(tokens, start, last=True, cache=cache)
    except _ReachedSite:
        pass
    if missed := [str(site) for site in (*edits, target) if site not in fired and not (site == target and reached)]:
        raise SpliceError(f"a pass to {target} did not run through {', '.join(missed)}: check the model's blocks")
    return reached[0]


@torch.no_grad()
def reach(
    base: KeptRun,
    site: Site,
    rows: Int[Tensor, "edits"],
    first: int,
    change: Float[Tensor, "edits columns width"],
    target: Site,
    held: Collection[Site] = (),
) -> Float[Tensor, "edits columns out"]:
    """The value of a later site, from column `first` on, in rows of the base run with `change` added to a site.

    `held` are sites between the two that keep their values of the base run.
    """
    way, columns = base.way(site), change.shape[1]
    start = base.tokens.rows(rows).block_start(first) if way in ON_CACHE else 0
    change = nn.functional.pad(change, (0, 0, first - start, 0))
    old = base.values[site][rows, start:]
    values = {other: base.values[other][rows, start:] for other in held}
    if entry(site) != site:
        values[entry(site)] = base.values[entry(site)][rows, start:]
    values[site] = (old + change).to(old.dtype)
    out = run_to(
        base.model,
        base.tokens.rows(rows),
        {place: _set_to(value) for place, value in values.items()},
        target,
        start,
        base.cache_before(rows, start) if start else None,
        0 if way == WAYS[-1] else site.enters,
    )
    return out.to(base.model.device)[:, -columns:]


class ColumnGraph(NamedTuple):
    """A later site's value in one column as a function of what it reads: earlier columns by keys and values alone.

    Each is a leaf: `leaves`, the values of the earlier sites in this column, and `cache`, the tensors of
    `SpanGraph.cache` in the columns before.
    """

    value: Float[Tensor, "batch 1 width"]
    leaves: dict[Site, Float[Tensor, "batch 1 _"]]
    cache: list[Float[Tensor, "batch heads columns _"]]


class _Noting(Before):
    """A layer of a cache that notes the keys and values that a pass adds to it."""

    states: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.states = key_states, value_states
        return super().update(key_states, value_states)


class SpanGraph:
    """A later site's value as a function of earlier sites of a base run, in one autograd graph.

    `leaves` are the values of the earlier sites. Each is a leaf of the graph: the path from an earlier leaf to a
    later one is cut. Sites in `held` keep their values of the base run. `whole` is the target's value.
    """

    def __init__(self, base: KeptRun, leaves: Mapping[Site, Tensor], target: Site, held: Collection[Site] = ()) -> None:
        self.base, self.target = base, target
        self.leaves = {site: x.detach().requires_grad_() for site, x in leaves.items()}
        first = min(leaves, key=lambda site: site.order)
        way = base.way(first)
        self._skip = 0 if way == WAYS[-1] else first.enters
        self._fixed = {site: base.values[site] for site in held}
        if entry(first) not in leaves:
            self._fixed[entry(first)] = base.values[entry(first)]
        self._cache: Cache | None = DynamicCache() if way in ON_CACHE else None
        self._all = torch.arange(len(base.tokens), device=base.model.device)
        self._checked = False
        self._columns: dict[int, ColumnGraph] = {}
        self.whole = self._run(base.tokens, slice(None), self._cache)

    def column(self, p: int) -> Float[Tensor, "batch 1 width"]:
        """The target's value in column `p`; later blocks' queries and MLPs run at this column alone, where possible."""
        whole = self.whole[:, p : p + 1]
        if self._cache is None:
            return whole
        cache = cache_before([self._cache, self.base.cache_before(self._all, p)], self._all, p) if p else None
        alone = self._run(self.base.tokens.columns(p + 1), slice(p, p + 1), cache)
        if not is_close(alone.detach(), whole.detach()) or not (self._checked or self._same_gradients(alone, whole)):
            log.warning("%s: passes from a cache differ from whole passes, which are used", self.base.model.name)
            self._cache = None
            return whole
        self._checked = True
        return alone

    @property
    def cache(self) -> list[Float[Tensor, "batch heads pos _"]]:
        """The keys and values that depend on the leaves, layer by layer; none without a usable cache."""
        if self._cache is None:
            return []
        layers = [layer for layer in list[Any](self._cache.layers) if layer.is_initialized]
        return [x for layer in layers for x in (layer.keys, layer.values) if x is not None and x.requires_grad]

    def is_local(self) -> bool:
        """Whether keys and values depend on the leaves in their own column alone, as with one block in the span."""
        if not (cache := self.cache):
            return False
        noise = [torch.zeros_like(x) for x in cache]
        for x in noise:
            x[:, :, -1] = torch.randn(x[:, :, -1].shape, generator=torch.Generator().manual_seed(0)).to(x)
        leaves = list(self.leaves.values())
        gradients = _gradients(cache, leaves, noise)
        return all(gradient is None or not bool(gradient[:, :-1].any()) for gradient in gradients)

    def carried(
        self, site: Site, vectors: Float[Tensor, "batch columns n width"], first: int = 0
    ) -> Float[Tensor, "batch columns n size"]:
        """To first order, what vectors added to a leaf, each alone, change in a local `cache`, as by `flat_cache`.

        `first` is the column of the first vectors.

        These are Jacobian-vector products, as the derivative of a vector-Jacobian product by its vector.
        """
        leaf, cache = self._own_states(site, slice(first, first + vectors.shape[1]))
        with torch.enable_grad():
            weights = [torch.zeros_like(x, requires_grad=True) for x in cache]
            (pulled,) = _gradients(cache, [leaf], weights, create_graph=True)
            if pulled is None:
                return vectors.new_zeros(*vectors.shape[:3], flat_cache(cache).shape[-1])
            changes = batched_gradients(pulled, weights, vectors.to(leaf.dtype).movedim(2, 0))
        return flat_cache(changes).movedim(0, 2).to(vectors.dtype).contiguous()

    def _own_states(self, site: Site, columns: slice) -> tuple[Tensor, list[Tensor]]:
        """A leaf in some columns, and the keys and values of a local `cache` there as functions of it."""
        assert self._cache is not None, "is_local is false without a cache"
        leaves = {other: x[:, columns].detach().requires_grad_() for other, x in self.leaves.items()}
        known: list[Any] = [self._cache, self.base.cache_before(self._all, columns.start)]
        before = cache_before(known, self._all, columns.start, _Noting)
        self._run(self.base.tokens.columns(columns.stop), columns, before, leaves)
        states = [x for layer in list[Any](before.layers) for x in layer.states]
        return leaves[site], [x for x in states if x.requires_grad]

    def column_on_cache(self, p: int) -> ColumnGraph:
        """The target's value in column `p` as a function of the leaves there and of `cache` before it."""
        assert self._cache is not None, "is_local is false without a cache"
        if p in self._columns:
            return self._columns[p]
        held: list[Tensor] = []
        layers, kept = list[Any](), list[Any](self._cache.layers)
        for layer in kept:
            cut = SimpleNamespace(is_initialized=layer.is_initialized, keys=layer.keys, values=layer.values)
            for name in ("keys", "values"):
                if layer.is_initialized and (x := getattr(layer, name)).requires_grad:
                    held.append(x[:, :, :p].detach().requires_grad_())
                    setattr(cut, name, held[-1])
            layers.append(cut)
        leaves = {site: x[:, p : p + 1].detach().requires_grad_() for site, x in self.leaves.items()}
        known: list[Any] = [SimpleNamespace(layers=layers), self.base.cache_before(self._all, p)]
        value = self._run(
            self.base.tokens.columns(p + 1), slice(p, p + 1), cache_before(known, self._all, p) if p else None, leaves
        )
        self._columns[p] = ColumnGraph(value, leaves, held)
        return self._columns[p]

    def _same_gradients(self, alone: Tensor, whole: Tensor) -> bool:
        noise = torch.randn(whole.shape, generator=torch.Generator().manual_seed(0)).to(whole)
        leaves = list(self.leaves.values())
        ours, expected = (
            torch.autograd.grad(x, leaves, noise, retain_graph=True, allow_unused=True, materialize_grads=True)
            for x in (alone, whole)
        )
        return all(is_close(mine, theirs) for mine, theirs in zip(ours, expected, strict=True))

    def _run(
        self, tokens: Tokens, columns: slice, cache: Any, leaves: Mapping[Site, Tensor] | None = None
    ) -> Float[Tensor, "batch columns width"]:
        """The target's value in some columns; `leaves` are of these columns alone, None: those of the whole graph."""
        values = {site: x[:, columns] for site, x in self._fixed.items()}
        values |= leaves if leaves is not None else {site: x[:, columns] for site, x in self.leaves.items()}
        edits = {site: _set_to(x) for site, x in values.items()}
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # fused kernels have no batched backward pass
            if columns != slice(None):  # such graphs are compared with the whole one
                blocks = self.base.model.layout.blocks[self._skip : self.target.layer + 1]
                stack.enter_context(forwards_replaced(linear_activations(blocks)))
            start = columns.start or 0
            return run_to(self.base.model, tokens, edits, self.target, start, cache, self._skip)


def direct_gradients(
    base: KeptRun, leaves: Mapping[Site, Tensor], held: Collection[Site], readout: Readout
) -> dict[Site, Float[Tensor, "batch pos _"]]:
    """Gradients of a metric at sites of a base run, each site's later ones among `leaves` and `held` being fixed."""
    at = {site: x.detach().requires_grad_() for site, x in leaves.items()}
    first = min(at, key=lambda site: site.order)
    fixed = {site: base.values[site] for site in held}
    if entry(first) not in at:
        fixed[entry(first)] = base.values[entry(first)]
    edits = {site: _set_to(x) for site, x in (fixed | at).items()}
    skip = 0 if base.way(first) == WAYS[-1] else first.enters
    with torch.enable_grad(), readout.running(base.model):
        with skip_blocks(base.model.layout, skip), edit_sites(base.model.layout, edits):
            metric = readout(base.model.call(base.tokens, last=True)[:, -1])
        if not metric.requires_grad:
            raise UserError(f"{metric_name(readout.metric)} has no gradient: use a smooth metric, or patch exactly")
        return dict(
            zip(
                at,
                torch.autograd.grad(metric.sum(), list(at.values()), allow_unused=True, materialize_grads=True),
                strict=True,
            )
        )


def _set_to(value: Tensor) -> Edit:
    return lambda x: value.to(x.device)


def _gradients(
    values: Sequence[Tensor], wanted: Sequence[Tensor], cotangents: Sequence[Tensor], **options: bool
) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(values, wanted, cotangents, retain_graph=True, allow_unused=True, **options)


def batched_gradients(value: Tensor, wanted: Sequence[Tensor], cotangents: Float[Tensor, "n ..."]) -> list[Tensor]:
    """A vector-Jacobian product for each of `n` cotangents; zeros where the value does not depend on a tensor."""
    gradients = _gradients([value], wanted, [cotangents], is_grads_batched=True)
    return [
        x.new_zeros(len(cotangents), *x.shape) if gradient is None else gradient
        for x, gradient in zip(wanted, gradients, strict=True)
    ]


def flat_cache(tensors: Sequence[Float[Tensor, "*batch heads pos _"]]) -> Float[Tensor, "*batch pos size"]:
    """Keys and values of all heads and layers, one vector a position."""
    return torch.cat([x.transpose(-3, -2).flatten(-2) for x in tensors], -1)


def is_close(ours: Tensor, expected: Tensor) -> bool:
    tolerance = 1e-4 if expected.dtype == torch.float32 else 5e-2
    return bool((ours - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-6))
