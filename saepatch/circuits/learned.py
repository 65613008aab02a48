"""Learned alignments of a causal variable, as baselines: DAS (a rotation) and DBM (a mask over given units).

An interchange writes a part of the source run's value of a site into the base run, and succeeds where the model then
prefers the source's answer. DAS learns which subspace that part is: `h' = h_b + (h_s − h_b) B Bᵀ` with B orthonormal
(Geiger et al. 2024, https://arxiv.org/abs/2303.02536). DBM learns a mask over latents, principal components, neurons or
dimensions: `h' = h_b + Σ m_i (u_s − u_b)_i r_i` (De Cao et al. 2020; Davies et al. 2023); of latents, the error term
stays the base's. Learn on some pairs and report on others, beside the controls of `alignment_controls`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saepatch.data.batches import PairBatch, same_length_batches
from saepatch.data.pairs import PromptPair
from saepatch.engine.chosen import chosen_pairs, known_where
from saepatch.engine.components import Component, Directions, LatentUnits, Stream
from saepatch.engine.edited_runs import metric_values
from saepatch.engine.gradients import Base, Readout
from saepatch.engine.metrics import DeclaredMetric, logit_difference
from saepatch.engine.passes.kept_run import KeptRun
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading.load import wrap_model
from saepatch.model.positions import Positions
from saepatch.model.sites import Site
from saepatch.records.statistics import Interval, wilson_share

COLDEST = 0.02  # temperature of masks at the end
AT_ONCE = 64  # pairs in a batch


@dataclass(frozen=True)
class LearningOptions:
    """Options of `fit_das` and `fit_dbm`.

    Attributes:
        positions: Where the interchange happens, in both prompts alike.
        steps: Passes over all pairs.
        rate: Learning rate of Adam.
        sparsity: For masks, the cost of each exchanged unit, in nats.
        seed: Seed of the start.
    """

    positions: Positions = "last"
    steps: int = 100
    rate: float = 0.05
    sparsity: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.rate > 0 or self.sparsity < 0:
            raise UserError(
                f"steps = {self.steps}, rate = {self.rate}, sparsity = {self.sparsity}: use at least 1, above 0 and at "
                "least 0"
            )


@dataclass(frozen=True, eq=False)
class Alignment:
    """What an interchange exchanges at a site: coordinates along `rows`, the values of `component` times `mask`.

    For DAS, `component` is the subspace, as orthonormal `Directions`, and the mask is 1. `loss` is the mean loss of
    each step, in nats.
    """

    component: Component
    mask: Float[Tensor, "units"]
    positions: Positions
    loss: tuple[float, ...] = ()

    @property
    def units(self) -> list[int]:
        """The units that are exchanged."""
        return self.mask.nonzero().flatten().tolist()

    def exchanged(
        self, base: Float[Tensor, "batch pos width"], source: Float[Tensor, "batch pos width"]
    ) -> Float[Tensor, "batch pos width"]:
        """The base's value with the part of the source's."""
        return base + _change(self.component, self.mask, base, source).to(base.dtype)

    def accuracy(self, model: LanguageModel, pairs: Sequence[PromptPair]) -> Interval:
        """Share of interchanges after which the source's answer has the larger logit, both ways of every pair."""
        hits = []
        with torch.no_grad():
            for part, base, source, where in _runs(model, self.component, both_ways(pairs), self.positions):
                x, other = base.values[self.component.site], source.values[self.component.site]
                new = torch.where(where[..., None], self.exchanged(x, other), x)
                rows = torch.arange(len(part), device=x.device)
                logits = base.resume(self.component.site, rows, 0, (new - x).to(torch.float32))
                hits.append(metric_values(logit_difference, logits, part) > 0)
        return wilson_share(np.concatenate(hits).astype(float))


def _rows(component: Component, x: Tensor) -> Float[Tensor, "units width"]:
    if isinstance(component, LatentUnits):
        rows = component.dictionary.rows if component.ids is None else component.dictionary.rows[list(component.ids)]
    elif isinstance(component, Directions):
        rows = component.rows
    elif isinstance(component, Stream):
        rows = torch.eye(x.shape[-1])
    else:
        raise UserError(
            f"{type(component).__name__} has no units with a direction each: use latents, Directions, Stream"
        )
    return rows.to(x.device, torch.float32)


