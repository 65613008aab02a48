"""The experiment on facts, its verdicts, and its benchmark."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_model

import saepatch as sp
from experiments.benchmarks import facts as benchmark
from experiments.facts.claims import (
    NOT_SHOWN,
    OPPOSITE,
    SHOWN,
    claims,
    differences_to_rome,
    judged,
    paired,
    still_hold,
)
from experiments.facts.stages import MeasuredSequence, SequenceMeasure, correlation
from experiments.facts.study import FactsConfig, best, main
from experiments.facts.vocabulary import OTHERS, only_tokens, probability_of, tokens_of
from experiments.facts.world import world_requests
from saepatch.facts.evaluation import EditEvaluation
from saepatch.records.rows import EditRow, read_rows
from saepatch.records.statistics import Interval

pytestmark = pytest.mark.whole


def evaluation(kinds, facts=20):
    """Every kind's P(right) - P(other) is about the given number, with a little spread over facts."""
    rows = []
    for kind, gap in kinds.items():
        for number in range(facts):
            right = 0.5 + (gap + 0.01 * (number % 7 - 3)) / 2
            row = EditRow(f"f{number}", "m", kind, kind, "t", "o", 1, 1, 0, -np.log(right), -np.log(1 - right), 1.0)
            rows.append(row)
    return EditEvaluation("m", tuple(rows))


def run_of(name, *steps):
    return MeasuredSequence(name, tuple(SequenceMeasure(n, evaluation(kinds), 1.0, {"1": 0.1}) for n, kinds in steps))


def test_verdicts_follow_the_intervals():
    good, bad = {"efficacy": 0.9, "neighbourhood": 0.9}, {"efficacy": 0.2, "neighbourhood": -0.3}
    singles = {"ROME": evaluation(good | {"reversal": -0.9, "ripple": 0.9}, facts=100)}
    sequences = [
        run_of("ROME", (1, good), (10, good), (30, bad)),
        run_of("MEMIT, 1 layer", (1, good), (10, good), (30, good)),
        run_of("MEMIT", (1, good), (10, good), (30, bad)),
    ]
    verdicts = {
        (each.claim, each.measured.partition(",")[0]): each
        for each in claims(singles, sequences, ("MEMIT, 1 layer", "MEMIT"))
    }
    assert verdicts["Single edits have an efficacy of 95 %", "ROME"].verdict == SHOWN
    degraded = verdicts["Editing degrades after about ten", "efficacy"]
    assert verdicts["No reversal", "ROME"].verdict == SHOWN
    assert verdicts["No ripple", "ROME"].verdict == OPPOSITE
    spread = verdicts["Spreading over layers helps", "efficacy: MEMIT minus MEMIT"]
    assert (spread.verdict, round(spread.figure.value, 2)) == (OPPOSITE, -0.7)
    assert degraded.measured.startswith("efficacy, MEMIT, 1 layer")  # the later of two with that name
    assert degraded.verdict == NOT_SHOWN
    assert judged("c", "m", Interval.withheld(0.9, 2, "few"), 0.5).verdict == NOT_SHOWN


def test_degradation_is_judged_where_neighbours_still_count():
    good, bad = {"efficacy": 0.9, "neighbourhood": 0.9}, {"efficacy": 0.2, "neighbourhood": -0.3}
    last = evaluation(bad)
    edited = tuple(replace(row, counted=int(row.kind == "efficacy")) for row in last.rows)
    run = run_of("ROME", (10, good), (30, bad), (100, bad))
    steps = (*run.steps[:2], replace(run.steps[2], evaluation=replace(last, rows=edited)))
    judgements = claims({"ROME": evaluation(good)}, [replace(run, steps=steps)], ("MEMIT, 1 layer", "MEMIT"))
    texts = [each.measured for each in judgements if each.claim.startswith("Editing degrades")]
    assert [text.partition(": ")[2] for text in texts] == [
        "the first 10 edits after 100 minus after 10",
        "the first 10 edits after 30 minus after 10",
    ]


def test_earlier_edits_and_differences_to_rome():
    """Of a sequence of four edits, the first holds, the second does not; MEMIT is better by what is put in."""
    measured = evaluation({"efficacy": 0.5, "neighbourhood": 0.4}, facts=8)
    lost = tuple(
        replace(row, target_nll=row.other_nll, other_nll=row.target_nll) if row.example == "f1" else row
        for row in measured.rows
    )
    step = SequenceMeasure(8, replace(measured, rows=lost), 1.0, {"1": 0.1})
    assert still_hold(step, 1).value == 1
    assert still_hold(step, 2).value == 0.5
    assert still_hold(step, 4).n == 4
    sequences = [
        run_of("ROME", (1, {"efficacy": 0.5, "neighbourhood": 0.4}), (10, {"efficacy": 0.5, "neighbourhood": 0.4})),
        run_of("MEMIT", (10, {"efficacy": 0.8, "neighbourhood": 0.1}), (30, {"efficacy": 0.8, "neighbourhood": 0.1})),
    ]
    beside = differences_to_rome(sequences)
    assert list(beside) == ["MEMIT"]
    assert list(beside["MEMIT"]) == [10]
    assert beside["MEMIT"][10]["efficacy"].value == pytest.approx(0.3)
    assert beside["MEMIT"][10]["neighbourhood"].value == pytest.approx(-0.3)
    assert differences_to_rome(sequences[1:]) == {"MEMIT": {}}


