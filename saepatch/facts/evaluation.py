"""What an edit changes and what it breaks: questions asked before and after, and their success with intervals."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from saepatch.data.edit_requests import KINDS, EditRequest, FactQuestion
from saepatch.errors import UserError
from saepatch.facts.contexts import answer_ids
from saepatch.facts.delta import Delta, edited
from saepatch.facts.generation import FluencySettings, fluency
from saepatch.measure.results.effects import precision_of
from saepatch.model.language_model import LanguageModel
from saepatch.records.provenance import Provenance
from saepatch.records.rows import EditRow, write_rows
from saepatch.records.statistics import Interval, bootstrap_mean, wilson_share
from saepatch.records.tables import text_table

ROWS = 64  # of a pass
HARMONIC = ("efficacy", "paraphrase", "neighbourhood")

Around = Callable[[EditRequest], AbstractContextManager[object]]
"""Context in which the model is edited for a request: any splice, for instance."""


@dataclass(frozen=True)
class AnswerScores:
    """Mean negative log-likelihood a token of one answer, in nats, and the share of its tokens that are the likeliest
    under teacher forcing."""

    nll: float
    accuracy: float


@torch.no_grad()
def score_answers(model: LanguageModel, asked: Sequence[tuple[str, str]]) -> list[AnswerScores]:
    """Scores of answers after their prompts, each tokenised together with its prompt; the model is used as it is.

    Raises:
        UserError: an answer does not begin with a token of its own.
    """
    ids = {each: (model.encode(each[0]), answer_ids(model, *each)) for each in dict.fromkeys(asked)}
    # answers of one token to the same prompt need the same pass
    rows: dict[tuple[tuple[int, ...], tuple[int, ...]], list[tuple[str, str]]] = {}
    for each, (prompt, answer) in sorted(ids.items(), key=lambda item: len(item[1][0])):
        rows.setdefault((tuple(prompt), tuple(answer[:-1])), []).append(each)
    scores: dict[tuple[str, str], AnswerScores] = {}
    keys = list(rows)
    for start in range(0, len(keys), ROWS):
        part = keys[start : start + ROWS]
        answers = [ids[rows[key][0]][1] for key in part]
        logits = model.logits_of_continuations(model.pad([list(prompt) for prompt, _ in part], side="left"), answers)
        for number, key in enumerate(part):
            own = logits[number, : len(answers[number])].float().log_softmax(-1).cpu()
            for each in rows[key]:
                scores[each] = _scored(own, ids[each][1])
    return [scores[each] for each in asked]


def _scored(log_probabilities: Float[torch.Tensor, "tokens vocab"], answer: Sequence[int]) -> AnswerScores:
    target = torch.tensor(answer)
    nll = -log_probabilities.gather(-1, target[:, None]).double().mean()
    right = (log_probabilities.argmax(-1) == target).double().mean()
    return AnswerScores(float(nll), float(right))


@dataclass(frozen=True, eq=False)
class EditEvaluation:
    """Questions asked before and after an edit, one row each.

    Attributes:
        rows: Questions that do not count have `counted` 0 and enter no figure: those whose conditions the unedited
            model did not know, and neighbourhood questions about a subject that was edited, too.
        fluency: Entropy of n-grams of generated text by request, before and after; empty if not measured.
    """

    method: str
    rows: tuple[EditRow, ...]
    fluency: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    seed: int = 0

    @property
    def kinds(self) -> list[str]:
        return [kind for kind in KINDS if any(row.kind == kind for row in self.rows)]

    def left(self, kind: str) -> tuple[int, int]:
        """Number of questions that count, and of all questions."""
        own = [row for row in self.rows if row.kind == kind]
        return sum(row.counted for row in own), len(own)

    def by_request(self, kind: str, value: Callable[[EditRow], float]) -> dict[str, float]:
        """The mean of a value over each request's questions of a kind that count."""
        values: dict[str, list[float]] = {}
        for row in self.rows:
            if row.kind == kind and row.counted:
                values.setdefault(row.example, []).append(value(row))
        return {example: float(np.mean(own)) for example, own in values.items()}

    def success(self, kind: str, before: bool = False) -> Interval:
        """Share of questions whose right answer is likelier than the other, averaged by request: Wilson interval."""
        return wilson_share(self._values(kind, lambda row: float(row.success_before if before else row.success)))

    def accuracy(self, kind: str, before: bool = False) -> Interval:
        """Share of the right answer's tokens that are the likeliest under teacher forcing."""
        return wilson_share(self._values(kind, lambda row: row.accuracy_before if before else row.accuracy))

    def magnitude(self, kind: str, before: bool = False) -> Interval:
        """Mean of P(right) - P(other), P being the geometric mean over an answer's tokens."""
        values = self._values(kind, lambda row: row.magnitude_before if before else row.magnitude)
        return bootstrap_mean(values, seed=self.seed)

    def _values(self, kind: str, value: Callable[[EditRow], float]) -> Float[np.ndarray, "requests"]:
        return np.array(list(self.by_request(kind, value).values()))

    @property
    def score(self) -> Interval:
        """Harmonic mean of efficacy, paraphrase and neighbourhood success, over requests that have all three.

        The interval is that of the mean linearised in each request (delta method), cut at 0 and 1.
        """
        parts = [self.by_request(kind, lambda row: float(row.success)) for kind in HARMONIC]
        shared = [example for example in parts[0] if all(example in part for part in parts)]
        if not shared:
            why = "no request has paraphrase and neighbourhood questions that count"
            return Interval.withheld(float("nan"), 0, why)
        table = np.array([[part[example] for part in parts] for example in shared])
        means = table.mean(0)
        if not means.all():
            return Interval.withheld(0.0, len(shared), "a share is 0")
        harmonic = len(HARMONIC) / (1 / means).sum()
        linear = harmonic + ((table - means) * harmonic**2 / len(HARMONIC) / means**2).sum(1)
        interval = bootstrap_mean(linear, seed=self.seed)
        if interval.reason:
            return interval
        return replace(interval, low=max(0.0, interval.low), high=min(1.0, interval.high))

    def fluency_change(self) -> Interval:
        """Mean change of the entropy of n-grams (bits); NaN where fluency was not measured."""
        return bootstrap_mean(np.array([after - before for before, after in self.fluency.values()]), seed=self.seed)

    def table(self) -> str:
        """Success, magnitude and accuracy by kind, as text."""
        rows = [
            [
                kind,
                self.success(kind),
                f"{self.success(kind, before=True).value:.3f}",
                self.magnitude(kind),
                self.accuracy(kind),
                "{} of {}".format(*self.left(kind)),
            ]
            for kind in self.kinds
        ]
        columns = ["", "success", "before", "P(right) - P(other)", "accuracy", "questions"]
        lines = [text_table(columns, rows), f"harmonic mean of the first three: {self.score}"]
        if self.fluency:
            lines.append(f"change of the n-gram entropy of generated text: {self.fluency_change()} bits")
        return "\n".join(lines)

    def facts(self) -> dict[str, object]:
        """The figures as written to a summary."""
        kinds = {
            kind: {
                "success": self.success(kind).as_list(),
                "success_before": self.success(kind, True).as_list(),
                "magnitude": self.magnitude(kind).as_list(),
                "accuracy": self.accuracy(kind).as_list(),
                "questions": self.left(kind)[0],
                "questions_asked": self.left(kind)[1],
            }
            for kind in self.kinds
        }
        fluent = {"fluency_change": self.fluency_change().as_list()} if self.fluency else {}
        return {"kinds": kinds, "score": self.score.as_list(), **fluent}

    def write(self, path: str | Path, provenance: Provenance) -> None:
        """Write the rows to a parquet file."""
        write_rows([(list(self.rows), provenance)], Path(path), kind=EditRow)


