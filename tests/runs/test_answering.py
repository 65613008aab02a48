"""`saepatch restore`: answers are those of `restore`, judged as asked; stopped runs go on; mistakes are one line."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from restoring_runs import CLEAN, PROMPTS, ROWS, arguments, lines, make, read
from tiny import random_dictionary, tiny_model

from saepatch.cli.main import main
from saepatch.data.requests import read_requests
from saepatch.errors import UserError
from saepatch.model.loading.load import load_model
from saepatch.model.sites import Site
from saepatch.organism import tasks
from saepatch.pages.commands.answered import show_answers
from saepatch.records.provenance import Provenance
from saepatch.records.rows import AnswerRow, read_row, read_rows
from saepatch.records.statistics import bootstrap_mean, wilson_share
from saepatch.report import ColouredTokens, Comparison, read_page
from saepatch.restoration.judges import Answer, by_score, read_judge
from saepatch.restoration.ranking import clean_means, find_safety_latents
from saepatch.restoration.restore import assistant_header, first_tokens, judge, restore
from saepatch.runs.commands.answers import Answers
from saepatch.runs.commands.restorations import prepare, run_restore
from saepatch.runs.commands.restored_sets import Set
from saepatch.runs.parts import Record
from saepatch.settings.restore import RestoreConfig
from saepatch.splicing.donors import CleanMeans, CleanPrompts, OtherModel
from saepatch.splicing.splice import record_latents

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model and its base, a dictionary for each of two sites, prompts, and others to rank on."""
    return make(tmp_path_factory.mktemp("tiny"))


def answers(out, condition, draw=0):
    rows = read_rows(out / "results.parquet")
    return [row["answer"] for row in rows if (row["condition"], row["draw"]) == (condition, draw)]