def test_differences_are_over_the_questions_that_count_in_both():
    early, late = (evaluation({"neighbourhood": gap}) for gap in (0.9, 0.2))
    rows = [replace(row, counted=int(i % 2)) for i, row in enumerate(late.rows)]
    assert paired(replace(late, rows=tuple(rows)), early, "neighbourhood").n == 10


def test_the_best_place_and_correlations():
    measured = {"subject/0": evaluation({"efficacy": 0.1}), "last/2": evaluation({"efficacy": 0.6})}
    assert best(measured) == ("last", 2)
    assert correlation([0.0, 1.0, 2.0], [1.0, 3.0, 5.0]) == pytest.approx(1)
    assert np.isnan(correlation([0.0, 1.0], [1.0, 1.0]))


def test_facts_of_the_world_ask_what_follows_from_them():
    requests = world_requests()
    assert len(requests) > 250
    assert len({request.example for request in requests}) == len(requests)
    assert len({request.prompt for request in requests[:6]}) == 6  # relations take turns
    by_name = {request.example: request for request in requests}
    for request in requests:
        kinds = [question.kind for question in request.questions]
        assert (kinds.count("paraphrase"), kinds.count("neighbourhood")) == (1, 2)
        assert all(question.target != question.other for question in request.questions)
        assert ("reversal" in kinds) == request.example.startswith(("capital", "landmark"))
    tower = by_name["landmark-Eiffel Tower"]
    asked = {question.kind: question for question in tower.questions}
    assert asked["ripple"].other == " France"
    assert asked["reversal"].prompt == f"A famous landmark in the city of{tower.target} is the"
    assert asked["reversal"].target == " Eiffel Tower"


def test_tokens_that_are_left_out_have_no_probability():
    model = tiny_model("llama")
    request = sp.EditRequest("The {} in", "Ox", " R", " P")
    tokens = tokens_of(model, [request], ["a cat"])
    whole = model.next_logits([request.text])[0]
    with only_tokens(model, tokens):
        few = model.next_logits([request.text])[0]
    assert torch.allclose(few[tokens], whole[tokens], atol=1e-5)
    others = [token for token in range(len(whole)) if token not in tokens]
    assert (few[others] == OTHERS).all()
    assert probability_of(model, [request], tokens) == pytest.approx(float(whole.softmax(-1)[tokens].sum()), abs=1e-5)
    assert torch.equal(model.next_logits([request.text])[0], whole)


@pytest.mark.slow
def test_the_benchmarks_original_agrees_with_ours(capsys, tmp_path):
    small = {"layers": 3, "width": 32, "heads": 4, "vocabulary": 200}
    config = benchmark.FactBenchmarkConfig(
        **small, facts=3, loop=2, steps=3, edited=(0, 1), texts=4, tokens=8, out=str(tmp_path)
    )
    benchmark.run(config)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["worst_loss"] < 1e-4
    assert summary["worst_delta"] < 1e-9
    assert summary["worst_covariance"] < 1e-5
    assert "original_over_edit" in capsys.readouterr().out


@pytest.mark.parametrize("methods", [("MEMIT",), ("ROME", "ROM")])
def test_methods_that_cannot_be_compared_are_refused(methods):
    with pytest.raises(sp.UserError, match="name ROME and any of ROME-original"):
        FactsConfig(methods=methods)


@pytest.mark.slow
def test_a_small_run_is_reported_and_resumes(tmp_path, monkeypatch):
    config = FactsConfig(
        out=str(tmp_path), layers=(4, 5), token="last", choose=6, singles=3, checkpoints=(1, 2), steps=3, threshold=0.15
    )
    main(config)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["single_edits"]) >= {
        "ROME",
        "ROME, original",
        "MEMIT",
        "EMMET",
        "AlphaEdit",
        "patch all latents",
    }
    assert {row["kind"] for row in read_rows(tmp_path / "results.parquet")} >= {"efficacy", "ripple"}
    assert set(summary["sequences"]["ROME"]) == {"1", "2"}
    assert "Does the trace tell where to edit?" in (tmp_path / "report.html").read_text()
    monkeypatch.setattr("experiments.facts.study.single_edits", lambda *_, **__: pytest.fail("measured again"))
    main(config)
    with pytest.raises(sp.UserError, match="knows 47 of 47 facts"):
        main(FactsConfig(out=str(tmp_path / "more"), choose=40, singles=40))
