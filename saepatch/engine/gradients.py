"""Gradients of a metric at the sites of a base run, by each method of attribution."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saepatch.data.batches import PairBatch
from saepatch.engine.components import Changes
from saepatch.engine.metrics import Metric, answers_only, checked, metric_name, needs_clean_logits
from saepatch.engine.passes.kept_run import ON_CACHE, WAYS, KeptRun, entry
from saepatch.engine.passes.pieces import runs_in_pieces
from saepatch.engine.passes.shortcuts import quick_activations
from saepatch.errors import UserError, reason_of
from saepatch.model.finite import check_finite
from saepatch.model.hooks import Dropped, droppable_blocks, edit_sites, graph_through
from saepatch.model.language_model import LanguageModel, Tokens, refuse_training
from saepatch.model.replaced import forwards_replaced, only_logits_of, skip_blocks
from saepatch.model.sites import Site

PRODUCTS = 2**22  # numbers in the vectors multiplied with gradients at a time


@dataclass(frozen=True, eq=False)
class Readout:
    """A metric on a batch, and the vocabulary ids whose logits it needs (None: all)."""

    metric: Metric
    part: PairBatch
    only: Int[Tensor, "some"] | None = None

    @classmethod
    def of(cls, metric: Metric, part: PairBatch, model: LanguageModel) -> "Readout":
        if needs_clean_logits(metric) and part.clean_logits is None:
            with torch.no_grad():
                part = replace(part, clean_logits=model.next_logits(part.clean))
        if not answers_only(metric):
            return cls(metric, part)
        only, places = torch.unique(torch.stack([part.answer, part.counter]), return_inverse=True)
        return cls(metric, replace(part, answer=places[0], counter=places[1]), only)

    def __call__(self, logits: Float[Tensor, "batch logits"]) -> Float[Tensor, "batch"]:
        """The metric of next-token logits, over the whole vocabulary or only the needed ids.

        Raises:
            UserError: a value is NaN, or there is not one value per example.
        """
        logits = logits.to(self.part.answer.device)  # a model may be spread over several
        if self.only is not None and logits.shape[-1] != len(self.only):
            logits = logits[:, self.only]
        value = checked(self.metric, logits, self.part)
        if bool(value.isnan().any()):
            example = self.part.pairs[int(value.isnan().int().argmax())].example
            raise UserError(f"the metric {metric_name(self.metric)} is NaN for pair {example!r}: check the pair")
        return value

    @contextmanager
    def running(self, model: LanguageModel) -> Iterator[None]:
        """Let passes unembed only the logits that the metric needs, and compute slow activations in one kernel."""
        with ExitStack() as stack:
            if self.only is not None:
                stack.enter_context(only_logits_of(model.hf, self.only))
            if model.dtype == torch.float32:  # in a narrower dtype the fused kernel rounds differently from the model
                stack.enter_context(forwards_replaced(quick_activations(model.layout.blocks)))
            yield


@dataclass(frozen=True, eq=False)
class Gradients:
    """The metric of the base run, the values of its sites, and gradients at each of them.

    Estimates are products with the single gradient; with `absolute`, the mean absolute product over several.
    """

    metric: Float[Tensor, "batch"]
    values: Mapping[Site, Tensor]
    of: Mapping[Site, Float[Tensor, "takes batch pos width"]]
    absolute: bool = False


def products_of(changes: Changes, gradients: Float[Tensor, "takes batch pos width"]) -> Float[Tensor, "takes nodes"]:
    """Products of each change with the gradient at its position; vectors are made for a chunk of changes at a time."""
    chunk = max(1, PRODUCTS // gradients.shape[-1])
    out = gradients.new_empty(len(gradients), len(changes))
    for start in range(0, len(changes), chunk):
        some = torch.arange(start, min(start + chunk, len(changes)), device=changes.row.device)
        vectors = changes.vectors(some).to(gradients.dtype)
        for take, gradient in enumerate(gradients):
            here = gradient[changes.row[some], changes.pos[some]]
            out[take, some] = torch.linalg.vecdot(vectors, here)
    return out


class Base:
    """The base run of a batch. The gradient method runs it, so that a single forward pass may suffice.

    `run` is given where a corruption made the base run: the pass with gradients then starts from the first site's value
    in that run.
    """

    def __init__(
        self, model: LanguageModel, tokens: Tokens, sites: Sequence[Site], readout: Readout, run: KeptRun | None = None
    ) -> None:
        refuse_training(model)
        self.model, self.tokens, self.readout, self._run, self._given = model, tokens, readout, run, run
        self._skips: dict[Site, int] = {}
        # the graph starts at the first site, so the others must come after it
        self.sites = sorted(sites, key=lambda site: site.order)

    def graph(self, droppable: Sequence[int] = ()) -> tuple[Float[Tensor, "batch"], dict[Site, Tensor], Dropped]:
        """One forward pass with a graph from the first site on: the metric, the sites' values, and the block to drop.

        Raises:
            UserError: the corruption acts after the first site.
        """
        layout = self.model.layout
        skipped = 0 if self._run is None else self._skipped(self.sites[0])
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self.readout.running(self.model))
            dropped = stack.enter_context(droppable_blocks(layout, droppable))
            if self._run is not None:
                stack.enter_context(self._from(self.sites[0], self._run, self._run.values[self.sites[0]], skipped))
            emitted = stack.enter_context(graph_through(layout, self.sites))
            logits = self.model.call(self.tokens, last=True)[:, -1]
            for site, x in emitted.items():
                check_finite(self.model, site, x.detach().to(self.model.device), self.tokens)
            metric = self.readout(logits)
        if self._run is not None:
            expected = self.readout(self._run.logits)
            if not torch.allclose(metric.detach(), expected, rtol=1e-2, atol=1e-3):
                raise UserError(
                    f"the corruption acts after {self.sites[0]}, where gradients start: "
                    "attribute at later sites, or patch exactly"
                )
        return metric, emitted, dropped

    def in_pieces(
        self, x: Mapping[Site, Tensor] | None = None, sites: Sequence[Site] | None = None
    ) -> tuple[Tensor, dict[Site, Tensor], dict[Site, Tensor]] | None:
        """The metric, values and gradients of a long prompt, in pieces; None: the pass has to run whole.

        With `x`, the site that it names is set to it, and the gradient there is wanted; with `sites`, those there (by
        default at all sites).
        """
        sites = sites or self.sites
        first = next(iter(x)) if x else sites[0]
        if not runs_in_pieces(self.model, self.tokens.width) or (self._run is not None and not self._run.has_cache):
            return None
        run = self.plain()
        if run.way(first) not in ON_CACHE:
            return None
        rows = torch.arange(len(self.tokens), device=self.model.device)
        pieces, starts = run.pieces(first, rows), {entry(first): run.values[entry(first)], first: run.values[first]}
        with self.readout.running(self.model):
            if x is None:
                return pieces.gradients(starts, sites, self.readout, run.cache_layers[first.enters :])
            starts |= x
            return pieces.gradients(starts, [first], self.readout, pieces.logits(starts)[1])

    @contextmanager
    def _from(self, site: Site, run: KeptRun, x: Tensor, skipped: int) -> Iterator[None]:
        """Start passes at a site, set to `x`; the residual stream entering its block is that of the run."""
        layout, starts = self.model.layout, {entry(site): run.values[entry(site)], site: x}
        with (
            skip_blocks(layout, skipped),
            edit_sites(layout, {s: lambda x, value=value: value.to(x.device) for s, value in starts.items()}),  # type: ignore[misc]
        ):
            yield

    @torch.no_grad()
    def _skipped(self, site: Site) -> int:
        """Number of blocks that a pass from a site on leaves out; 0 where blocks hand on more than the stream."""
        if site not in self._skips:
            run = self._given
            if run is None:
                row = int(self.tokens.lengths.argmin())
                run = KeptRun(self.model, self.tokens.rows([row]), [site], keep_cache=False)
            self._skips[site] = 0 if run.way(site) == WAYS[-1] else site.enters
        return self._skips[site]

    @torch.no_grad()
    def plain(self) -> KeptRun:
        """The run without a graph."""
        if self._run is None:
            with self.readout.running(self.model):
                long = runs_in_pieces(self.model, self.tokens.width)
                self._run = KeptRun(self.model, self.tokens, self.sites, keep_cache=long)
        return self._run

    def gradient_at(self, site: Site, x: Float[Tensor, "batch pos _"]) -> Float[Tensor, "batch pos _"]:
        """Gradient at a site set to `x`, with everything before it as in the base run; earlier blocks are skipped."""
        return self.value_and_gradient_at(site, x)[1]

    def value_and_gradient_at(
        self, site: Site, x: Float[Tensor, "batch pos _"]
    ) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch pos _"]]:
        """The metric with a site set to `x`, and the gradient there (see `gradient_at`)."""
        if (long := self.in_pieces({site: x})) is not None:
            return long[0], long[2][site]
        leaf, skipped = x.detach().requires_grad_(), self._skipped(site)
        with torch.enable_grad(), self.readout.running(self.model), self._from(site, self.plain(), leaf, skipped):
            metric = self.readout(self.model.call(self.tokens, last=True)[:, -1])
            return metric.detach(), self.backward(metric, [leaf])[0]

    def backward(self, metric: Float[Tensor, "batch"], at: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Gradients of the metric's sum; since examples do not interact, each row is its example's gradient.

        The graph is retained.

        Raises:
            UserError: the metric has no gradient, or the model gives none.
        """
        if not at:
            return ()
        if not metric.requires_grad:
            raise UserError(
                f"{metric_name(self.readout.metric)} has no gradient: use a smooth metric, or patch exactly, where the "
                "model gives none (as some quantised ones)"
            )
        try:
            taken = torch.autograd.grad(metric.sum(), at, retain_graph=True, allow_unused=True, materialize_grads=True)
            return tuple(gradient.to(self.model.device) for gradient in taken)  # a model may be spread over several
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # some models change in place what gradients need
            raise UserError(
                f"{self.model.name} gives no gradients ({reason_of(error)}): patch exactly instead"
            ) from error