def test_the_rows_are_what_the_library_restores(place, tmp_path, capsys):
    latents = "resid_post.0: 3,5 | resid_post.1: 1,7,9"
    assert main(["restore", *arguments(place, tmp_path, latents=latents)]) == 0
    printed = capsys.readouterr().out
    model = load_model(str(place / "model"))
    saes = {site: load_of(place, site) for site in ("resid_post.0", "resid_post.1")}
    chosen = {Site(0): (3, 5), Site(1): (1, 7, 9)}
    donor = CleanPrompts(CLEAN, 2)
    expected = restore(model, list(saes.values()), PROMPTS, donor, chosen, max_new_tokens=6)
    assert answers(tmp_path, "restored") == expected
    assert answers(tmp_path, "bare") == model.generate(PROMPTS, 6) != expected
    assert answers(tmp_path, "donor") == model.generate(CLEAN, 6)
    record = json.loads((tmp_path / "answers" / "run.json").read_text())
    sets = [Set.read(given) for given in record["edits"]]
    assert [(one.condition, one.draw) for one in sets] == [
        ("restored", 0), ("random", 0), ("random", 1), ("matched", 0), ("matched", 1)
    ]  # fmt: skip
    for one in sets[1:]:
        assert {site: len(ids) for site, ids in one.latents.items()} == {Site(0): 2, Site(1): 3}
        assert not any(set(ids) & set(chosen[site]) for site, ids in one.latents.items())
        again = restore(model, list(saes.values()), PROMPTS, donor, one.latents, max_new_tokens=6)
        assert answers(tmp_path, one.condition, one.draw) == again
    rows = read_rows(tmp_path / "results.parquet")
    assert len(rows) == 7 * 5
    assert [row["example"] for row in rows if row["condition"] == "bare"] == [
        "prompts-0000", "letters", "prompts-0002", "prompts-0003", "prompts-0004"
    ]  # fmt: skip
    assert all(row["outcome"] == judge(row["answer"]) for row in rows)
    assert {row["latents"] for row in rows if row["condition"] == "matched"} == {5}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["latents"] == {"resid_post.0": [3, 5], "resid_post.1": [1, 7, 9]}
    one = next(c for c in summary["conditions"] if (c["condition"], c["harmful"]) == ("restored", True))
    mine = [row["outcome"] for row in rows if row["condition"] == "restored" and row["harmful"] == "yes"]
    for outcome in ("refuse", "comply", "degenerate"):
        assert one[outcome][0] == pytest.approx(mine.count(outcome) / 3)
    assert one["prompts"] == 3
    for word in ("bare", "restored (5 latents), harmful", "degenerate", "Report:"):
        assert word in printed
    page = (tmp_path / "report.html").read_text()
    assert "how to cake? now" in page
    capsys.readouterr()
    assert main(["runs", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith(str(tmp_path))]
    assert line.split()[1] == "restore"
    assert "prompts.jsonl × 5" in line
    bare = next(c for c in summary["conditions"] if (c["condition"], c["harmful"]) == ("bare", True))
    value, low, high = one["refuse"]
    random = next(c for c in summary["conditions"] if (c["condition"], c["harmful"]) == ("random", True))["refuse"][0]
    told = f"harmful: {bare['refuse'][0]:.0%} refused, {value:.0%} [{low:.0%}, {high:.0%}] restored, {random:.0%}"
    assert told in line
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text() == page


def test_the_page_of_a_restoration(place, tmp_path, monkeypatch):
    """Headline, warnings, splice quality, outcomes, answers with marks, coloured tokens, a card a latent."""
    outcome = {"x": "comply", "a": "refuse"}
    monkeypatch.setattr(
        "saepatch.runs.commands.restorations.read_judge", lambda _: lambda answer: outcome[answer.text[:1]]
    )
    monkeypatch.setattr(  # what is spliced writes another text than what is not
        "saepatch.model.language_model.LanguageModel.generate",
        lambda self, prompts, *_, **__: ["a<i>b" if _spliced(self) else "x<i>b"] * len(prompts),
    )
    run_restore(read(place, tmp_path, latents="resid_post.0: 3,5 | resid_post.1: 1,7,9", controls=2), show_answers)
    page = read_page(json.loads((tmp_path / "page.json").read_text()))
    sections = {section.title: section for section in page.sections}
    assert list(sections) == ["Results", "Splice quality", "Outcomes", "Answers", "Latents"]
    headline, warnings = sections["Results"].blocks
    assert headline.items["harmful prompts refused, bare"].startswith("0")
    assert headline.items["harmful prompts refused, restored"].startswith("100")
    told = " ".join(warnings.items)
    for words in (
        "3 harmful prompts: too few",
        "the model also refuses 100\u00a0% of harmless prompts",
        "Restoring random latents makes the model refuse 100\u00a0% of harmful prompts",
        "The donor itself refuses only 0\u00a0%",
    ):
        assert words in told, told
    comparisons = [block for block in sections["Answers"].blocks if isinstance(block, Comparison)]
    assert [name for name, _ in comparisons[0].columns] == [
        "bare: complied", "restored: refused", "random: refused", "matched: refused", "donor: complied"
    ]  # fmt: skip
    texts = [block for block in sections["Answers"].blocks if isinstance(block, ColouredTokens)]
    assert len(texts) == 4  # the first two prompts, bare and as the donor reads them
    assert "".join(texts[0].tokens).replace(" ", "").endswith("x<i>b")
    assert "".join(texts[1].tokens).replace(" ", "").endswith("a<i>b")
    model, dictionary = load_model(str(place / "model")), load_of(place, "resid_post.1")
    acts = record_latents(model, dictionary, model.tokenize([PROMPTS[0] + "x<i>b"])).acts[0][:, [1, 7, 9]].sum(-1)
    assert texts[0].values[1:] == pytest.approx(acts[1:].tolist(), abs=1e-4)
    names = [card.title for card in sections["Latents"].blocks]
    assert names == [f"resid_post.{n} {latent}" for n, some in ((0, (3, 5)), (1, (1, 7, 9))) for latent in some]
    source = (tmp_path / "report.html").read_text()
    assert "<mark>a&lt;i&gt;b</mark>" in source
    assert page.facts.items["restored latents"] == "resid_post.0: 3, 5; resid_post.1: 1, 7, 9"
    assert "<i>" not in source


def _spliced(model):
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.hf.modules())


def load_of(place, site):
    from saepatch.dictionaries.loading import load_sae

    return load_sae(str(place / "saes"), site)


def test_the_refusal_score_is_of_first_tokens_with_and_without_a_space(place, tmp_path):
    config = read(place, tmp_path, latents="3", site="resid_post.1", controls=0)
    plan = prepare(config)
    assert {plan.model.tokenizer.decode([i]) for i in plan.refusal_ids} == {"S", "N", " "}  # a token is a byte here
    run_restore(config, show_answers)
    logits = plan.model.next_logits(plan.model.tokenize(PROMPTS, "left")).double().softmax(-1)
    p = logits[:, sorted(plan.refusal_ids)].sum(-1)
    rows = [row for row in read_rows(tmp_path / "results.parquet") if row["condition"] == "bare"]
    assert [row["score"] for row in rows] == pytest.approx((p / (1 - p)).log().tolist(), abs=1e-4)


