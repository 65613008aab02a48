"""`saepatch restore` started again, texts or judges changed; two models; who answered; what runs and compare say."""

import json
import sys

import pytest
from restoring_runs import PROMPTS, ROWS, arguments, lines, make, read

from saepatch.cli.main import main
from saepatch.dictionaries.loading import load_sae
from saepatch.errors import UserError
from saepatch.measure.quality import splice_quality
from saepatch.model.loading.load import load_model
from saepatch.pages.commands.answered import show_answers
from saepatch.records.rows import read_about, read_rows
from saepatch.restoration.judges import judge_version
from saepatch.restoration.restore import restore
from saepatch.runs.catalogue import find_runs
from saepatch.runs.commands import restorations as answering
from saepatch.runs.commands.restorations import prepare, run_restore
from saepatch.splicing.donors import OtherModel

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make(tmp_path_factory.mktemp("tiny"))


def stopped_after(monkeypatch, calls, start):
    """Start a run that is stopped once it has answered under so many conditions."""
    made, seen = answering._rows, []

    def stop(*args):
        seen.append(args)
        if len(seen) > calls:
            raise KeyboardInterrupt
        return made(*args)

    with monkeypatch.context() as patched:
        patched.setattr(answering, "_rows", stop)
        return start()


def test_other_texts_to_take_means_over_are_another_run(place, tmp_path, monkeypatch, capsys):
    select = tmp_path / "select.jsonl"
    select.write_text((place / "select.jsonl").read_text())
    given = {"donor": "means", "select": select, "latents": "resid_post.1: 1,7,9", "controls": 0}
    flags = arguments(place, tmp_path / "out", **given)
    assert stopped_after(monkeypatch, 4, lambda: main(["restore", *flags])) == 130
    lines(select, [{"prompt": "x", "clean": f"another text {n}"} for n in range(5)])
    assert main(["restore", *flags]) == 2
    assert "differs in select's texts" in capsys.readouterr().err
    select.write_text((place / "select.jsonl").read_text())
    assert main(["restore", *flags]) == 0
    assert main(["restore", *arguments(place, tmp_path / "whole", **given)]) == 0
    both = [[row["answer"] for row in read_rows(tmp_path / name / "results.parquet")] for name in ("out", "whole")]
    assert both[0] == both[1]


def own_judge(folder, monkeypatch, words):
    (folder / "own_judge.py").write_text(f"def decide(prompt, answer):\n    {words}\n")
    monkeypatch.delitem(sys.modules, "own_judge", raising=False)
    sys.path_importer_cache.pop(str(folder), None)


