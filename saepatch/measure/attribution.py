"""Attribution patching: estimated effects of all latents and error terms, from gradients instead of patched runs.

Two forward passes and one backward pass through the later blocks screen every node at every position (Nanda 2023; Syed,
Rager and Conmy 2023; on SAE latents, Marks et al. 2024): with g the gradient of the metric at a site of the base run,
a latent that differs by Δf between the runs has the estimate `Δf · (g · d_j)`, an error term `Δε · g`. Verification
runs the largest estimates, and a random sample of the others, exactly.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor
from typing_extensions import Unpack

from saepatch.data.batches import PairBatch, own_positions, same_length_batches
from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import Given, as_dictionaries
from saepatch.engine.changes import between
from saepatch.engine.chosen import chosen_pairs, known_where, spell_answers
from saepatch.engine.components import (
    Changes,
    Component,
    ErrorTerm,
    LatentUnits,
    as_components,
)
from saepatch.engine.gradients import (
    Base,
    FirstOrder,
    GradDrop,
    Gradients,
    IntegratedGradients,
    Method,
    Readout,
    products_of,
)
from saepatch.engine.metrics import Metric, as_metric, logit_difference
from saepatch.engine.options import SweepKeywords, SweepOptions, with_keywords
from saepatch.engine.passes.kept_run import KeptRun
from saepatch.engine.sweep import batch_noise, share_of_gap
from saepatch.errors import UserError
from saepatch.measure.patching import base_tokens, patch_edits
from saepatch.measure.recall import verify_to_recall
from saepatch.measure.results.effects import precision_of
from saepatch.measure.results.screen import ERROR, Attribution, Exact, Verification
from saepatch.model.language_model import LanguageModel
from saepatch.model.positions import Positions
from saepatch.records.bars import progress_bar

__all__ = [
    "Attribution",
    "FirstOrder",
    "GradDrop",
    "IntegratedGradients",
    "Verification",
    "attribute",
    "integrated_gradients",
]

FIRST_ORDER = FirstOrder()
# Encoders that treat positions independently: they run only on positions that differ, without decoding.
BY_POSITION = frozenset({"standard", "gated", "topk", "abstopk", "jumprelu", "matching_pursuit"})
ENCODE_MEMORY = 2**26  # bytes of latents encoded at a time
PAIRS_MEMORY = 2**30  # limit in bytes for the activations of a batch of pairs


def attribute(
    model: LanguageModel,
    dictionaries: Given | Sequence[Given],
    pairs: Sequence[PromptPair],
    method: Method = FIRST_ORDER,
    verify: int = 0,
    sample: int = 0,
    seed: int = 0,
    recall: float | None = None,
    options: SweepOptions | None = None,
    **keywords: Unpack[SweepKeywords],
) -> Attribution:
    """Estimate the effect of patching every latent and error term, at every position and site, separately.

    Cost per batch of pairs: two forward passes, and the method's backward passes through the blocks after the first
    site. The result contains only nodes that differ between the runs. Latents of a dictionary that normalises its input
    are written in the base run's scale, as in exact patching; the effect of the change of scale belongs to no node.

    Args:
        dictionaries: One, or several at different sites, whose gradients come from the same passes; a `sae_lens.SAE` is
            wrapped (`wrap_sae`), at the site named in its metadata.
        method: `FirstOrder()`, `IntegratedGradients(steps)` or `GradDrop()`.
        verify: Number of nodes to run exactly (`saepatch.measure.patching`): those with the largest absolute estimates.
        sample: Number of further nodes to run exactly, drawn at random from all others.
        seed: Seed of the random sample.
        recall: Run nodes until at least this share of the `verify` truly largest was run (`saepatch.measure.recall`).
        options: Options that sweeps share, or keywords. A corruption at the patched component leaves out error terms.

    Raises:
        UserError: dictionaries do not fit the model or share a tensor, pairs are not aligned, the metric has no
            gradient or not one value per pair, the model is in training mode, or an option is unknown.
    """
    chosen = with_keywords(options or SweepOptions(), keywords)
    several = as_dictionaries(dictionaries)
    precision, rounding = precision_of(model.hf)
    screen = _screen(model, several, pairs, method, chosen)
    columns = screen.columns(1.0 if chosen.denoises or screen.absolute else -1.0)
    result = Attribution(
        method=method.name,
        sites=tuple(dictionary.site for dictionary in several),
        kinds=("latent",) * len(several),
        examples=tuple(pair.example or str(number) for number, pair in enumerate(pairs)),
        clean=screen.clean,
        corrupted=screen.corrupted,
        pair=columns["pair"],
        site=columns["site"],
        unit=columns["unit"],
        position=columns["position"],
        score=columns["score"],
        sizes=screen.absolute,
        precision=precision,
        rounding=max(rounding, 2 * screen.noise_share),
        tokens=base_tokens(model, pairs, chosen),
        **chosen.labels,
    )
    if not isinstance(method, IntegratedGradients):
        result.warn_if_flat("use IntegratedGradients")
    if recall is not None:
        return verify_to_recall(result, verify, recall, _exact(model, several, pairs, chosen), seed)
    return result.verify(verify, sample, _exact(model, several, pairs, chosen), seed) if verify or sample else result


def _exact(
    model: LanguageModel, dictionaries: Sequence[Dictionary], pairs: Sequence[PromptPair], options: SweepOptions
) -> Exact:
    """The metric under edits, each of one pair, run exactly."""
    components: list[Component] = [LatentUnits(dictionary) for dictionary in dictionaries]
    if not options.at_component:
        components += [ErrorTerm(dictionary) for dictionary in dictionaries]
    alone = replace(options, each_position=False)
    return lambda edits: patch_edits(model, components, pairs, edits, alone)


def integrated_gradients(
    model: LanguageModel,
    dictionary: Dictionary,
    pairs: Sequence[PromptPair],
    positions: Positions = "all",
    metric: Metric | str = logit_difference,
    steps: int = 10,
    batch_size: int = 64,
) -> tuple[Float[Tensor, "pairs d_sae"], Float[Tensor, "pairs"]]:
    """Contributions to the effect of patching a whole site: of each latent, and of everything else.

    `attribute` with `IntegratedGradients(steps)`, denoising, summed over positions, in units of the metric. Latents and
    remainder sum to `m(site patched) − m(corrupted)` as `steps` grows (completeness).

    Raises:
        UserError: pairs are not aligned, or `steps` is below 1.
    """
    options = SweepOptions(positions=positions, metric=as_metric(metric), batch_size=batch_size)
    screen = _screen(model, [dictionary], pairs, IntegratedGradients(steps), options)
    columns = screen.columns(1.0)
    of_latent = columns["unit"] != ERROR
    latents = torch.zeros(len(pairs), dictionary.d_sae, dtype=torch.float64)
    where = tuple(torch.from_numpy(columns[name][of_latent]) for name in ("pair", "unit"))
    latents.index_put_(where, torch.from_numpy(columns["score"][of_latent]), accumulate=True)
    return latents, torch.from_numpy(screen.total[0]) - latents.sum(-1)


@dataclass(eq=False)
class _Screen:
    """Results of screening so far; `total[site, pair]` is the estimate for patching the whole site."""

    clean: Float[ndarray, "pairs"]
    corrupted: Float[ndarray, "pairs"]
    total: Float[ndarray, "sites pairs"]
    parts: list[dict[str, ndarray]] = field(default_factory=list)
    absolute: bool = False
    noise: float | None = None  # of the metric, between a row alone and in its batch

    @property
    def noise_share(self) -> float:
        """The noise as a share of the mean gap."""
        return share_of_gap(self.noise, self.clean, self.corrupted)

    def columns(self, sign: float) -> dict[str, ndarray]:
        """Columns of all nodes, averaged over the samples of a pair."""
        empty = {name: np.zeros(0, dtype=np.int64) for name in ("pair", "site", "unit", "position")}
        parts = self.parts or [empty | {"score": np.zeros(0)}]
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        keys = np.stack([columns[name] for name in empty])
        order = np.lexsort(keys[::-1])
        keys, score = keys[:, order], columns["score"][order]
        first = np.ones(len(score), dtype=bool)
        first[1:] = (keys[:, 1:] != keys[:, :-1]).any(0)
        score = np.bincount(first.cumsum() - 1, weights=score) if len(score) else score
        return dict(zip(empty, keys[:, first], strict=True)) | {"score": sign * score}


@torch.inference_mode(False)
def _screen(
    model: LanguageModel,
    dictionaries: Sequence[Dictionary],
    pairs: Sequence[PromptPair],
    method: Method,
    options: SweepOptions,
) -> _Screen:
    components = as_components(model, dictionaries)
    sites = [dictionary.site for dictionary in dictionaries]
    for number, site in enumerate(sites):
        if taken := [str(other) for other in sites[:number] if other.same_tensor(site)]:
            raise UserError(f"two dictionaries for one tensor ({taken[0]} and {site}): attribute with one of them")
    if options.at_component and len(sites) > 1:
        raise UserError(f"{options.corruption} corrupts the patched component: attribute one dictionary at a time")
    samples = options.samples
    if options.corruption is not None:  # corrupted prompts are ignored
        pairs = [replace(pair, corrupted=pair.clean) for pair in pairs]
    whole = chosen_pairs(model, components, pairs, options.positions, options.align, spelled=True)
    whole, options = spell_answers(model, whole, options)
    if whole.weights is not None and isinstance(method, GradDrop):
        raise UserError(f"{method.name} takes answers of one token: use FirstOrder or IntegratedGradients")
    screen = _Screen(np.zeros(len(pairs)), np.zeros(len(pairs)), np.zeros((len(sites), len(pairs))))
    at_once = options.batch_size or _pairs_at_once(model, whole.clean.input_ids.shape[1] * samples)
    bar = progress_bar(options.progress is True, desc=method.name, total=len(whole), unit="pair")
    done = options.progress if callable(options.progress) else bar.update
    with bar:
        for few in same_length_batches(whole, at_once):
            part = few.rows([row for row in range(len(few)) for _ in range(samples)])
            _screen_part(model, dictionaries, components, part, method, options, screen)
            done(len(few))
    if screen.noise is not None:  # a pair's metric is the sum of its rows
        screen.noise *= int(whole.index.bincount().max())
    return screen


def _pairs_at_once(model: LanguageModel, width: int) -> int:
    """Number of pairs whose graph fits in memory: a block keeps about 34 d_model activations, and attention scores."""
    per_token = 4 * model.n_layers * (34 * model.d_model + 3 * model.n_heads * width)
    return max(1, min(64, PAIRS_MEMORY // (per_token * width)))


def _screen_part(
    model: LanguageModel,
    dictionaries: Sequence[Dictionary],
    components: Sequence[Component],
    part: PairBatch,
    method: Method,
    options: SweepOptions,
    screen: _Screen,
) -> None:
    """Screen one batch: its source run, its base run with gradients, and their products."""
    denoise, corruption, samples = options.denoises, options.corruption, options.samples
    sites = [dictionary.site for dictionary in dictionaries]
    readout = Readout.of(options.metric, part, model)
    runs: tuple[KeptRun, KeptRun] | None = None
    if corruption is None:
        tokens, others = (part.corrupted, part.clean) if denoise else (part.clean, part.corrupted)
        with readout.running(model):
            source = bare = KeptRun(model, others, sites, keep_cache=False)
    else:
        clean = bare = KeptRun(model, part.clean, sites, keep_cache=False)
        corrupted = corruption.run(model, part, components, clean, False)
        runs = (corrupted, clean) if denoise else (clean, corrupted)
        tokens, source = runs[0].tokens, runs[1]
    if screen.noise is None or bare.tokens.padded:
        with readout.running(model) if corruption is None else nullcontext():
            noise = batch_noise(model, bare, lambda logits: _numpy(readout(logits)), len(part))
        screen.noise = max(screen.noise or 0.0, noise)
    where = {dictionary.site: known_where(model, LatentUnits(dictionary), part) for dictionary in dictionaries}
    alike = tokens.same_start(source.tokens)
    base = Base(model, tokens, sites, readout, None if runs is None else runs[0])
    gradients = method.take(base, source.values, where)
    index = part.index.cpu().numpy()
    metrics = [_numpy(gradients.metric), _numpy(readout(source.logits))]
    for total, metric in zip((screen.clean, screen.corrupted), metrics[::-1] if denoise else metrics, strict=True):
        np.add.at(total, index, metric / samples)
    screen.absolute = gradients.absolute
    for number, dictionary in enumerate(dictionaries):
        with torch.no_grad():
            x = source.values[dictionary.site]
            here = _score(dictionary, gradients, x, runs, where[dictionary.site], alike, options.at_component)
        np.add.at(screen.total[number], index, _numpy(here.total) / samples)
        screen.parts.append(
            {
                "pair": index[here.row.cpu().numpy()],
                "site": np.full(len(here.row), number),
                "unit": here.unit.cpu().numpy(),
                "position": own_positions(tokens, here.row, here.pos, options.align).cpu().numpy(),
                "score": _numpy(here.score) / samples,
            }
        )


def _numpy(values: Float[Tensor, "some"]) -> Float[ndarray, "some"]:
    return values.detach().cpu().double().numpy()


@dataclass(frozen=True, eq=False)
class _Scored:
    """Scores of one site's nodes, given by row, column and unit; `total` is each row's score for the whole site."""

    row: Int[Tensor, "nodes"]
    pos: Int[Tensor, "nodes"]
    unit: Int[Tensor, "nodes"]
    score: Float[Tensor, "nodes"]
    total: Float[Tensor, "batch"]


def _score(
    dictionary: Dictionary,
    gradients: Gradients,
    source: Tensor,
    runs: tuple[KeptRun, KeptRun] | None,
    where: Bool[Tensor, "batch pos"],
    alike: Bool[Tensor, "batch pos"],
    latents_only: bool,
) -> _Scored:
    """Scores of a dictionary's latents and error terms; `runs` are base and source where a corruption made one.

    `alike` marks positions up to which both prompts are identical.
    """
    x, g = (by_site[dictionary.site].to(where.device) for by_site in (gradients.values, gradients.of))
    g = g.to(torch.promote_types(g.dtype, torch.float32))
    difference = source.to(g.dtype) - x.to(g.dtype)
    if runs is None:  # after identical tokens, a difference can only be rounding
        rounding = 8 * torch.finfo(source.dtype).eps * x.abs().amax(-1)
        where = where & ~(alike & (difference.abs().amax(-1) <= rounding))
    difference = difference * where[..., None]
    whole = torch.stack([(difference * take).sum(-1) for take in g])
    moved = difference.ne(0).any(-1)
    if runs is None and _by_position(dictionary):
        latents = _latent_changes(dictionary, x, source, moved)
        products = products_of(latents, g)
        rest = whole.clone()  # the remainder is the error term, since latents add their rows unscaled
        for take, product in zip(rest, products, strict=True):
            take.index_put_((latents.row, latents.pos), -product, accumulate=True)
        row, pos = moved.nonzero(as_tuple=True)
        of_errors = rest[:, row, pos]
    else:
        mine: list[Component] = [LatentUnits(dictionary), ErrorTerm(dictionary)]
        if runs is None:
            changes = [component.write(x, component.read(source), where) for component in mine]
        else:
            changes = [between(component, *runs, where) for component in mine[: 1 if latents_only else 2]]
        latents = changes[0]
        products = products_of(latents, g)
        row, pos, of_errors = latents.row[:0], latents.pos[:0], products[:, :0]
        if not latents_only:
            row, pos, of_errors = changes[1].row, changes[1].pos, products_of(changes[1], g)
    return _Scored(
        torch.cat([latents.row, row]),
        torch.cat([latents.pos, pos]),
        torch.cat([latents.unit, torch.full_like(row, ERROR)]),
        _over_takes(torch.cat([products, of_errors], 1), gradients.absolute),
        _over_takes(whole.sum(-1), gradients.absolute),
    )


def _over_takes(products: Float[Tensor, "takes some"], absolute: bool) -> Float[Tensor, "some"]:
    return products.abs().mean(0) if absolute else products[0]


def _by_position(dictionary: Dictionary) -> bool:
    return dictionary.architecture in BY_POSITION and dictionary.sae.cfg.normalize_activations == "none"  # type: ignore[union-attr]


def _latent_changes(
    dictionary: Dictionary,
    base: Float[Tensor, "batch pos width"],
    source: Float[Tensor, "batch pos width"],
    moved: Bool[Tensor, "batch pos"],
) -> Changes:
    """The changes of `LatentUnits`, from one encoding of the positions that differ, without decoding."""
    row, pos = moved.nonzero(as_tuple=True)
    both = torch.stack([source[row, pos], base[row, pos]]).to(dictionary.dtype)
    moves: list[tuple[Tensor, Tensor, Tensor]] = []
    chunk = max(1, ENCODE_MEMORY // (8 * dictionary.d_sae))
    for start in range(0, len(row), chunk):
        acts, _ = dictionary.activations(both[:, start : start + chunk])
        change = acts[0].sub_(acts[1])
        index, unit = change.nonzero(as_tuple=True)
        moves.append((index + start, unit, change[index, unit]))
    columns = (torch.cat(column) for column in zip(*moves, strict=True)) if moves else (row, row, both[0, :, 0])
    index, unit, value = columns
    rows = dictionary.rows
    return Changes(row[index], pos[index], unit, lambda some: value[some, None] * rows[unit[some]])