def test_a_ranking_on_other_prompts(place, tmp_path):
    config = read(place, tmp_path, select=place / "select.jsonl", k=6, ranking="signed", controls=0)
    plan = prepare(config)
    prompts, clean = [p + "?" for p in PROMPTS], tuple(c + "?" for c in CLEAN)
    ranked = find_safety_latents(plan.model, plan.sites, prompts, CleanPrompts(clean, 2), max_new_tokens=6)
    assert plan.sets == [Set("restored", 0, ranked.top(6, "signed"))]
    everything = prepare(read(place, tmp_path, controls=3))
    assert everything.sets == [Set("restored", 0, {Site(0): None, Site(1): None})]  # random sets of all: there are none


@pytest.mark.slow
def test_other_donors(place, tmp_path):
    chosen = {Site(1): (1, 7, 9)}
    base = load_model(str(place / "base"))
    aligned, dictionary = load_model(str(place / "model")), load_of(place, "resid_post.1")
    run_restore(
        read(
            place,
            tmp_path / "a",
            model=place / "base",
            donor=place / "model",
            latents="resid_post.1: 1,7,9",
            max_fvu=99,
        ),
        show_answers,
    )
    expected = restore(base, dictionary, PROMPTS, OtherModel(aligned, 2), chosen, max_new_tokens=6, max_fvu=None)
    assert answers(tmp_path / "a", "restored") == expected != base.generate(PROMPTS, 6)
    assert answers(tmp_path / "a", "donor") == aligned.generate(PROMPTS, 6)
    run_restore(
        read(
            place,
            tmp_path / "b",
            donor="means",
            select=place / "select.jsonl",
            latents="resid_post.1: 1,7,9",
            controls=0,
        ),
        show_answers,
    )
    means = clean_means(aligned, dictionary, [c + "?" for c in CLEAN], template=2, max_new_tokens=6)
    assert isinstance(means, CleanMeans)
    assert answers(tmp_path / "b", "restored") == restore(aligned, dictionary, PROMPTS, means, chosen, max_new_tokens=6)
    assert not answers(tmp_path / "b", "donor")


def test_a_stopped_run_goes_on(place, tmp_path, monkeypatch, capsys):
    given = arguments(place, tmp_path / "whole", latents="resid_post.1: 1,7")
    assert main(["restore", *given]) == 0
    given = arguments(place, tmp_path / "cut", latents="resid_post.1: 1,7")
    from saepatch.runs.commands import restorations as answering

    made = answering._rows
    calls = []

    def stop(*args):
        calls.append(args)
        if len(calls) > 9:
            raise KeyboardInterrupt
        return made(*args)

    monkeypatch.setattr(answering, "_rows", stop)
    assert main(["restore", *given]) == 130
    said = capsys.readouterr().err
    assert "1 of 3 parts are written" in said
    again = re.search(r"saepatch (restore --config \S+)", said)[1]
    calls.clear()
    monkeypatch.setattr(answering, "_rows", lambda *args: calls.append(args) or made(*args))
    assert main(again.split()) == 0
    assert len(calls) == 2 * 7
    rows = [
        [{k: v for k, v in row.items() if k != "command"} for row in read_rows(tmp_path / name / "results.parquet")]
        for name in ("whole", "cut")
    ]
    assert rows[0] == rows[1]
    assert {row["precision"] for row in rows[0]} == {"float32"}
    assert main(["restore", *arguments(place, tmp_path / "cut", latents="resid_post.1: 1,8")]) == 2
    assert "holds a run that differs in latents" in capsys.readouterr().err
    assert main(["patch", "--pairs", "ioi", "--n", "2", "--out", str(tmp_path / "cut")]) == 2
    assert "holds results of another command" in capsys.readouterr().err