def evaluate_edit(
    model: LanguageModel,
    requests: Sequence[EditRequest],
    edit: Delta | Around,
    method: str = "",
    fluent: FluencySettings | None = None,
    seed: int = 0,
    edited_with: Sequence[EditRequest] = (),
    known: dict[tuple[str, str], AnswerScores] | None = None,
) -> EditEvaluation:
    """Ask every request's questions of the unedited and of the edited model.

    Args:
        requests: Facts with their questions; the edited prompt itself is one of them.
        edit: A delta of all requests, or a function of a request that gives the context in which it is edited alone,
            such as `lambda request: sp.splice(model, sae, …)` or `lambda request: sp.edited(model, deltas[request])`.
        method: Name in the rows; the delta's by default.
        fluent: How text is generated to measure fluency; None: it is not measured.
        edited_with: Further requests that a delta makes. A neighbourhood question about a subject that the same delta
            edits is not about a neighbour, and does not count.
        known: Scores of the unedited model by prompt and answer, which are looked up and added to, so that several
            evaluations of one model ask it once.

    Raises:
        UserError: no requests, two of one name, a delta of another model, or an answer that has no tokens of its own.

    Sources: metrics of Meng et al. 2022 (CounterFact); Cohen et al. 2024, "Evaluating the Ripple Effects of Knowledge
    Editing"; Berglund et al. 2024, "The Reversal Curse".
    """
    if not requests:
        raise UserError("there are no requests: give at least one")
    twice, times = Counter(_name(request) for request in requests).most_common(1)[0]
    if times > 1:  # their questions would be averaged as one request's
        raise UserError(f"{times} requests are called {twice!r}: give each an example name of its own")
    name = method or (edit.method if isinstance(edit, Delta) else "edit")
    questions = [(request, question) for request in requests for question in request.all_questions]
    known = {} if known is None else known
    conditions = [pair for _, question in questions for pair in question.conditions]
    new = [pair for pair in [*_pairs([q for _, q in questions]), *conditions] if pair not in known]
    known |= zip(new, score_answers(model, new), strict=True)
    before = [(known[q.prompt, q.target], known[q.prompt, q.other]) for _, q in questions]
    subjects = {each.subject for each in (*requests, *edited_with)} if isinstance(edit, Delta) else set()
    held = [all(known[pair].accuracy == 1 for pair in question.conditions) for _, question in questions]
    counted = [holds and not _names(question, subjects) for holds, (_, question) in zip(held, questions, strict=True)]
    groups = [list(requests)] if isinstance(edit, Delta) else [[request] for request in requests]
    after: list[tuple[AnswerScores, AnswerScores]] = []
    fluency_before = fluency(model, requests, fluent) if fluent else []
    fluency_after: list[float] = []
    for group in groups:
        around: AbstractContextManager[object] = edited(model, edit) if isinstance(edit, Delta) else edit(group[0])
        with around:
            after += _ask(model, [question for request in group for question in request.all_questions])
            fluency_after += fluency(model, group, fluent) if fluent else []
    rows = [
        _row(model, name, *question, old, new, counts)
        for question, old, new, counts in zip(questions, before, after, counted, strict=True)
    ]
    measured = dict(zip(map(_name, requests), zip(fluency_before, fluency_after, strict=True))) if fluent else {}
    return EditEvaluation(name, tuple(rows), measured, seed)