@runtime_checkable
class Method(Protocol):
    """A way to take gradients: `FirstOrder`, `IntegratedGradients` or `GradDrop`."""

    @property
    def name(self) -> str: ...
    def take(self, base: Base, source: Mapping[Site, Tensor], where: Mapping[Site, Tensor]) -> Gradients:
        """Gradients at every site of the base run; `source` are their source values, `where` their positions."""
        ...


@dataclass(frozen=True)
class FirstOrder:
    """The gradient at the base run: attribution patching (Nanda 2023; Syed, Rager and Conmy 2023).

    One backward pass. It misses effects where the metric is flat at the base run, and where paths cancel.
    """

    @property
    def name(self) -> str:
        return "first order"

    def take(self, base: Base, source: Mapping[Site, Tensor], where: Mapping[Site, Tensor]) -> Gradients:
        if (long := base.in_pieces()) is not None:
            return Gradients(long[0], long[1], {site: gradient[None] for site, gradient in long[2].items()})
        metric, emitted, _ = base.graph()
        gradients = base.backward(metric, list(emitted.values()))
        return Gradients(
            metric.detach(),
            {site: x.detach().to(base.model.device) for site, x in emitted.items()},
            {site: g[None] for site, g in zip(emitted, gradients, strict=True)},
        )


