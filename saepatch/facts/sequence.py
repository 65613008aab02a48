"""Edits one after another: what happens to earlier edits, to other facts and to ordinary text."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from saepatch.data.edit_requests import EditRequest
from saepatch.data.texts import token_batches
from saepatch.engine.passes.kept_run import Checked
from saepatch.errors import UserError
from saepatch.facts.covariances import Covariances
from saepatch.facts.delta import Delta, edited
from saepatch.facts.evaluation import AnswerScores, EditEvaluation, evaluate_edit
from saepatch.facts.methods import EditMethod, edit_facts
from saepatch.model.language_model import LanguageModel

log = logging.getLogger(__name__)

CHECKPOINTS = (1, 3, 10, 30, 100)  # numbers of edits after which everything is measured


@dataclass(frozen=True, eq=False)
class SequenceStep:
    """The state after a number of edits.

    Attributes:
        edits: Number of edits so far.
        evaluation: All questions of all edits so far.
        loss: Cross-entropy of the held-out texts, in nats a token.
        norms: ‖ΔW‖/‖W‖ by layer.
        delta: All edits so far.
    """

    edits: int
    evaluation: EditEvaluation
    loss: float
    norms: dict[int, float]
    delta: Delta


def edit_in_sequence(
    model: LanguageModel,
    requests: Sequence[EditRequest],
    method: EditMethod,
    covariances: Covariances,
    held_out: Sequence[str],
    checkpoints: Sequence[int] = CHECKPOINTS,
    batch: bool = False,
    start: Delta | None = None,
) -> Iterator[SequenceStep]:
    """Edit one request after another on top of all earlier edits, and measure after each of `checkpoints` edits.

    Covariances stay those of the unedited model. With `batch`, the edits between two checkpoints are made together
    instead of one by one. Checkpoints beyond the number of requests are left out. `start`, the delta of an earlier
    step, continues a sequence that was stopped, after the edits that it holds.

    Raises:
        UserError: checkpoints that do not rise from 1, or otherwise as `edit_facts`.
    """
    if not checkpoints or min(checkpoints) < 1 or list(checkpoints) != sorted(set(checkpoints)):
        raise UserError(f"checkpoints {list(checkpoints)}: give numbers of edits from 1 on, in rising order")
    delta, done = start, 0 if start is None else len(start.examples)
    known, checked = dict[tuple[str, str], AnswerScores](), Checked()
    for edits in (number for number in checkpoints if done < number <= len(requests)):
        new = requests[done:edits]
        for group in [new] if batch else [[request] for request in new]:
            delta = edit_facts(model, group, method, covariances, delta, checked)
        done = edits
        assert delta is not None
        evaluation = evaluate_edit(model, requests[:edits], delta, known=known)
        norms = delta.relative_norms(model)
        with edited(model, delta):
            loss = text_loss(model, held_out)
        log.info("%s, %d edits: held-out loss %.3f", method.name, edits, loss)
        yield SequenceStep(edits, evaluation, loss, norms, delta)


@torch.no_grad()
def text_loss(model: LanguageModel, texts: Sequence[str]) -> float:
    """Cross-entropy in nats a token, over ordinary tokens that follow another token (a BOS counts as one).

    Raises:
        UserError: the texts hold no such token.
    """
    total, count = 0.0, 0
    for tokens in token_batches(model, list(texts), width=model.vocabulary):
        scores = model.logits(tokens)[:, :-1].float().log_softmax(-1)
        nll = -scores.gather(-1, tokens.input_ids[:, 1:, None])[..., 0]
        chosen = tokens.ordinary[:, 1:] & tokens.attention_mask[:, :-1].bool()
        total += float(nll[chosen].double().sum())
        count += int(chosen.sum())
    if not count:
        raise UserError("the held-out texts hold no token that follows another: give other texts")
    return total / count