def test_a_judge_that_was_changed_judges_all_answers_again(place, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    flags = arguments(place, tmp_path / "out", judge="own_judge:decide", latents="resid_post.1: 1", controls=0)
    own_judge(tmp_path, monkeypatch, "return 'refuse'")
    before = judge_version("own_judge:decide")
    assert stopped_after(monkeypatch, 4, lambda: main(["restore", *flags])) == 130
    assert read_about(tmp_path / "out" / "answers" / "part-00000.parquet")["judge"] == before
    own_judge(tmp_path, monkeypatch, "return 'comply' if len(answer) % 2 else 'degenerate'")
    assert judge_version("own_judge:decide") != before
    assert main(["restore", *flags]) == 0
    rows = read_rows(tmp_path / "out" / "results.parquet")
    assert len(rows) == 3 * 5
    assert [row["outcome"] for row in rows] == ["comply" if len(row["answer"]) % 2 else "degenerate" for row in rows]
    assert "6 answers have another outcome now" in caplog.text
    shares = {c["condition"]: c for c in json.loads((tmp_path / "out" / "summary.json").read_text())["conditions"]}
    assert shares["bare"]["refuse"][0] == 0
    caplog.clear()
    assert main(["restore", *flags]) == 0  # these verdicts are kept: no outcome changes again
    assert "another outcome" not in caplog.text
    kept = [read_about(file)["judge"] for file in sorted((tmp_path / "out" / "answers").glob("*.parquet"))]
    assert set(kept) == {judge_version("own_judge:decide")}


def test_an_unchanged_judge_is_asked_once(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "counting.py").write_text(
        "calls = []\ndef decide(prompt, answer):\n    calls.append(answer)\n    return 'comply'\n"
    )
    run_restore(
        read(place, tmp_path / "out", judge="counting:decide", latents="resid_post.1: 1", controls=0), show_answers
    )
    assert len(sys.modules["counting"].calls) == 3 * 5
    assert judge_version("keywords") == judge_version("score") == judge_version("keywords: no") == ""


def test_phrases_judge_parts_of_an_earlier_version_again(place, tmp_path, monkeypatch):
    config = read(place, tmp_path, latents="resid_post.1: 1", controls=0)
    with monkeypatch.context() as patched:
        patched.setattr(answering, "read_judge", lambda _: lambda answer: "refuse")
        run_restore(config, show_answers)
    run_restore(config, show_answers)
    assert {row["outcome"] for row in read_rows(tmp_path / "results.parquet")} <= {"comply", "degenerate"}


def test_two_models_are_looked_at_however_latents_are_chosen(place, tmp_path):
    two = {"model": place / "base", "donor": place / "model"}
    model, other = (load_model(str(place / name)) for name in ("base", "model"))
    dictionary = load_sae(str(place / "saes"), "resid_post.1")
    prompts = [row["prompt"] for row in ROWS]
    texts = other.continue_ids(prompts, 6)
    tokens = model.pad([[*model.encode(p), *text] for p, text in zip(prompts, texts, strict=True)])
    fvu = [splice_quality(one, dictionary, tokens).fvu for one in (model, other)]
    given = {"site": "resid_post.1"}
    for chosen in ({"latents": "1,7"}, {}, {"select": place / "select.jsonl", "k": 3}):
        with pytest.raises(UserError, match=r"unexplained \(FVU; max_fvu is 0.0001\)"):
            prepare(read(place, tmp_path / "no", max_fvu=1e-4, **two, **given, **chosen))
        assert not (tmp_path / "no").exists()
        assert prepare(read(place, tmp_path / "yes", max_fvu=max(fvu), **two, **given, **chosen)).fvu == {
            "resid_post.1": pytest.approx(tuple(fvu))
        }
    with pytest.raises(UserError, match="unexplained"):
        restore(model, dictionary, PROMPTS, OtherModel(other, 2), [1, 7], max_fvu=1e-4)
    assert restore(model, dictionary, PROMPTS, OtherModel(other, 2), [1, 7], max_fvu=99) == restore(
        model, dictionary, PROMPTS, OtherModel(other, 2), [1, 7], max_fvu=None
    )
    prepare(read(place, tmp_path / "one", max_fvu=1e-4, latents="1,7", **given))  # of one model nothing is asked


def test_who_answered_stands_in_the_rows(place, tmp_path):
    two = {"model": place / "base", "donor": place / "model", "latents": "resid_post.1: 1,7", "max_fvu": 99}
    run_restore(read(place, tmp_path, controls=1, **two), show_answers)
    names = {"base": load_model(str(place / "base")), "model": load_model(str(place / "model"))}
    for path in (tmp_path / "results.parquet", tmp_path / "answers" / "part-00001.parquet"):
        rows = read_rows(path)
        assert [row["condition"] for row in rows][:6] == ["bare"] * 2 + ["donor"] * 2 + ["restored"] * 2
        for row in rows:
            who = names["model" if row["condition"] == "donor" else "base"]
            assert (row["model"], row["model_hash"]) == (who.name, who.fingerprint)
    assert json.loads((tmp_path / "summary.json").read_text())["fvu_of_model_and_donor"].keys() == {"resid_post.1"}


def test_a_ranking_without_a_positive_score_is_a_mistake(place, tmp_path, capsys):
    same = tmp_path / "same.jsonl"
    lines(same, [{"prompt": "abc", "clean": "abc"}])
    assert main(["restore", *arguments(place, tmp_path / "out", select=same, ranking="signed", k=3)]) == 2
    said = capsys.readouterr().err
    assert "no latent has a score above 0 in the ranking 'signed'" in said
    assert not (tmp_path / "out" / "answers" / "run.json").exists()


@pytest.mark.parametrize("donor", ["means", "clean"])
def test_steps_count_answers_and_never_go_back(place, tmp_path, monkeypatch, donor):
    more = {"select": place / "select.jsonl"} if donor == "means" else {}
    flags = arguments(place, tmp_path, donor=donor, latents="resid_post.1: 1,7", controls=1, **more)
    conditions = 4 if donor == "means" else 5
    assert stopped_after(monkeypatch, 2 * 5, lambda: main(["restore", *flags])) == 130
    steps = lambda: [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]  # noqa: E731
    assert steps() == [2 * conditions, 4 * conditions]
    assert main(["restore", *flags]) == 0
    assert steps() == [2 * conditions, 4 * conditions, 5 * conditions]
    assert len(read_rows(tmp_path / "results.parquet")) == 5 * conditions


@pytest.mark.slow
def test_what_runs_and_compare_say(place, tmp_path, monkeypatch, capsys):
    for name, ids in (("a", "1,7,9"), ("b", "1,7")):
        assert main(["restore", *arguments(place, tmp_path / name, latents=f"resid_post.1: {ids}", controls=1)]) == 0
    flags = arguments(place, tmp_path / "c", latents="resid_post.1: 1", controls=0)
    assert stopped_after(monkeypatch, 4, lambda: main(["restore", *flags])) == 130
    capsys.readouterr()
    assert main(["runs", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert any(line.startswith(str(tmp_path / "c")) and "not finished" in line for line in said)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--html", str(tmp_path / "both.html")]) == 0
    said = capsys.readouterr().out
    cells = [" ".join(line.split()) for line in said.splitlines()]
    assert "latents resid_post.1: 1,7,9 resid_post.1: 1,7" in cells
    assert "latents restored at resid_post.1 3, 2 of them in both 2, 2 of them in both" in cells
    shares = [json.loads((tmp_path / name / "summary.json").read_text())["conditions"] for name in ("a", "b")]
    told = []
    for conditions in shares:
        one = next(c for c in conditions if (c["condition"], c["harmful"]) == ("restored", True))
        told.append("{:.0%} [{:.0%}, {:.0%}]".format(*one["refuse"]))
    assert f"restored, harmful: refused {told[0]} {told[1]}" in cells
    assert "largest effects" not in said
    assert not any(line.startswith("restored: refused") for line in cells)  # of kinds that are said, each alone
    assert "restored, harmful: refused" in (tmp_path / "both.html").read_text()
    report = (tmp_path / "a" / "report.html").read_text()
    (tmp_path / "a" / "report.html").unlink()
    assert main(["report", str(tmp_path / "a")]) == 0
    assert (tmp_path / "a" / "report.html").read_text() == report
    (tmp_path / "a" / "page.json").unlink()  # as a folder of before: rows and summary alone
    assert main(["report", str(tmp_path / "a")]) == 0
    fewer = (tmp_path / "a" / "report.html").read_text()
    for words in (PROMPTS[0], "harmful prompts refused, restored", "resid_post.1: 1, 7, 9"):
        assert words in report
        assert words in fewer
    (tmp_path / "a" / "results.parquet").unlink()
    assert main(["report", str(tmp_path / "a")]) == 2
    assert "cannot read the answers in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("summary", "said"),
    [
        ({"verdict": "Named\nat no site."}, "Named at no site."),
        ({"verdicts": {"refusal": "One latent does it.", "French": "None does."}}, "One latent does it. None does."),
        ({"verdicts": {"denoise": ["Most by one.", "Then by four."], "noise": []}}, "Most by one."),
        ({"setting_a": {"verdict": "A holds."}, "setting_b": {"verdict": "B, too."}, "seed": 0}, "A holds. B, too."),
        ({"headline": "85 % restored", "verdict": "longer"}, "85 % restored"),
        ({"verdicts": 3, "model": {"name": "x"}}, ""),
    ],
)
def test_headlines_of_experiments(tmp_path, capsys, summary, said):
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (found,) = find_runs(tmp_path)
    assert found.headline == said
    assert main(["runs", str(tmp_path)]) == 0
    assert said in capsys.readouterr().out