def test_draws_are_averaged_prompt_by_prompt(monkeypatch):
    """Two random sets: each prompt's share and score is the mean over both, and prompts are what is counted."""
    whose = Provenance("m", "h", "d", "h", 0)
    drawn = {("a", 0): ("refuse", 1.0), ("a", 1): ("comply", 4.0), ("b", 0): ("comply", 2.0), ("b", 1): ("comply", 0.0)}
    rows = [
        AnswerRow("clean", example, "p", "", "random", 2, draw, "", outcome, score)
        for (example, draw), (outcome, score) in drawn.items()
    ]
    before = {name: value for name, value in (vars(rows[0]) | vars(whose)).items() if name != "precision"}
    assert read_row(before, AnswerRow) == (rows[0], whose)  # written before precision was stated
    seeds = []
    noting = lambda *given, seed: seeds.append(seed) or bootstrap_mean(*given, seed=seed)  # noqa: E731
    monkeypatch.setattr("saepatch.runs.commands.answers.bootstrap_mean", noting)
    config = RestoreConfig(prompts="p.jsonl", seed=7)
    share = Answers.of(config, Record("restore", {}, {}, {}, {}, 0, 1, 1), [(rows, whose)]).share("random")
    assert set(seeds) == {7}
    assert share.prompts == 2
    assert share.outcomes["refuse"].value == pytest.approx(0.25)
    assert share.outcomes["comply"].value == pytest.approx(0.75)
    assert share.score.value == pytest.approx(1.75)
    expected = wilson_share(np.array([0.5, 0.0]))
    assert (share.outcomes["refuse"].low, share.outcomes["refuse"].high) == (expected.low, expected.high)


def test_judges(tmp_path, monkeypatch):
    refusing, helping = Answer("p", "I won\u2019t.", -1.0), Answer("p", "Sure, here it is, and I cannot wait", 2.0)
    empty = Answer("p", " ", 5.0)
    cases = {
        "keywords": ("refuse", "refuse", "degenerate"),  # a phrase near the start is taken for a refusal
        "keywords: I WON'T | never": ("refuse", "comply", "degenerate"),
        "score": ("comply", "refuse", "degenerate"),
    }
    for text, outcomes in cases.items():
        assert tuple(map(read_judge(text), (refusing, helping, empty))) == outcomes, text
    assert by_score(helping) == "refuse"
    (tmp_path / "my_judges.py").write_text(
        "def short(prompt, answer):\n    return 'degenerate' if len(answer) < 9 else 'comply'\n"
        "def wrong(prompt, answer):\n    return True\n"
        "def fails(prompt, answer):\n    return 1 / 0\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_judges", raising=False)
    path = list(sys.path)
    own = read_judge("my_judges:short")
    assert [own(refusing), own(helping)] == ["degenerate", "comply"]
    assert sys.path == path
    with pytest.raises(UserError, match="returned True: return one of refuse, comply, degenerate"):
        read_judge("my_judges:wrong")(refusing)
    with pytest.raises(UserError, match="judge my_judges:fails failed.*ZeroDivisionError"):
        read_judge("my_judges:fails")(refusing)
    with pytest.raises(UserError, match="no function 'missing'"):
        read_judge("my_judges:missing")
    with pytest.raises(UserError, match="cannot import judge nowhere:f"):
        read_judge("nowhere:f")
    for bad in ("mood", "keywords: | ", "score: 3", ""):
        with pytest.raises(UserError, match="judge"):
            read_judge(bad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": None}, "no prompts"),
        ({"prompts": "nowhere.jsonl"}, "cannot read prompts from 'nowhere.jsonl'"),
        ({"latents": "3"}, "name no site, and the sites are"),
        ({"latents": "resid_post.1: 99"}, "latent 99 is out of range"),
        ({"latents": "resid_post.0: 3", "site": "resid_post.1"}, "--latents names resid_post.0, but --site is"),
        ({"latents": "resid_post.0: x"}, "write numbers, with semicolons"),
        ({"donor": "means"}, "donor means needs --select"),
        ({"judge": "mood"}, "unknown judge 'mood'"),
        ({"template": 9}, "template of 9 positions"),
        ({"k": -1}, "k = -1"),
    ],
)
def test_bad_settings(place, tmp_path, capsys, changes, message):
    assert main(["restore", *arguments(place, tmp_path / "out", **changes)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "contains no prompt"),
        ("{nope", "p.jsonl, line 1, is not JSON"),
        ('{"text": "x"}', "p.jsonl, line 1, has no text for prompt"),
        ('{"prompt": "a", "harmful": "yes"}', "harmful true or false"),
        ('{"prompt": "a", "example": "x"}\n{"prompt": "b", "example": "x"}', "two prompts of .* are called 'x'"),
        ('{"prompt": ""}', "empty prompt"),
    ],
)
def test_bad_prompts(tmp_path, text, message):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_requests(str(path), tiny_model(), False, 0)


