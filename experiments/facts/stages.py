"""The measurements: causal traces, edits by layer, single edits by every method, edits in sequence."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from saepatch.data.edit_requests import EditRequest
from saepatch.data.forms import largest_group
from saepatch.data.pairs import PromptPair
from saepatch.engine.corruptions import GaussianNoise
from saepatch.facts.contexts import FactToken, Sampled, answer_ids
from saepatch.facts.covariances import Covariances
from saepatch.facts.delta import Delta, edited
from saepatch.facts.evaluation import AnswerScores, EditEvaluation, evaluate_edit, score_answers
from saepatch.facts.generation import FluencySettings
from saepatch.facts.methods import AlphaEdit, EditMethod, Emmet, Memit, Rome, edit_each
from saepatch.facts.sequence import edit_in_sequence
from saepatch.facts.tracing import trace_fact
from saepatch.facts.values import ValueSearch
from saepatch.model.language_model import LanguageModel

log = logging.getLogger(__name__)

TOKENS: tuple[FactToken, ...] = ("subject", "last")
CORRUPTIONS = ("token replacement", "Gaussian noise")


@dataclass(frozen=True)
class LayerTrace:
    """Share of the gap that the state and the MLP output of each layer restore, at each position from the subject on.

    `subject` is the column of the subject's last token.
    """

    corruption: str
    facts: int
    columns: tuple[str, ...]
    subject: int
    states: tuple[tuple[float, ...], ...]  # layers × positions
    mlps: tuple[tuple[float, ...], ...]

    def of(self, token: str) -> list[float]:
        """By layer."""
        return [row[self.subject if token == "subject" else -1] for row in self.mlps]


@dataclass(frozen=True, eq=False)
class SequenceMeasure:
    """Measurements after a number of edits."""

    edits: int
    evaluation: EditEvaluation
    loss: float
    norms: dict[str, float]


@dataclass(frozen=True, eq=False)
class MeasuredSequence:
    method: str
    steps: tuple[SequenceMeasure, ...]


def known_requests(model: LanguageModel, requests: Sequence[EditRequest]) -> list[EditRequest]:
    """The requests whose true answer the model gives."""
    scores = score_answers(model, [(request.text, request.true) for request in requests])
    return [request for request, score in zip(requests, scores, strict=True) if score.accuracy == 1]


def trace_layers(
    model: LanguageModel, requests: Sequence[EditRequest], corruption: str, traced: int, seed: int
) -> LayerTrace:
    """Trace `traced` facts of one template, each with another one's subject of the same length in the other prompt."""
    usable = [r for r in requests if len(answer_ids(model, r.text, r.true)) == 1]
    lengths = [len(model.encode(request.text)) for request in usable]
    pairs, frames = [], []
    for i, one in enumerate(usable):
        later = ((i + step) % len(usable) for step in range(1, len(usable)))
        alike = (j for j in later if usable[j].prompt == one.prompt and lengths[j] == lengths[i])
        other = next((usable[j] for j in alike if usable[j].true != one.true), None)
        if other is not None:
            pairs.append(PromptPair(one.text, other.text, one.true, other.true, one.example))
            frames.append(one.prompt)
    group = largest_group(model, pairs, frames)[:traced]
    plain = trace_fact(model, group, window=1)
    noise = GaussianNoise(list(plain.subject), samples=4, seed=seed)
    traced_pairs = plain if corruption == CORRUPTIONS[0] else trace_fact(model, group, corruption=noise, window=1)
    maps = (traced_pairs.values(kind)[1][:, plain.subject[0] :] for kind in ("states", "MLP outputs"))
    states, mlps = (tuple(map(tuple, table.tolist())) for table in maps)
    columns = traced_pairs.columns[plain.subject[0] :]
    return LayerTrace(corruption, len(group), columns, len(plain.subject) - 1, states, mlps)


@dataclass(frozen=True)
class MethodSettings:
    """Settings that all methods of a run share."""

    token: FactToken
    steps: int
    prefixes: Sampled
    weight: float
    threshold: float

    def methods(self, layer: int, spread: Sequence[int]) -> dict[str, EditMethod]:
        """The methods compared, by name; `spread` are the layers of those that edit several."""
        search = ValueSearch(steps=self.steps)
        wide = replace(search, clamp=4.0)  # of methods on the residual stream, as for ROME
        rome = Rome(layer, prefixes=self.prefixes, search=search, token=self.token)
        memit = Memit((layer,), self.weight, self.prefixes, wide, self.token)
        several = tuple(spread)
        return {
            "ROME": rome,
            "ROME, original": replace(rome, original=True),
            "MEMIT": replace(memit, layers=several),
            "AlphaEdit": AlphaEdit(several, self.threshold, prefixes=self.prefixes, search=wide, token=self.token),
            "EMMET": Emmet(several, self.prefixes, wide, self.token),
            "MEMIT, 1 layer": memit,
        }


def single_edits(
    model: LanguageModel,
    requests: Sequence[EditRequest],
    method: EditMethod,
    covariances: Covariances,
    fluent: FluencySettings | None = None,
    known: dict[tuple[str, str], AnswerScores] | None = None,
) -> EditEvaluation:
    """Every request edited alone, and its questions; `known` as in `evaluate_edit`."""
    deltas = edit_each(model, requests, method, covariances)
    named = {request.example: delta for request, delta in zip(requests, deltas, strict=True)}
    return evaluate_edit(model, requests, lambda r: edited(model, named[r.example]), method.name, fluent, known=known)


@dataclass(frozen=True, eq=False)
class SequenceRun:
    """A sequence of edits whose checkpoints are measured one by one, each from the delta that the last one saved."""

    model: LanguageModel
    requests: Sequence[EditRequest]
    method: EditMethod
    covariances: Covariances
    held_out: Sequence[str]
    batch: bool
    folder: Path  # of deltas, by number of edits

    def after(self, edits: int, earlier: int) -> SequenceMeasure:
        """Measurements after some edits, continued from those after a smaller number, or 0."""
        start = Delta.load(self._path(earlier)) if earlier else None
        given = self.model, self.requests, self.method, self.covariances, self.held_out
        (step,) = edit_in_sequence(*given, (edits,), self.batch, start)
        step.delta.save(self._path(edits))
        norms = {str(layer): norm for layer, norm in step.norms.items()}
        return SequenceMeasure(edits, step.evaluation, step.loss, norms)

    def _path(self, edits: int) -> Path:
        return self.folder / f"{edits}.safetensors"


def correlation(trace: Sequence[float], success: Sequence[float]) -> float:
    """Pearson correlation over layers; NaN where one of the two is constant."""
    if np.std(trace) == 0 or np.std(success) == 0:
        return float("nan")
    return float(torch.corrcoef(torch.tensor([list(trace), list(success)]))[0, 1])