@dataclass(frozen=True)
class IntegratedGradients:
    """The mean gradient at the midpoints of `steps` equal steps from the base to the source run's value of a site.

    Sundararajan, Taly and Yan 2017; on latents, Marks et al. 2024. Each site is interpolated separately, and later
    sites follow from it. The estimates of a site's latents and error term sum to `m(site patched) − m(base)` as `steps`
    grows (completeness). Cost: `steps` forward and backward passes through the later blocks per site.
    """

    steps: int = 10

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps = {self.steps}: use at least 1")

    @property
    def name(self) -> str:
        return f"integrated gradients ({self.steps})"

    def take(self, base: Base, source: Mapping[Site, Tensor], where: Mapping[Site, Tensor]) -> Gradients:
        run = base.plain()
        means = {}
        for site in base.sites:
            start = run.values[site]
            wide = torch.promote_types(start.dtype, torch.float32)  # bfloat16 would round the steps away
            difference = (source[site].to(wide) - start.to(wide)) * where[site][..., None]
            mean = torch.zeros_like(difference)
            for step in range(self.steps):
                x = start + (step + 0.5) / self.steps * difference
                mean += base.gradient_at(site, x.to(start.dtype)) / self.steps
            means[site] = mean[None]
        return Gradients(base.readout(run.logits), {site: run.values[site] for site in base.sites}, means)


