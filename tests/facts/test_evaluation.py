"""Questions before and after an edit, by hand; sequences of edits."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_model

import saepatch as sp
from saepatch.data.edit_requests import FactQuestion
from saepatch.facts.delta import Delta, WeightChange
from saepatch.facts.evaluation import EditEvaluation, joined, score_answers
from saepatch.facts.generation import ngram_entropy
from saepatch.facts.sequence import edit_in_sequence, text_loss
from saepatch.records.provenance import Provenance
from saepatch.records.rows import EditRow, read_rows

REQUESTS = [
    sp.EditRequest(
        "The {} in",
        subject,
        " R",
        " Pa",
        subject,
        (
            FactQuestion("paraphrase", f"See {subject} in", " R", " Pa"),
            FactQuestion("neighbourhood", "The Prado in", " Pa", " R"),
            FactQuestion("ripple", f"{subject} lies", " It", " F", (("a", "b"), ("c", "d"))),
        ),
    )
    for subject in ("Louvre", "Orsay", "Opera")
]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def some_delta(model, scale=0.3):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 1, dtype=torch.float64, generator=generator) for n in (16, 32))
    return Delta.none(model, "random").then([WeightChange(1, scale * left, right, right)], ["x"])


def by_hand(model, prompt, answer):
    ids = model.encode(prompt)
    target = model.encode(prompt + answer)[len(ids) :]
    scores = model.logits(model.pad([ids + target]))[0, len(ids) - 1 : -1].log_softmax(-1)
    own = scores[torch.arange(len(target)), target]
    return float(-own.mean()), float((scores.argmax(-1) == torch.tensor(target)).double().mean())


def test_answers_are_scored_as_whole_passes_score_them(model):
    asked = [("The Louvre in", " R"), ("The Louvre in", " Pa"), ("A", " long answer"), ("The Louvre in", " R")]
    scores = score_answers(model, asked)
    for (prompt, answer), score in zip(asked, scores, strict=True):
        nll, accuracy = by_hand(model, prompt, answer)
        assert (score.nll, score.accuracy) == (pytest.approx(nll, abs=1e-4), accuracy)


def test_rows_hold_scores_before_and_after(model):
    delta = some_delta(model)
    result = sp.evaluate_edit(model, REQUESTS, delta, fluent=sp.FluencySettings(tokens=5))
    assert len(result.rows) == 12
    for row in result.rows[:4]:
        assert row.target_nll_before == pytest.approx(by_hand(model, row.prompt, row.target)[0], abs=1e-4)
        with sp.edited(model, delta):
            assert row.target_nll == pytest.approx(by_hand(model, row.prompt, row.target)[0], abs=1e-4)
            assert row.other_nll == pytest.approx(by_hand(model, row.prompt, row.other)[0], abs=1e-4)
    assert result.left("ripple") == (0, 3)  # a random model knows no condition
    assert np.isnan(result.success("ripple").value)
    assert set(result.fluency) == {"Louvre", "Orsay", "Opera"}
    alone = [sp.evaluate_edit(model, [request], lambda _: sp.edited(model, delta)) for request in REQUESTS]
    for one, other in zip(joined(alone).rows, result.rows, strict=True):
        assert one.target_nll == pytest.approx(other.target_nll, abs=1e-4)


def test_no_edit_changes_nothing(model):
    result = sp.evaluate_edit(model, REQUESTS, lambda _: nullcontext())
    for row in result.rows:
        assert row.target_nll == pytest.approx(row.target_nll_before, abs=1e-5)  # other rows are in the batch
        assert row.other_nll == pytest.approx(row.other_nll_before, abs=1e-5)


def test_a_ripple_counts_only_if_every_condition_held(model):
    """Conditions after a failed one are still read, so that later questions get their own."""
    prompts = [f"The {letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    likely = model.token_texts(model.next_logits(model.tokenize(prompts)).argmax(-1).tolist())
    prompt, answer = next(pair for pair in zip(prompts, likely, strict=True) if len(pair[1]) == 1 and pair[1].isascii())
    known, unknown = (prompt, answer), (prompt, "b" if answer != "b" else "c")
    questions = [
        FactQuestion("ripple", "x", " a", " b", conditions)
        for conditions in ((unknown, known), (known,), (known, unknown), (known, known), ())
    ]
    result = sp.evaluate_edit(model, [replace(REQUESTS[0], questions=tuple(questions))], lambda _: nullcontext())
    assert [row.counted for row in result.rows] == [1, 0, 1, 0, 1, 1]


def test_a_neighbour_that_is_edited_too_does_not_count(model):
    """Otherwise many edits in one delta would seem to break what they were meant to change."""
    near = (
        FactQuestion("neighbourhood", "The Orsay in", " Pa", " R"),
        FactQuestion("neighbourhood", "The Orsays", " Pa", " R"),
    )
    request = replace(REQUESTS[0], questions=near)
    delta = some_delta(model)

    def counted(result):
        return [row.counted for row in result.rows if row.kind == "neighbourhood"]

    assert counted(sp.evaluate_edit(model, [request, REQUESTS[1]], delta)) == [0, 1, 1]
    assert counted(sp.evaluate_edit(model, [request], delta, edited_with=REQUESTS)) == [0, 1]
    assert counted(sp.evaluate_edit(model, [request, REQUESTS[1]], lambda _: nullcontext())) == [1, 1, 1]


def row(example, kind, target, other, **more):
    return EditRow(example, "m", kind, "p", "t", "o", 2.0, 1.0, 0.0, target, other, 1.0, **more)


def test_figures_are_means_over_requests():
    rows = [row(f"r{i}", "efficacy", 0.1, 1.0 if i < 5 else 0.05) for i in range(10)]
    rows += [row(f"r{i}", "paraphrase", 0.1, other) for i in range(10) for other in (1.0, 0.05)]
    rows += [row(f"r{i}", "neighbourhood", 0.1, 1.0) for i in range(10)]
    rows += [row("r0", "ripple", 0.1, 1.0), row("r0", "ripple", 3.0, 1.0, counted=0)]
    result = EditEvaluation("m", tuple(rows))
    assert [result.success(kind).value for kind in result.kinds] == [0.5, 0.5, 1.0, 1.0]
    assert result.success("efficacy", before=True).value == 0
    assert result.score.value == pytest.approx(3 / (1 / 0.5 + 1 / 0.5 + 1))
    assert result.score.low < result.score.value < result.score.high
    uneven = [row(f"r{i}", "neighbourhood", 0.1, 1.0 if i % 4 == 0 else 0.05) for i in range(10)]
    spread = EditEvaluation("m", (*(each for each in rows if each.kind != "neighbourhood"), *uneven)).score
    assert 0 <= spread.low < spread.value < spread.high <= 1
    assert result.magnitude("neighbourhood").value == pytest.approx(np.exp(-0.1) - np.exp(-1))
    assert result.left("ripple") == (1, 2)
    assert "1 of 2" in result.table()
    assert result.facts()["kinds"]["paraphrase"]["success"][0] == 0.5


def test_rows_are_written_with_provenance(model, tmp_path):
    result = sp.evaluate_edit(model, REQUESTS[:1], some_delta(model))
    result.write(tmp_path / "rows.parquet", Provenance(model.name, model.fingerprint, "", "", 0))
    rows = read_rows(tmp_path / "rows.parquet")
    assert [each["kind"] for each in rows] == ["efficacy", "paraphrase", "neighbourhood", "ripple"]
    assert {each["model_hash"] for each in rows} == {model.fingerprint}


def test_entropy_of_ngrams():
    assert ngram_entropy([1] * 20) == 0
    distinct = ngram_entropy(list(range(18)))
    assert distinct == pytest.approx((2 / 3 * np.log2(17) + 4 / 3 * np.log2(16)) / 2)
    assert ngram_entropy([1, 2] * 9) < distinct


def test_a_sequence_measures_all_edits_so_far(model):
    texts = ["a cat is in the house", "the dog is in"]
    reference = sp.Covariances.over(model, [1], texts, ridge=0.1)
    method = sp.Rome(1, prefixes=sp.Sampled(()), search=sp.ValueSearch(steps=2))
    fingerprint = model.fingerprint
    steps = list(edit_in_sequence(model, REQUESTS, method, reference, texts, checkpoints=(1, 3, 10)))
    assert [step.edits for step in steps] == [1, 3]
    assert [len(step.evaluation.rows) for step in steps] == [4, 12]
    assert steps[1].delta.examples == ("Louvre", "Orsay", "Opera")
    at_once = sp.edit_facts(model, REQUESTS, method, reference)
    assert torch.allclose(steps[1].delta.changes[0].matrix, at_once.changes[0].matrix, atol=1e-6)
    assert model.fingerprint == fingerprint
    assert steps[1].norms[1] > 0
    (last,) = edit_in_sequence(model, REQUESTS, method, reference, texts, (1, 3), start=steps[0].delta)
    assert (last.edits, last.delta.examples) == (3, steps[1].delta.examples)
    assert torch.equal(last.delta.changes[0].matrix, steps[1].delta.changes[0].matrix)
    with pytest.raises(sp.UserError, match="rising order"):
        list(edit_in_sequence(model, REQUESTS, method, reference, texts, checkpoints=(3, 1)))


def test_loss_of_texts(model):
    texts = ["a cat", "the dog is in"]
    total = sum(by_hand(model, "", text)[0] * len(text) for text in texts)
    assert text_loss(model, texts) == pytest.approx(total / sum(map(len, texts)), abs=1e-4)


def test_answers_to_one_prompt_share_a_pass(model, monkeypatch):
    asked = [("The Louvre in", " R"), ("The Louvre in", " P"), ("A", " R"), ("The Louvre in", " Pa")]
    run, rows = type(model).logits_of_continuations, []

    def counted(self, prompts, continuations):
        rows.append(len(prompts))
        return run(self, prompts, continuations)

    apart = [score_answers(model, [each])[0] for each in asked]
    monkeypatch.setattr(type(model), "logits_of_continuations", counted)
    together = score_answers(model, asked)
    assert [score.nll for score in together] == pytest.approx([score.nll for score in apart], abs=1e-5)
    assert rows == [len({(prompt, answer[:-1]) for prompt, answer in asked})]


def test_known_scores_of_the_unedited_model_are_used_again(model, monkeypatch):
    known = {}
    first = sp.evaluate_edit(model, REQUESTS[:1], some_delta(model), known=known)
    assert len(known) == 10  # four questions of two answers each, two conditions
    asked = []

    def counted(model, pairs):
        asked.extend(pairs)
        return score_answers(model, pairs)

    monkeypatch.setattr("saepatch.facts.evaluation.score_answers", counted)
    again = sp.evaluate_edit(model, REQUESTS, some_delta(model), known=known)
    assert [row.target_nll for row in again.rows[:4]] == pytest.approx([row.target_nll for row in first.rows], abs=1e-5)
    before_and_after = len([pair for pair in asked if pair in known])
    assert before_and_after == 2 * 12 + len(known) - 10  # the edited model's, and what was not known


def test_nothing_to_evaluate_is_refused(model):
    with pytest.raises(sp.UserError, match="no requests"):
        sp.evaluate_edit(model, [], some_delta(model))


def test_two_requests_of_one_name_are_refused(model):
    """Their questions would be averaged as those of one."""
    facts = [sp.EditRequest(prompt, "Louvre", " R", " Pa") for prompt in ("The {} in", "Near the {} in")]
    with pytest.raises(sp.UserError, match="2 requests are called 'Louvre': give each an example name"):
        sp.evaluate_edit(model, facts, some_delta(model))
    named = [replace(fact, example=str(number)) for number, fact in enumerate(facts)]
    assert sp.evaluate_edit(model, named, some_delta(model)).success("efficacy").n == 2
