"""Gradients of a metric at the sites of a base run, taken in the ways that attribution can be made from."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saepatch.data.batches import PairBatch
from saepatch.engine.components import Changes
from saepatch.engine.kept_run import KeptRun, entry
from saepatch.engine.metrics import Metric, answers_only, checked, metric_name, needs_clean_logits
from saepatch.engine.shortcuts import quick_activations
from saepatch.errors import UserError
from saepatch.model.hooks import (
    Dropped,
    droppable_blocks,
    edit_sites,
    forwards_replaced,
    graph_through,
    only_logits_of,
    skip_blocks,
)
from saepatch.model.language_model import LanguageModel, Tokens, refuse_training
from saepatch.model.sites import Site

PRODUCTS = 2**22  # numbers in the vectors that are multiplied with gradients at a time


@dataclass(frozen=True, eq=False)
class Readout:
    """A metric of a batch, and the vocabulary ids whose logits it needs (None: all of them)."""

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
        """The metric of next-token logits, those of all the vocabulary or of the ids that are needed.

        Raises:
            UserError: it is NaN, or not one value an example.
        """
        logits = logits.to(self.part.answer.device)  # a model may be spread over several
        if self.only is not None and logits.shape[-1] != len(self.only):
            logits = logits[:, self.only]
        value = checked(self.metric, logits, self.part)
        if bool(value.isnan().any()):
            example = self.part.pairs[int(value.isnan().int().argmax())].example
            raise UserError(f"the metric {metric_name(self.metric)} is NaN for pair {example!r}: look at the pair")
        return value

    @contextmanager
    def running(self, model: LanguageModel) -> Iterator[None]:
        """Let passes over the model compute what the metric needs, and slow activations in one kernel."""
        with ExitStack() as stack:
            if self.only is not None:
                stack.enter_context(only_logits_of(model.hf, self.only))
            if model.dtype == torch.float32:  # in a narrower type the one kernel rounds otherwise than the model does
                stack.enter_context(forwards_replaced(quick_activations(model.layout.blocks)))
            yield


@dataclass(frozen=True, eq=False)
class Gradients:
    """The metric of the base run, what its sites hold, and gradients at each of them.

    Estimates are products with the one gradient; with `absolute`, the mean of their sizes over several.
    """

    metric: Float[Tensor, "batch"]
    values: Mapping[Site, Tensor]
    of: Mapping[Site, Float[Tensor, "takes batch pos width"]]
    absolute: bool = False


def products_of(changes: Changes, gradients: Float[Tensor, "takes batch pos width"]) -> Float[Tensor, "takes nodes"]:
    """Gradients along each change; vectors are made for some changes at a time."""
    a_chunk = max(1, PRODUCTS // gradients.shape[-1])
    out = gradients.new_empty(len(gradients), len(changes))
    for start in range(0, len(changes), a_chunk):
        some = torch.arange(start, min(start + a_chunk, len(changes)), device=changes.row.device)
        vectors = changes.vectors(some).to(gradients.dtype)
        for take, gradient in enumerate(gradients):
            here = gradient[changes.row[some], changes.pos[some]]
            out[take, some] = torch.linalg.vecdot(vectors, here)
    return out


class Base:
    """The base run of a batch. It is run by the method that takes gradients, so that one forward pass may do.

    `run` is given where a corruption made the base run: gradients are then taken from where the first site was left.
    """

    def __init__(
        self, model: LanguageModel, tokens: Tokens, sites: Sequence[Site], readout: Readout, run: KeptRun | None = None
    ) -> None:
        refuse_training(model)
        self.model, self.tokens, self.readout, self._given = model, tokens, readout, run
        # gradients start at the first, so that all others have to come after it
        self.sites = sorted(sites, key=lambda site: site.order)

    def graph(self, droppable: Sequence[int] = ()) -> tuple[Float[Tensor, "batch"], dict[Site, Tensor], Dropped]:
        """One forward pass with a graph from the first site on: the metric, the sites' values, and the blocks' switch.

        Raises:
            UserError: a corruption acts after the first site.
        """
        layout = self.model.layout
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self.readout.running(self.model))
            dropped = stack.enter_context(droppable_blocks(layout, droppable))
            if self._given is not None:
                stack.enter_context(self._from(self.sites[0], self._given, self._given.values[self.sites[0]]))
            held = stack.enter_context(graph_through(layout, self.sites))
            metric = self.readout(self.model.call(self.tokens, last=True)[:, -1])
        if self._given is not None:
            expected = self.readout(self._given.logits)
            if not torch.allclose(metric.detach(), expected, rtol=1e-2, atol=1e-3):
                raise UserError(
                    f"the corruption acts after {self.sites[0]}, where gradients start: "
                    "attribute at later sites, or patch exactly"
                )
        return metric, held, dropped

    @contextmanager
    def _from(self, site: Site, run: KeptRun, x: Tensor) -> Iterator[None]:
        """Start passes at a site, set to `x`; what else enters its block is the run's own."""
        layout, starts = self.model.layout, {entry(site): run.values[entry(site)], site: x}
        with (
            skip_blocks(layout, site.enters),
            edit_sites(layout, {at: lambda x, value=value: value.to(x.device) for at, value in starts.items()}),  # type: ignore[misc]
        ):
            yield

    @torch.no_grad()
    def plain(self) -> KeptRun:
        """The run without a graph."""
        if self._given is None:
            with self.readout.running(self.model):
                self._given = KeptRun(self.model, self.tokens, self.sites, keep_cache=False)
        return self._given

    def gradient_at(self, site: Site, x: Float[Tensor, "batch pos _"]) -> Float[Tensor, "batch pos _"]:
        """Gradient at a site where it holds `x` and all before it is as in the base run; earlier blocks are skipped."""
        leaf = x.detach().requires_grad_()
        with torch.enable_grad(), self.readout.running(self.model), self._from(site, self.plain(), leaf):
            metric = self.readout(self.model.call(self.tokens, last=True)[:, -1])
            return self.backward(metric, [leaf])[0]

    def backward(self, metric: Float[Tensor, "batch"], at: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Gradients of the metric's sum, which are those of each example, for examples do not mix. Graphs are kept.

        Raises:
            UserError: the metric has no gradient.
        """
        if not at:
            return ()
        if not metric.requires_grad:
            raise UserError(
                f"{metric_name(self.readout.metric)} has no gradient: use a smooth metric, or patch exactly"
            )
        return torch.autograd.grad(metric.sum(), at, retain_graph=True, allow_unused=True, materialize_grads=True)


@runtime_checkable
class Method(Protocol):
    """A way to take gradients: `FirstOrder`, `IntegratedGradients` or `GradDrop`."""

    @property
    def name(self) -> str: ...
    def take(self, base: Base, source: Mapping[Site, Tensor], where: Bool[Tensor, "batch pos"]) -> Gradients:
        """Gradients at every site of the base run; `source` is what the sites are patched with, `where` is where."""
        ...


@dataclass(frozen=True)
class FirstOrder:
    """The gradient at the base run: attribution patching (Nanda 2023; Syed, Rager and Conmy 2023).

    One backward pass. Blind where the metric is flat at the base run, and where paths cancel.
    """

    @property
    def name(self) -> str:
        return "first order"

    def take(self, base: Base, source: Mapping[Site, Tensor], where: Bool[Tensor, "batch pos"]) -> Gradients:
        metric, held, _ = base.graph()
        gradients = base.backward(metric, list(held.values()))
        return Gradients(
            metric.detach(),
            {site: x.detach() for site, x in held.items()},
            {site: g[None] for site, g in zip(held, gradients, strict=True)},
        )


@dataclass(frozen=True)
class IntegratedGradients:
    """The mean gradient at the midpoints of `steps` equal parts of the way from the base to the source run's site.

    Sundararajan, Taly and Yan 2017; on latents, Marks et al. 2024. Each site goes its own way while the others follow
    from it. Latents and error term of a site together approach `m(site patched) − m(base)` as `steps` grows
    (completeness). `steps` passes through the later blocks a site, each way.
    """

    steps: int = 10

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"{self.steps} steps: integrate over at least 1")

    @property
    def name(self) -> str:
        return f"integrated gradients ({self.steps})"

    def take(self, base: Base, source: Mapping[Site, Tensor], where: Bool[Tensor, "batch pos"]) -> Gradients:
        run = base.plain()
        means = {}
        for site in base.sites:
            start = run.values[site]
            wide = torch.promote_types(start.dtype, torch.float32)  # steps in bfloat16 would be steps of its rounding
            way = (source[site].to(wide) - start.to(wide)) * where[..., None]
            mean = torch.zeros_like(way)
            for step in range(self.steps):
                x = start + (step + 0.5) / self.steps * way
                mean += base.gradient_at(site, x.to(start.dtype)) / self.steps
            means[site] = mean[None]
        return Gradients(base.readout(run.logits), {site: run.values[site] for site in base.sites}, means)


@dataclass(frozen=True)
class GradDrop:
    """Gradients that leave out each later block in turn: a guard against paths that cancel (AtP*, Kramár et al. 2024).

    For each block after the site, which then passes gradients on past itself (`out = in + stopgrad(out − in)`), the
    size of the estimate; their mean. One forward pass and a backward pass for each block. Behind the last block, where
    nothing is left to drop, the size of the first-order estimate. Sizes say where to look, not which way effects go.
    """

    @property
    def name(self) -> str:
        return "graddrop"

    def take(self, base: Base, source: Mapping[Site, Tensor], where: Bool[Tensor, "batch pos"]) -> Gradients:
        n_layers = base.model.n_layers
        later = {site: range(_after(site), n_layers) for site in base.sites}
        metric, held, dropped = base.graph(range(min(_after(site) for site in base.sites), n_layers))
        by_site: dict[Site, list[Tensor]] = {site: [] for site in held}
        for layer in (None, *range(n_layers)):
            dropped.layer = layer
            # with no block dropped, the sites behind the last block
            sites = [site for site in held if (layer in later[site] if layer is not None else not later[site])]
            for site, g in zip(sites, base.backward(metric, [held[site] for site in sites]), strict=True):
                by_site[site].append(g)
        return Gradients(
            metric.detach(),
            {site: x.detach() for site, x in held.items()},
            {site: torch.stack(each) for site, each in by_site.items()},
            absolute=True,
        )


def _after(site: Site) -> int:
    """The first block all of which comes after the site."""
    return site.layer + (site.stream != "resid_pre")