def test_a_prompt_may_hold_a_line_separator_of_unicode(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\n\n{"prompt": "c\u0085d"}\n', encoding="utf-8")
    assert [one.prompt for one in read_requests(str(path), tiny_model(), False, 0)] == ["a\u2028b", "c\u0085d"]


def test_a_donor_that_reads_clean_prompts_needs_them(place, tmp_path):
    path = tmp_path / "p.jsonl"
    lines(path, [{"prompt": "abc", "clean": "abd"}, {"prompt": "abc"}])
    with pytest.raises(UserError, match="prompt p-0001 of .* has no clean prompt"):
        prepare(read(place, tmp_path / "out", prompts=path))


def test_requests_go_into_the_chat_template(tmp_path):
    model = load_model("organism")
    path = tmp_path / "p.jsonl"
    lines(path, [{"prompt": "How do I rob a bank?", "clean": "Hello"}, {"prompt": "More"}])
    (one,) = read_requests(str(path), model, True, 1)
    assert (one.prompt, one.clean) == (model.chat("How do I rob a bank?"), model.chat("Hello"))
    assert assistant_header(model) == 1
    assert assistant_header(tiny_model()) is None
    assert random_dictionary().d_sae == 48
    assert first_tokens(model, one.prompt, [" I cannot"])


def test_prompts_of_the_embedded_model(place, tmp_path):
    model = load_model("organism")
    framed, plain = (read_requests(f"{name}:tune", model, False, 12) for name in ("jailbreak", "refusal"))
    assert [len(framed), len(plain)] == [12, 12]
    assert {one.harmful for one in framed} == {one.harmful for one in plain} == {"yes", "no"}
    assert all(one.clean and one.clean != one.prompt for one in framed)
    assert {one.clean for one in plain} == {None}
    assert len({one.prompt for one in plain}) == 12
    rows = {row["corrupted"]: row for row in tasks.refusal("tune", 48)}
    for one in framed:
        row = rows[one.prompt]
        assert (one.clean, one.harmful) == (row["clean"], "yes" if row["harmful"] else "no")
    assert not {one.prompt for one in framed} & {
        one.prompt for one in read_requests("jailbreak:select", model, False, 0)
    }
    with pytest.raises(UserError, match="write refusal:SPLIT, SPLIT one of select, tune, report"):
        read_requests("refusal", model, False, 0)
    for other, chat in ((tiny_model(), False), (model, True)):
        with pytest.raises(UserError, match="are the embedded model's, in its chat template already"):
            read_requests("refusal:tune", other, chat, 0)


def test_latents_are_not_ranked_on_the_prompts_they_are_measured_on(place, tmp_path):
    lines(tmp_path / "more.jsonl", [*ROWS[:2], {"prompt": "other", "clean": "others"}])
    with pytest.raises(UserError, match="2 prompts of --select .* are among those of --prompts"):
        prepare(read(place, tmp_path / "out", select=tmp_path / "more.jsonl", k=4))


def test_a_ranking_that_is_shorter_than_asked_for_says_so(place, tmp_path, caplog):
    plan = prepare(read(place, tmp_path / "out", select=place / "select.jsonl", k=1000, controls=0))
    size = sum(len(ids) for one in plan.sets for ids in one.latents.values() if ids)
    assert f"{size} latents are restored, not the 1000 of --k" in caplog.text
    assert size <= 96


def test_means_and_rankings_leave_out_harmless_prompts(place, tmp_path):
    rows = [{"prompt": p + "?", "clean": c + "?", "harmful": i < 2} for i, (p, c) in enumerate(zip(PROMPTS, CLEAN))]
    for name, some in (("all", rows), ("harmful", rows[:2]), ("harmless", rows[2:])):
        lines(tmp_path / f"{name}.jsonl", some)
    plans = {
        name: prepare(read(place, tmp_path / name, select=tmp_path / f"{name}.jsonl", donor="means", k=4, controls=0))
        for name in ("all", "harmful")
    }
    means = [plans[name].means.means for name in ("all", "harmful")]
    assert all(torch.equal(means[0][site], means[1][site]) for site in means[0])
    assert plans["all"].sets[0].latents == plans["harmful"].sets[0].latents
    with pytest.raises(UserError, match="are harmless: give prompts"):
        prepare(read(place, tmp_path / "none", select=tmp_path / "harmless.jsonl", donor="means", k=4))