def _change(
    component: Component, mask: Float[Tensor, "units"], base: Tensor, source: Tensor
) -> Float[Tensor, "batch pos width"]:
    values = component.read(source).float() - component.read(base).float()
    return (values * mask.to(values.device)) @ _rows(component, base)


def both_ways(pairs: Sequence[PromptPair]) -> list[PromptPair]:
    """Every pair, and every pair with its prompts and answers exchanged."""
    return [*pairs, *(PromptPair(p.corrupted, p.clean, p.counter, p.answer, p.example) for p in pairs)]


def _runs(
    model: LanguageModel, component: Component, pairs: Sequence[PromptPair], positions: Positions
) -> Iterator[tuple[PairBatch, KeptRun, KeptRun, Bool[Tensor, "batch pos"]]]:
    """The base run (of the corrupted prompts), the source run, and where they are exchanged, batch by batch."""
    component.check(model)
    whole = chosen_pairs(model, [component], pairs, positions)
    for part in same_length_batches(whole, AT_ONCE):
        base, source = (KeptRun(model, tokens, [component.site]) for tokens in (part.corrupted, part.clean))
        yield part, base, source, known_where(model, component, part)


@partial(DeclaredMetric, answers_only=True)
def answer_wins(logits: Float[Tensor, "batch vocab"], batch: PairBatch) -> Float[Tensor, "batch"]:
    """Log-probability of the answer where answer and counter-answer are the only choices."""
    return nn.functional.logsigmoid(logit_difference(logits, batch))


def fit_das(
    model: LanguageModel,
    site: Site | str,
    pairs: Sequence[PromptPair],
    rank: int = 1,
    how: LearningOptions | None = None,
) -> Alignment:
    """Learn the subspace of a site in which an interchange gives the source's answer, on both ways of every pair.

    Raises:
        UserError: the site does not exist, the rank is not 1 to its width, or pairs are not aligned.
    """
    how, at = how or LearningOptions(), Site.parse(site) if isinstance(site, str) else site
    width = model.width(at)
    if not 1 <= rank <= width:
        raise UserError(f"rank = {rank}: use 1 to {width}, the width of {at}")
    free = _start(model, at, pairs, rank, how).requires_grad_()

    def exchange(base: Tensor, source: Tensor, _: float) -> Tensor:
        basis = torch.linalg.qr(free)[0].to(base.device)
        return (source - base).float() @ basis @ basis.T

    losses = _learn(model, Stream(at), pairs, how, [free], exchange, lambda _: torch.zeros(()))
    rows = torch.linalg.qr(free.detach())[0].T.contiguous()
    return Alignment(Directions(at, rows, f"DAS of rank {rank}"), torch.ones(rank), how.positions, losses)


@torch.no_grad()
def _start(
    model: LanguageModel, site: Site, pairs: Sequence[PromptPair], rank: int, how: LearningOptions
) -> Float[Tensor, "width rank"]:
    """Random combinations of the differences between runs: directions in which nothing differs are never learned."""
    runs = _runs(model, Stream(site), pairs, how.positions)
    differences = torch.cat([(s.values[site] - b.values[site])[where].float().cpu() for _, b, s, where in runs])
    generator = torch.Generator().manual_seed(how.seed)
    start = differences.T @ torch.randn(len(differences), rank, generator=generator)
    return start + 1e-3 * start.abs().max() * torch.randn(start.shape, generator=generator)  # of full rank


def fit_dbm(
    model: LanguageModel, component: Component, pairs: Sequence[PromptPair], how: LearningOptions | None = None
) -> Alignment:
    """Learn which units of a component to exchange, as few as give the source's answer, both ways of every pair.

    The mask is sigmoid(θ / T), with T falling to `COLDEST`; in the end, units with θ above 0 are exchanged. They
    are latents (`LatentUnits`), principal components or other `Directions`, or the dimensions of a `Stream` (of
    `neurons.L`, single neurons).

    Raises:
        UserError: the component has no such units or does not fit the model, or pairs are not aligned.
    """
    how = how or LearningOptions()
    units = component.units if isinstance(component, LatentUnits | Directions) else model.width(component.site)
    theta = torch.zeros(units, requires_grad=True)

    def mask(temperature: float) -> Tensor:
        return torch.sigmoid(theta / temperature)

    def exchange(base: Tensor, source: Tensor, temperature: float) -> Tensor:
        return _change(component, mask(temperature), base, source)

    losses = _learn(model, component, pairs, how, [theta], exchange, lambda t: how.sparsity * mask(t).sum())
    return Alignment(component, (theta.detach() > 0).float(), how.positions, losses)