@dataclass(frozen=True)
class GradDrop:
    """Gradients that drop each later block in turn: a guard against cancelling paths (AtP*, Kramár et al. 2024).

    The estimate is the mean absolute first-order estimate over later blocks, each dropped in turn
    (`out = in + stopgrad(out − in)`): one forward pass, and one backward pass per block (for long prompts, which run in
    pieces, as many forward passes). After the last block, where no block is left to drop, it is the absolute
    first-order estimate. Estimates are magnitudes, without a sign.
    """

    @property
    def name(self) -> str:
        return "graddrop"

    def take(self, base: Base, source: Mapping[Site, Tensor], where: Mapping[Site, Tensor]) -> Gradients:
        if (long := self._in_pieces(base)) is not None:
            return long
        metric, emitted, dropped = base.graph(range(min(map(_after, base.sites)), base.model.n_layers))
        by_site: dict[Site, list[Tensor]] = {site: [] for site in emitted}
        for layer, sites in self._drops(base):
            dropped.layer = layer
            for site, g in zip(sites, base.backward(metric, [emitted[site] for site in sites]), strict=True):
                by_site[site].append(g)
        return Gradients(
            metric.detach(),
            {site: x.detach().to(base.model.device) for site, x in emitted.items()},
            {site: torch.stack(gradients) for site, gradients in by_site.items()},
            absolute=True,
        )

    @staticmethod
    def _drops(base: Base) -> list[tuple[int | None, list[Site]]]:
        """Each block to drop, with the sites before it; None: no block, for the sites after the last one."""
        blocks = range(base.model.n_layers)
        last = [site for site in base.sites if _after(site) not in blocks]
        drops = [(layer, [site for site in base.sites if _after(site) <= layer]) for layer in blocks]
        return [(layer, sites) for layer, sites in [(None, last), *drops] if sites]

    def _in_pieces(self, base: Base) -> Gradients | None:
        """Of a long prompt: a pass in pieces for each dropped block; None: the pass has to run whole."""
        values: dict[Site, Tensor] = {}
        by_site: dict[Site, list[Tensor]] = {site: [] for site in base.sites}
        for layer, sites in self._drops(base):
            with droppable_blocks(base.model.layout, [] if layer is None else [layer]) as dropped:
                dropped.layer = layer
                if (long := base.in_pieces(sites=sites)) is None:
                    return None
            metric = long[0]
            values |= long[1]
            for site, gradient in long[2].items():
                by_site[site].append(gradient)
        return Gradients(metric, values, {site: torch.stack(g) for site, g in by_site.items()}, absolute=True)


def _after(site: Site) -> int:
    """The first block that lies entirely after the site."""
    return site.layer + (site.stream != "resid_pre")
