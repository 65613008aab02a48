"""The rows of a sweep: pairs with positions that may be patched, and answers of several tokens as rows of their own.

Positions whose tokens a dictionary was not trained on are not patched. An answer of several tokens becomes rows
"prompt, and the first tokens of the answer", whose next token is known (teacher forcing); sweeps and screens sum the
rows of a pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saepatch.data.batches import PairBatch, batch_pairs
from saepatch.data.pairs import PromptPair
from saepatch.engine.components import Component, ErrorTerm, LatentUnits
from saepatch.engine.metrics import DeclaredMetric, metric_name, precise, take
from saepatch.engine.options import Align, SweepOptions
from saepatch.errors import UserError
from saepatch.model.inputs.tokens import refuse_pictures, without_tokens
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.positions import Positions
from saepatch.splicing.splice import choose_positions


def chosen_pairs(
    model: LanguageModel,
    components: Sequence[Component],
    pairs: Sequence[PromptPair],
    positions: Positions,
    align: Align = "equal",
    spelled: bool = False,
) -> PairBatch:
    """Tokenised pairs with the positions that may be patched, checked against what dictionaries were trained on.

    Raises:
        UserError: as for `batch_pairs` and `choose_positions`; an explicitly selected position holds a token that a
            dictionary was not trained on, or all positions do.
    """
    whole = choose_positions(model, batch_pairs(model, pairs, align=align, spelled=spelled), positions)
    _check_known(model, components, whole, positions)
    return whole


def known_where(model: LanguageModel, component: Component, part: PairBatch) -> Bool[Tensor, "batch pos"]:
    """Chosen positions at which a component may be patched: its dictionary was trained on both prompts' tokens."""
    assert part.where is not None
    where = part.where
    if isinstance(component, LatentUnits | ErrorTerm):
        excluded = component.dictionary.excluded_tokens(model)
        for tokens in (part.clean, part.corrupted):
            where = without_tokens(tokens.input_ids, where, excluded)
    return where


def _check_known(model: LanguageModel, components: Sequence[Component], whole: PairBatch, positions: Positions) -> None:
    """Check a sweep's positions against the tokens that its dictionaries were trained on; logs those that are left out.

    Raises:
        UserError: an explicitly selected position holds a token that a dictionary was not trained on, or all
            positions do.
    """
    assert whole.where is not None
    for component in components:
        if isinstance(component, LatentUnits | ErrorTerm):
            for tokens in (whole.clean, whole.corrupted):
                component.dictionary.editable(model, tokens.input_ids, whole.where, positions)
            if not bool(known_where(model, component, whole).any()):
                raise UserError(
                    f"positions {positions!r} select only tokens that dictionary {component.dictionary.name} was not "
                    "trained on: choose others, or load it with every_position=True (--every_position)"
                )


def spell_answers(model: LanguageModel, batch: PairBatch, options: SweepOptions) -> tuple[PairBatch, SweepOptions]:
    """A batch with a row for every token of answers and counter-answers, and options with the metric of such rows.

    Both are returned as given where every answer is one token. Chosen positions stay those of the prompts.

    Raises:
        UserError: the metric, the alignment or the corruption takes answers of one token only.
    """
    sums = check_answers(batch, options)
    if sums is None or batch.spelled is None:
        return batch, options
    cells = [cell for row, both in enumerate(batch.spelled) for cell in _cells(row, both, sums)]
    few = batch.rows([cell.row for cell in cells])
    prefixes = [cell.before for cell in cells]
    clean, corrupted = (_with(model, tokens, prefixes) for tokens in (few.clean, few.corrupted))
    device = few.answer.device
    answer, counter = (torch.tensor([cell.next[n] for cell in cells], device=device) for n in (0, 1))
    where = few.where
    if where is not None:
        where = torch.nn.functional.pad(where, (0, clean.width - where.shape[1]))
    weights = torch.tensor([cell.weights for cell in cells], device=device)
    few = replace(
        few,
        clean=clean,
        corrupted=corrupted,
        answer=answer,
        counter=counter,
        where=where,
        weights=weights,
        spelled=None,
    )
    return few, replace(options, metric=summed_log_probability)


@dataclass(frozen=True)
class _Cell:
    """One row: the tokens that follow the prompt, the next tokens of both answers, and their weights."""

    row: int
    before: tuple[int, ...]
    next: tuple[int, int]
    weights: tuple[float, float]


def _cells(row: int, both: tuple[tuple[int, ...], tuple[int, ...]], sums: tuple[float, float]) -> list[_Cell]:
    cells: dict[tuple[int, ...], tuple[list[int], list[float]]] = {}
    for side, (answer, weight) in enumerate(zip(both, sums, strict=True)):
        for place, token in enumerate(answer if weight else ()):
            # where answers begin alike, their tokens share rows
            tokens, weights = cells.setdefault(answer[:place], ([token, token], [0.0, 0.0]))
            tokens[side], weights[side] = token, weight
    return [_Cell(row, before, (t[0], t[1]), (w[0], w[1])) for before, (t, w) in cells.items()]


def _with(model: LanguageModel, tokens: Tokens, more: Sequence[Sequence[int]]) -> Tokens:
    """Rows padded on the right, each with some more tokens."""
    refuse_pictures(tokens, "answers of several tokens")
    rows = zip(tokens.input_ids.tolist(), tokens.lengths.tolist(), more, strict=True)
    return model.pad([[*ids[:length], *own] for ids, length, own in rows], "right")


@DeclaredMetric
def summed_log_probability(logits: Float[Tensor, "batch vocab"], batch: PairBatch) -> Float[Tensor, "batch"]:
    """Weighted log-probabilities of each row's next tokens, in nats."""
    assert batch.weights is not None
    log_p = precise(logits).log_softmax(-1)
    both = torch.stack([take(log_p, batch.answer), take(log_p, batch.counter)], -1)
    return torch.where(batch.weights != 0, batch.weights.to(both) * both, 0.0).sum(-1)


def check_answers(batch: PairBatch, options: SweepOptions) -> tuple[float, float] | None:
    """How a metric sums the log-probabilities of answer and counter-answer; None where every answer is one token.

    Raises:
        UserError: as for `spell_answers`.
    """
    long = [row for row, both in enumerate(batch.spelled or ()) if max(map(len, both)) > 1]
    if not long or batch.spelled is None:
        return None
    pair = batch.pairs[long[0]]
    texts = zip((pair.answer, pair.counter), batch.spelled[long[0]], strict=True)
    text, ids = max(texts, key=lambda item: len(item[1]))
    said = f"answer {text!r} of pair {pair.example or long[0]} has {len(ids)} tokens, and"
    sums = options.metric.sums if isinstance(options.metric, DeclaredMetric) else None
    if sums is None:
        raise UserError(
            f"{said} {metric_name(options.metric)} takes one: use logit_difference, log_probability or cross_entropy, "
            "which sum log-probabilities, or an answer of one token"
        )
    if options.align == "right":
        raise UserError(f"{said} prompts aligned from the right take one: give prompts of equal length")
    if options.corruption is not None:
        raise UserError(f"{said} {options.corruption} takes one: give corrupted prompts, or an answer of one token")
    return sums