def _name(request: EditRequest) -> str:
    return request.example or request.subject


def _row(
    model: LanguageModel,
    method: str,
    request: EditRequest,
    question: FactQuestion,
    before: tuple[AnswerScores, AnswerScores],
    after: tuple[AnswerScores, AnswerScores],
    counts: bool,
) -> EditRow:
    return EditRow(
        example=_name(request),
        method=method,
        kind=question.kind,
        prompt=question.prompt,
        target=question.target,
        other=question.other,
        target_nll_before=before[0].nll,
        other_nll_before=before[1].nll,
        accuracy_before=before[0].accuracy,
        target_nll=after[0].nll,
        other_nll=after[1].nll,
        accuracy=after[0].accuracy,
        counted=int(counts),
        precision=precision_of(model.hf)[0],
    )


def _ask(model: LanguageModel, questions: Sequence[FactQuestion]) -> list[tuple[AnswerScores, AnswerScores]]:
    """Scores of the right and of the other answer to each question."""
    scores = score_answers(model, _pairs(questions))
    return list(zip(scores[::2], scores[1::2], strict=True))


def _pairs(questions: Sequence[FactQuestion]) -> list[tuple[str, str]]:
    return [(question.prompt, answer) for question in questions for answer in (question.target, question.other)]


def _names(question: FactQuestion, subjects: Collection[str]) -> bool:
    """Whether a neighbourhood question is about one of the edited subjects."""
    words = (rf"(?<!\w){re.escape(subject.strip())}(?!\w)" for subject in subjects)
    return question.kind == "neighbourhood" and any(re.search(word, question.prompt) for word in words)


def joined(evaluations: Sequence[EditEvaluation]) -> EditEvaluation:
    """Evaluations of different requests by one method as one."""
    rows = tuple(row for each in evaluations for row in each.rows)
    measured = {name: both for each in evaluations for name, both in each.fluency.items()}
    return replace(evaluations[0], rows=rows, fluency=measured)
