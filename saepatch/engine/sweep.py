"""The engine of exact patching: run every requested edit that changes something, many at a time.

Each batch of pairs is run twice, clean and corrupted. Edits resume from the base run
(`saepatch.engine.passes.kept_run`), sorted by the first position they change, so that a batch of edits shares the keys
and values of earlier positions.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saepatch.data.batches import PairBatch, own_positions, same_length_batches
from saepatch.data.pairs import PromptPair
from saepatch.engine.chosen import chosen_pairs, spell_answers
from saepatch.engine.components import Component
from saepatch.engine.edited_runs import EditedRuns, Stage, Wanted, metric_values
from saepatch.engine.metrics import Metric, needs_clean_logits
from saepatch.engine.options import SweepOptions
from saepatch.engine.passes.kept_run import KeptRun
from saepatch.engine.passes.known_ways import KnownWays, Signature
from saepatch.engine.passes.pieces import next_logits_in_pieces
from saepatch.engine.passes.shared_runs import base_run
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.records.bars import progress_bar

log = logging.getLogger(__name__)

PAIRS_MEMORY = 2**29  # limit in bytes for the latents of one batch of pairs
ROUNDED = 1e-3  # share of the mean gap; a rounding above it is warned of
SMALL = 512  # tokens: up to here, clean and corrupted run in one pass, whose time is dominated by reading weights


@dataclass(eq=False)
class Swept:
    """Metrics of the clean and corrupted runs, and the change of the base run's metric by each edit (mean of samples).

    `noise` is the largest difference of the metric between a row of the base run alone and in its batch.
    """

    clean: Float[np.ndarray, "pairs"]
    corrupted: Float[np.ndarray, "pairs"]
    pair: list[int] = field(default_factory=list)
    stage: list[int] = field(default_factory=list)
    group: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    change: list[float] = field(default_factory=list)
    noise: float | None = None

    @property
    def noise_share(self) -> float:
        """The noise as a share of the mean gap."""
        return share_of_gap(self.noise, self.clean, self.corrupted)


def share_of_gap(
    noise: float | None, clean: Float[np.ndarray, "pairs"], corrupted: Float[np.ndarray, "pairs"]
) -> float:
    """A noise of the metric as a share of the mean gap; 0 where it was not measured or there is no gap."""
    gap = float(np.abs(clean - corrupted).mean())
    return (noise or 0.0) / gap if gap else 0.0


def sweep(
    model: LanguageModel,
    components: Sequence[Component],
    pairs: Sequence[PromptPair],
    stages: Sequence[Stage],
    wanted: Callable[[int, int], Sequence[Wanted] | None],
    options: SweepOptions,
) -> Swept:
    """Run every edit in `wanted(stage, pair)` (None: every unit alone) that changes something.

    Edits of one stage are made of the same components, so that they can run together.
    """
    corruption, samples = options.corruption, options.samples
    if options.at_component and len(components) > 1:
        raise UserError(
            f"{corruption} corrupts the patched component, so patch one component at a time, as in "
            "[patch_components(model, component, pairs, corruption=…) for component in components]"
        )
    if corruption is not None:  # corrupted prompts are ignored
        pairs = [replace(pair, corrupted=pair.clean) for pair in pairs]
    whole = chosen_pairs(model, components, pairs, options.positions, options.align, spelled=True)
    if options.each_position and options.align == "equal":
        _warn_of_lengths(whole.clean)
    whole, options = spell_answers(model, whole, options)
    swept = Swept(np.zeros(len(pairs)), np.zeros(len(pairs)))
    at_once = _pairs_at_once(components, whole.clean.input_ids.shape[1] * samples, options.batch_size)
    shown = options.progress is True
    ways = KnownWays(model)
    bar = progress_bar(shown, desc=f"{options.direction} {components[0].site}", unit="edit")
    done = options.progress if callable(options.progress) else bar.update
    with bar:
        for part in same_length_batches(whole, at_once):
            part = part.rows([row for row in range(len(part)) for _ in range(samples)])
            clean, corrupted = _two_runs(model, ways.signature, components, part, options)
            if needs_clean_logits(options.metric):
                part = replace(part, clean_logits=clean.logits)
            base, source = (corrupted, clean) if options.denoises else (clean, corrupted)
            base.checked = ways.of(base)
            bare = clean if corruption is not None else base  # a corrupted pass has no counterpart alone
            if swept.noise is None or bare.tokens.padded:
                measured = partial(metric_values, options.metric, batch=part)
                swept.noise = max(swept.noise or 0.0, batch_noise(model, bare, measured, len(part)))
            index = part.index.tolist()
            ends = [metric_values(options.metric, run.logits, part) for run in (clean, corrupted)]
            np.add.at(swept.clean, index, ends[0] / samples)
            np.add.at(swept.corrupted, index, ends[1] / samples)
            own = ends[1] if options.denoises else ends[0]
            for number, stage in enumerate(stages):
                asked = [wanted(number, pair) for pair in index]
                edited = EditedRuns(components, stage, (base, source), part, asked, options)
                for batch, values in edited.run():
                    rows, columns = edited.planned.row[batch], edited.planned.first[batch]
                    swept.pair += [index[row] for row in rows.tolist()]
                    swept.stage += [number] * len(rows)
                    swept.group += edited.planned.group[batch].tolist()
                    swept.position += own_positions(base.tokens, rows, columns, options.align).tolist()
                    swept.change += ((values - own[rows.numpy()]) / samples).tolist()
                    done(len(rows))
    swept.noise = (swept.noise or 0.0) * int(whole.index.bincount().max())  # a pair's metric sums its rows
    return swept


def _warn_of_lengths(tokens: Tokens) -> None:
    lengths = tokens.lengths.unique().tolist()
    if len(lengths) > 1:
        log.warning(
            "prompts have %d to %d tokens, so a position is a different token in different pairs, and its effect is a "
            "share of the gap of all pairs: for a map of positions give pairs of one form", lengths[0], lengths[-1],
        )  # fmt: skip


def _two_runs(
    model: LanguageModel,
    signature: Signature | None,
    components: Sequence[Component],
    part: PairBatch,
    options: SweepOptions,
) -> tuple[KeptRun, KeptRun]:
    sites = {component.site for component in components}
    denoise = options.denoises
    if options.corruption is None and part.clean.input_ids.numel() <= SMALL:
        return base_run(model, signature, part.clean.above(part.corrupted), sites, True).split(len(part))
    clean = base_run(model, signature, part.clean, sites, not denoise)
    if options.corruption is None:
        return clean, base_run(model, signature, part.corrupted, sites, denoise)
    return clean, options.corruption.run(model, part, components, clean, denoise)


def batch_noise(model: LanguageModel, run: KeptRun, measured: Callable[[Tensor], np.ndarray], rows: int) -> float:
    """How much a metric changes when the row with most padding runs alone instead of in its batch.

    Kernels may round differently by batch, and quantisation may use one scale for all of it. One row's logits give as
    many differences as the batch has pairs of answers.

    Args:
        measured: The metric of next-token logits of all rows.
        rows: Number of rows whose answers `measured` knows.

    Raises:
        UserError: the logits differ by so much that padding changes the model's results.
    """
    row = int(run.tokens.lengths.argmin())
    alone = run.tokens.alone(row)
    with torch.no_grad():
        piece = run.piece // 2 if run.piece else alone.width  # of a long prompt: other pieces round differently, too
        expected, inside = next_logits_in_pieces(model, alone, piece).to(run.logits), run.logits[row : row + 1]
        worst = float((inside.float() - expected.float()).abs().max())
        if run.tokens.padded and worst > (1e-3 if model.dtype == torch.float32 else 0.1) * float(expected.abs().max()):
            raise UserError(
                f"padding changes the results of {model.name} (logits differ by {worst:.1e}): give pairs of equal "
                "length (align='equal'), or one pair at a time"
            )
        values = [measured(logits.expand(rows, -1)) for logits in (expected, inside)]
    return float(np.abs(values[0] - values[1]).max())


def measured_rounding(
    model: LanguageModel,
    run: KeptRun,
    part: PairBatch,
    metric: Metric,
    clean: Float[np.ndarray, "pairs"],
    corrupted: Float[np.ndarray, "pairs"],
) -> float:
    """`batch_noise` of a metric as a share of the mean gap, with a warning where it is more than float32 rounds."""
    noise = batch_noise(model, run, partial(metric_values, metric, batch=part), len(part))
    share = share_of_gap(noise, clean, corrupted)
    if share > ROUNDED:
        log.warning(
            "numbers of %s depend on what else is in a batch: the metric of one prompt alone differs by %.2g, "
            "%.1f %% of the mean gap, so smaller differences say nothing",
            model.name, noise, 100 * share,
        )  # fmt: skip
    return share


def _pairs_at_once(components: Sequence[Component], width: int, batch_size: int | None) -> int:
    """Number of pairs whose runs are kept at a time, so that their latents fit in memory."""
    largest = max(component.units for component in components)
    return max(1, min(batch_size or 64, PAIRS_MEMORY // (16 * width * max(largest, 1024))))