@torch.inference_mode(False)
def _learn(
    model: LanguageModel,
    component: Component,
    pairs: Sequence[PromptPair],
    how: LearningOptions,
    parameters: list[Tensor],
    exchange: Callable[[Tensor, Tensor, float], Tensor],
    cost: Callable[[float], Tensor],
) -> tuple[float, ...]:
    """Maximise the mean log-probability of the source's answer, minus a cost; the loss of each step."""
    optimiser, site, losses = torch.optim.Adam(parameters, lr=how.rate), component.site, []
    listed = both_ways(pairs)
    batches = list(_runs(model, component, listed, how.positions))
    for step in range(how.steps):
        temperature = COLDEST ** (step / max(1, how.steps - 1))
        optimiser.zero_grad()
        total = 0.0
        for part, base, source, where in batches:
            x, other = base.values[site], source.values[site]
            with torch.enable_grad():
                new = x + (exchange(x, other, temperature) * where[..., None]).to(x.dtype)
            run = Base(model, part.corrupted, [site], Readout.of(answer_wins, part, model), base)
            value, gradient = run.value_and_gradient_at(site, new)
            with torch.enable_grad():
                (-(new * gradient).sum() / len(listed)).backward()
            total -= float(value.sum()) / len(listed)
        with torch.enable_grad():
            extra = cost(temperature)
            if extra.requires_grad:
                extra.backward()
        optimiser.step()
        losses.append(total + float(extra.detach()))
    return tuple(losses)


def with_random_labels(pairs: Sequence[PromptPair], seed: int = 0) -> list[PromptPair]:
    """Pairs of which a random half have their answers exchanged: what is learned from them is chance on others."""
    flipped = np.random.default_rng(seed).permutation(np.arange(len(pairs)) % 2).astype(bool).tolist()
    return [replace(p, answer=p.counter, counter=p.answer) if f else p for p, f in zip(pairs, flipped, strict=True)]


def reinitialised(model: LanguageModel, seed: int = 0) -> LanguageModel:
    """The model with the entries of every weight in random order: of the same scale, without what was learned."""
    hf, generator = deepcopy(model.hf), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in hf.parameters():
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return wrap_model(hf, model.tokenizer, f"{model.name}, re-initialised")


def alignment_controls(
    fit: Callable[[LanguageModel, Sequence[PromptPair]], Alignment],
    model: LanguageModel,
    pairs: Sequence[PromptPair],
    report: Sequence[PromptPair],
    seed: int = 0,
) -> Mapping[str, Interval]:
    """Interchange accuracy on held-out pairs of what `fit` learns, and of its controls.

    "random labels": learned from pairs whose answers are random, and reported on such; "random model": learned and
    reported in a re-initialised model; "random directions": as many random orthonormal directions in place of what was
    learned (of a mask: as many random units); "none" and "whole site": nothing, and the whole value, exchanged.
    """
    learned, generator = fit(model, pairs), torch.Generator().manual_seed(seed)
    shuffled, other = fit(model, with_random_labels(pairs, seed)), reinitialised(model, seed)
    drawn = replace(learned, mask=learned.mask[torch.randperm(len(learned.mask), generator=generator)])
    if isinstance(learned.component, Directions) and bool(learned.mask.all()):
        rows = torch.linalg.qr(torch.randn(learned.component.rows.T.shape, generator=generator))[0].T.contiguous()
        drawn = replace(learned, component=replace(learned.component, rows=rows))
    site = learned.component.site
    whole = Alignment(Stream(site), torch.ones(model.width(site)), learned.positions)
    return {
        "learned": learned.accuracy(model, report),
        "random labels": shuffled.accuracy(model, with_random_labels(report, seed + 1)),
        "random model": fit(other, pairs).accuracy(other, report),
        "random directions": drawn.accuracy(model, report),
        "none": replace(whole, mask=torch.zeros_like(whole.mask)).accuracy(model, report),
        "whole site": whole.accuracy(model, report),
    }
