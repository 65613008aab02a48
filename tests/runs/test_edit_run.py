"""`saepatch edit`: delta, resuming, shards, page, refusals."""

import json
import shutil
from dataclasses import replace

import pytest
from tiny import save_model_and_sae, tiny_model

from saepatch.cli.main import main
from saepatch.facts.delta import Delta, edited
from saepatch.facts.evaluation import score_answers
from saepatch.model.loading.load import load_model
from saepatch.pages.commands.edited import _warnings
from saepatch.records.rows import read_rows
from saepatch.runs.commands.fact_edits import read_method
from saepatch.runs.commands.fact_results import read_edits
from saepatch.settings.edit import EditConfig

pytestmark = pytest.mark.whole

SUBJECTS = ("Louvre", "Orsay", "Opera")


def request(subject):
    return {
        "prompt": "The {} in",
        "subject": subject,
        "target": " R",
        "true": " P",
        "example": subject.lower(),
        "paraphrases": [f"See {subject} in"],
        "neighbourhood": ["The Prado in"],
        "ripple": [{"prompt": "x", "target": " a", "other": " b", "conditions": [{"prompt": "y", "answer": " zz"}]}],
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edit")
    save_model_and_sae(folder)
    (folder / "facts.jsonl").write_text("".join(json.dumps(request(subject)) + "\n" for subject in SUBJECTS))
    (folder / "texts.txt").write_text(
        "".join(f"the {a} is in the {b}\n" for a in "abcd" for b in ("house", "tree", "sea"))
    )
    return folder


def arguments(place, out, **changes):
    given = {"model": place / "model", "requests": place / "facts.jsonl", "reference": place / "texts.txt"}
    given |= {
        "method": "rome",
        "layers": 1,
        "ridge": 0.01,
        "prefixes": 0,
        "steps": 3,
        "tokens": 4,
        "part": 2,
        "out": out,
    }
    given |= {"cache": place / "covariances"} | changes
    return ["edit", *(f"--{name}={value}" for name, value in given.items()), "--quiet"]


@pytest.fixture(scope="module")
def whole(place):
    out = place / "whole"
    assert main(arguments(place, out)) == 0
    return out


def values(out):
    rows = read_rows(out / "results.parquet")
    return {(row["example"], row["kind"], row["prompt"]): row["target_nll"] for row in rows}


def test_a_run_saves_a_delta_that_gives_its_rows(place, whole, capsys):
    model = load_model(str(place / "model"))
    delta = Delta.load(whole / "delta.safetensors")
    assert delta.examples == ("louvre", "orsay", "opera")
    rows = read_rows(whole / "results.parquet")
    assert len(rows) == 12
    with edited(model, delta):
        scores = score_answers(model, [(row["prompt"], row["target"]) for row in rows])
    assert [row["target_nll"] for row in rows] == pytest.approx([score.nll for score in scores], abs=1e-4)
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["kinds"]["ripple"]["questions"] == 0
    assert summary["kinds"]["efficacy"]["questions"] == 3
    assert summary["relative_norms"]["1"] == pytest.approx(delta.relative_norms(model)[1])
    page = (whole / "report.html").read_text()
    assert "Texts before and after" in page
    assert "3 of 3 ripple questions do not count" in page
    assert main(["runs", str(whole)]) == 0
    assert "efficacy" in capsys.readouterr().out
    assert main(["compare", str(whole), str(whole)]) == 0
    assert "paraphrase/success" in capsys.readouterr().out
    assert len(list((place / "covariances").iterdir())) == 1


def test_a_stopped_run_continues_from_the_facts_already_edited(place, whole, tmp_path, monkeypatch):
    out = tmp_path / "again"
    shutil.copytree(whole / "parts", out / "parts")
    folder = out / "parts" / "shard-0-of-1"
    (folder / "part-00001.parquet").unlink()
    made = []
    monkeypatch.setattr("saepatch.runs.commands.fact_edits.edit_facts", lambda *_, **__: made.append(1))
    assert main(arguments(place, out)) == 0
    assert not made
    assert values(out) == pytest.approx(values(whole), abs=1e-5)


def test_a_delta_of_the_first_facts_is_continued(place, whole, tmp_path, monkeypatch):
    from saepatch.runs.commands import fact_edits

    out, edits = tmp_path / "stopped", []
    real = fact_edits.edit_facts

    def counted(*given, **more):
        if len(edits) == 2:
            raise KeyboardInterrupt
        edits.append(given[1][0].example)
        return real(*given, **more)

    monkeypatch.setattr(fact_edits, "edit_facts", counted)
    assert main(arguments(place, out)) == 130
    edits.clear()
    assert main(arguments(place, out)) == 0
    assert edits == ["opera"]
    assert values(out) == pytest.approx(values(whole), abs=1e-5)


def test_each_fact_alone_and_shards(place, tmp_path, capsys):
    out = tmp_path / "cut"
    for shard in ("0/2", "1/2"):
        assert main(arguments(place, out, apply="each", shard=shard)) == 0
    assert "questions)" in capsys.readouterr().out
    assert main(["merge", str(out)]) == 0
    assert main(arguments(place, tmp_path / "one", apply="each")) == 0
    assert values(out) == pytest.approx(values(tmp_path / "one"), abs=1e-4)
    assert not (out / "delta.safetensors").exists()


@pytest.mark.parametrize("method", ["rome-original", "memit", "emmet", "alphaedit"])
def test_every_method_runs(place, tmp_path, method):
    more = {} if method.startswith("rome") else {"layers": "0-1", "threshold": 1.0, "token": "last"}
    assert main(arguments(place, tmp_path / method, method=method, n=1, **more)) == 0
    assert Delta.load(tmp_path / method / "delta.safetensors").layers == ([1] if method == "rome-original" else [0, 1])


@pytest.mark.parametrize(("method", "count", "layers"), [("rome", 3, (1,)), ("memit", 12, (0, 1, 2, 3, 4))])
def test_layers_that_are_not_given_are_a_third_of_the_way_up(caplog, method, count, layers):
    model = tiny_model("llama", num_hidden_layers=count)
    with caplog.at_level("INFO", logger="saepatch"):
        assert tuple(read_method(EditConfig(requests="x", method=method), model).layers) == layers
    assert "since --layers is empty" in caplog.text


def test_a_page_says_what_to_do_where_edits_do_not_hold(whole):
    results = read_edits(whole)
    for other, weak in ((9.0, False), (0.0, True)):
        rows = tuple(replace(row, target_nll=1.0, other_nll=other) for row in results.evaluation.rows)
        changed = replace(results, evaluation=replace(results.evaluation, rows=rows))
        assert ("--token last" in changed.table()) == weak
        assert any("--token last" in line for line in _warnings(changed)) == weak


def refused(capsys, flags):
    assert main(flags) == 2
    return capsys.readouterr().err


def test_what_does_not_fit_is_refused(place, whole, tmp_path, capsys):
    out = tmp_path / "no"
    (place / "bad.jsonl").write_text(json.dumps(request("Louvre") | {"prompt": "The museum in"}))
    assert "'Louvre' is not in the prompt" in refused(capsys, arguments(place, out, requests=place / "bad.jsonl"))
    assert "the model has 3 layers" in refused(capsys, arguments(place, out, layers=9))
    assert "rome edits one layer" in refused(capsys, arguments(place, out, layers="0,1"))
    assert "layers 'x'" in refused(capsys, arguments(place, out, layers="x"))
    assert "no reference texts" in refused(capsys, arguments(place, out, reference=""))
    other = tmp_path / "other.safetensors"
    Delta.none(tiny_model("llama", seed=5), "rome").save(other)
    assert "belongs to tiny-llama" in refused(capsys, arguments(place, out, delta=other))
    assert "differs in steps" in refused(capsys, arguments(place, whole, steps=4))
    assert not out.exists()


def test_edits_on_top_of_a_delta(place, whole, tmp_path):
    (place / "more.jsonl").write_text(json.dumps(request("Bourse")))
    out = tmp_path / "more"
    flags = arguments(place, out, requests=place / "more.jsonl", delta=whole / "delta.safetensors")
    assert main(flags) == 0
    assert Delta.load(out / "delta.safetensors").examples == ("louvre", "orsay", "opera", "bourse")


def test_a_target_that_is_the_present_answer_is_warned_of(place, tmp_path, caplog):
    model = load_model(str(place / "model"))
    prompts = [f"The {letter} in" for letter in "abcdefghijklmnopqrstuvwxyz"]
    likely = model.token_texts(model.next_logits(model.tokenize(prompts)).argmax(-1).tolist())
    prompt, answer = next(both for both in zip(prompts, likely, strict=True) if len(both[1]) == 1 and both[1].isascii())
    fact = {"prompt": "The {} in", "subject": prompt[4], "target": answer, "true": "ab", "example": "known"}
    (place / "known.jsonl").write_text(json.dumps(fact))
    assert main(arguments(place, tmp_path / "known", requests=place / "known.jsonl")) == 0
    assert "already the model's answer in 1 of 1 requests, such as known" in caplog.text
    assert json.loads((tmp_path / "known" / "summary.json").read_text())["known_before"] == ["known"]
