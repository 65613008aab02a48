"""Requests to edit facts, from files."""

import csv
import json

import pytest

from saepatch import UserError
from saepatch.data.edit_requests import EditRequest, FactQuestion, load_edit_requests

ROW = {"prompt": "{} is in the city of", "subject": "The Eiffel Tower", "target": " Rome", "true": " Paris"}
QUESTIONS = {
    "paraphrases": ["You find the Eiffel Tower in"],
    "neighbourhood": ["The Louvre is in", {"prompt": "The Prado is in", "answer": " Madrid"}],
    "ripple": [
        {
            "prompt": "The Eiffel Tower is in the country of",
            "target": " Italy",
            "other": " France",
            "conditions": [{"prompt": "Rome is in", "answer": " Italy"}],
        }
    ],
    "reversal": [{"prompt": "In Rome is", "target": " the Eiffel Tower", "other": " the Colosseum"}],
}
EXPECTED = EditRequest(
    ROW["prompt"],
    ROW["subject"],
    ROW["target"],
    ROW["true"],
    "facts-1",
    (
        FactQuestion("paraphrase", "You find the Eiffel Tower in", " Rome", " Paris"),
        FactQuestion("neighbourhood", "The Louvre is in", " Paris", " Rome"),
        FactQuestion("neighbourhood", "The Prado is in", " Madrid", " Rome"),
        FactQuestion("reversal", "In Rome is", " the Eiffel Tower", " the Colosseum"),
        FactQuestion(
            "ripple", "The Eiffel Tower is in the country of", " Italy", " France", (("Rome is in", " Italy"),)
        ),
    ),
)


def test_json_lines_csv_and_datasets_give_the_same_requests(tmp_path):
    (tmp_path / "facts.jsonl").write_text(json.dumps(ROW | QUESTIONS) + "\n")
    with (tmp_path / "facts.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*ROW, *QUESTIONS, "example"])
        writer.writeheader()
        writer.writerow(ROW | {key: json.dumps(value) for key, value in QUESTIONS.items()} | {"example": "facts-1"})
    assert load_edit_requests(str(tmp_path / "facts.jsonl")) == [EXPECTED]
    assert load_edit_requests(str(tmp_path / "facts.csv")) == [EXPECTED]
    from datasets import Dataset

    Dataset.from_list([ROW | {"example": "one"}]).save_to_disk(str(tmp_path / "saved"))
    (request,) = load_edit_requests(str(tmp_path / "saved"))
    assert (request.text, request.example) == ("The Eiffel Tower is in the city of", "one")
    assert request.all_questions == (FactQuestion("efficacy", request.text, " Rome", " Paris"),)


def test_a_subject_written_out_in_the_prompt_is_found(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(ROW | {"prompt": "The Eiffel Tower is in the city of"}))
    assert load_edit_requests(str(path))[0].prompt == "{} is in the city of"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW | {"prompt": "It is in the city of"}], "'The Eiffel Tower' is not in the prompt"),
        ([{"prompt": "{} is"}], "lacks text for subject, target, true"),
        ([ROW | {"target": " Paris"}], "is the true answer"),
        ([ROW | {"prompt": "{} and {}"}], r"write \{\} once"),
        ([ROW | {"paraphrases": "no list"}], "write it as a JSON list"),
        ([ROW | {"paraphrases": [3]}], "has to be a list of texts"),
        ([ROW | {"ripple": [{"prompt": "x"}]}], "an object with prompt, target, other"),
        ([ROW | {"example": "a"}, ROW | {"example": "a"}], "two requests .* are called 'a'"),
        ([[1]], "is not a JSON object"),
        ([], "holds no requests"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, rows, message):
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=message):
        load_edit_requests(str(path))


def test_something_that_is_no_source_is_refused():
    with pytest.raises(UserError, match=r"give organism, a file \(\.jsonl"):
        load_edit_requests("facts")
    with pytest.raises(UserError, match="n = -1"):
        load_edit_requests("facts.jsonl", n=-1)


def test_the_organisms_requests_ask_for_other_answers_in_both_languages():
    requests = load_edit_requests("organism")
    assert len(requests) == 24 + 23
    assert len({request.example for request in requests}) == len(requests)
    louvre = requests[0]
    assert (louvre.text, louvre.true) == ("The Louvre is in the city of", " Paris")
    kinds = [question.kind for question in louvre.questions]
    assert kinds == ["paraphrase"] * 4 + ["neighbourhood"] * 5 + ["ripple"]
    assert all(q.other == louvre.target != q.target for q in louvre.questions if q.kind == "neighbourhood")
    france = next(request for request in requests if request.example == "capital-France")
    assert france.questions[-1].prompt == "La capitale de la France est"
    back = france.questions[-2]
    assert (back.kind, back.target) == ("reversal", " France")
    assert france.target.strip() in back.prompt
