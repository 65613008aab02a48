"""The steering experiment: a small run of it, what it goes on from, its words, and concepts of other models."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import random_dictionary, random_sae, tiny_model

from experiments.steering import baselines, concepts
from experiments.steering import page as steering_page
from experiments.steering import question as steering
from experiments.steering.baselines import logistic_direction
from experiments.steering.stages import Bench, KnownDictionary, Point, random_way
from saepatch.cli.parser import run_config
from saepatch.demo.concepts import french, is_french, organism_concepts, shows_polarity
from saepatch.errors import UserError
from saepatch.measure.controls import random_latents
from saepatch.measure.quality import latent_statistics
from saepatch.model.loading.load import load_model
from saepatch.records.rows import read_rows
from saepatch.runs.measurements import Measurements, measurements
from saepatch.steering.generate import Concept

pytestmark = pytest.mark.whole

SMALL = ["--site", "resid_post.3", "--sizes", "[1,3]", "--strengths", "[1.0,2.0]", "--divergences", "[0.05]"]
SMALL += ["--prompts", "12", "--continued", "4", "--draws", "2", "--new_tokens", "8"]


def run(*arguments):
    return run_config(steering.SteeringConfig, steering.main, "steering", [*SMALL, *arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, few_texts):
    out = tmp_path_factory.mktemp("steering")
    assert run("--out", str(out)) == 0
    return out


@pytest.mark.slow
def test_a_small_run(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert list(summary["concepts"]) == ["refusal", "positive sentiment", "French"]
    one = summary["concepts"]["refusal"]
    ways = {"top-1", "top-3", "random latent", "difference of means", "probe direction", "fading top-1"}
    assert set(one["norms"]) == set(one["divergences"]) == ways
    assert set(one["chosen"]) == set(one["overall"]) == ways | {"unsteered", "prompting", "one-token prefix"}
    assert len(one["predictions"]) == 8
    assert all(0 <= figure[0] <= 2 for figure in one["overall"].values())
    rows = read_rows(finished / "rows.parquet")
    mine = [r for r in rows if (r["concept"], r["way"], r["compared_by"]) == ("refusal", "top-3", "norm")]
    assert len(mine) == 2 * 4
    for strength, figures in zip((1.0, 2.0), one["norms"]["top-3"], strict=True):
        here = [r for r in mine if r["strength"] == strength]
        assert np.mean([r["shown"] for r in here]) == figures["success"][0]
        nll, tokens = (sum(r[name] for r in here) for name in ("nll", "tokens"))
        assert np.exp(nll / tokens) == pytest.approx(figures["perplexity"][0])
        assert np.mean([r["kl"] for r in here]) == pytest.approx(figures["kl"][0])
    alike = [each for each in one["predictions"] if each["latent"] == one["latents"][0]]
    assert alike[0]["success"] == one["chosen"]["top-1"]["success"][0]
    page = (finished / "report.html").read_text()
    assert "Towards refusal" in page
    assert (finished / "refusal_norm.svg").is_file()


@pytest.mark.slow
def test_equal_norm_and_equal_divergence_are_equal(finished):
    rows = read_rows(finished / "rows.parquet")
    for concept in ("refusal", "French"):
        norms = {r["norm"] for r in rows if r["concept"] == concept and r["compared_by"] == "norm"}
        assert len({round(norm, 4) for norm in norms}) == 2  # one for each strength, whatever the way
    lines = [json.loads(line) for line in (finished / "measurements.jsonl").read_text().splitlines()[1:]]
    solved = [line["value"] for line in lines if "/kl/" in line["name"]]
    assert any(abs(np.log(value / 0.05)) < 0.05 for value in solved)


@pytest.mark.slow
def test_the_same_command_measures_nothing_twice(finished, capsys):
    before = (finished / "measurements.jsonl").read_text()
    summary = (finished / "summary.json").read_text()
    cut = before[: 2 * len(before) // 3]  # as a kill leaves it, in the middle of a line
    (finished / "measurements.jsonl").write_text(cut)
    assert run("--out", str(finished)) == 0
    assert (finished / "summary.json").read_text() == summary
    assert (finished / "measurements.jsonl").read_text() == before
    assert run("--out", str(finished), "--seed", "1") == 2
    assert "seed (0 there, 1 now)" in capsys.readouterr().err


def test_cells_refuse_a_damaged_file(tmp_path):
    cells = Measurements(tmp_path / "measurements.jsonl", {"seed": 0})
    assert cells.get("a", lambda: [1, 2]) == [1, 2]
    assert cells.get("a", lambda: 1 / 0) == [1, 2]
    lines = (tmp_path / "measurements.jsonl").read_text()
    (tmp_path / "measurements.jsonl").write_text(lines.replace('{"name', "{name") + '{"name": "b", "value": 1}\n')
    with pytest.raises(UserError, match="damaged"):
        Measurements(tmp_path / "measurements.jsonl", {"seed": 0})


def test_measurements_of_an_earlier_version_are_known_by_their_key(tmp_path):
    (tmp_path / "cells.jsonl").write_text('{"key": "abc"}\n{"name": "a", "value": 1}\n')

    def resumed(decides, key=""):
        return measurements(tmp_path, "steering", decides, "cells.jsonl", key)

    with pytest.raises(UserError, match="differs in key"), resumed({"seed": 0}, "other"):
        pass
    with pytest.raises(KeyboardInterrupt, match="2 measurements are stored; the same command resumes from them"):
        with resumed({"seed": 0}, "abc") as kept:
            assert kept.get("a", lambda: 1 / 0) == 1
            with pytest.raises(UserError, match="is working in"), resumed({"seed": 0}):
                pass
            kept.get("b", lambda: 2)
            raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["measurements.jsonl"]
    with resumed({"seed": 0}) as kept:
        assert kept.known == {"a": 1, "b": 2}
    with pytest.raises(UserError, match=r"differs in experiment \('steering' there, 'safety' now\)"):
        with measurements(tmp_path, "safety", {}):
            pass


def test_other_versions_of_libraries_are_warned_of_and_do_not_refuse(tmp_path, caplog):
    path = tmp_path / "measurements.jsonl"
    Measurements(path, {"seed": 0, "versions": {"torch": "1"}}).get("a", lambda: 1)
    for _ in range(2):  # the versions of the first start stay on record
        caplog.clear()
        kept = Measurements(path, {"seed": 0, "versions": {"torch": "2"}})
        assert kept.get("a", lambda: 1 / 0) == 1
        assert "library versions have changed since this run was started" in caplog.text
    with pytest.raises(UserError, match=r"differs in seed \(0 there, 1 now\): check that, give"):
        Measurements(path, {"seed": 1, "versions": {"torch": "1"}})


def test_settings_in_a_file_of_an_earlier_version_still_decide(tmp_path):
    (tmp_path / "cells.jsonl").write_text('{"settings": {"seed": 0}, "versions": {}}\n{"name": "a", "value": 1}\n')
    with pytest.raises(UserError, match=r"differs in seed \(0 there, 1 now\)"):
        with measurements(tmp_path, "steering", {"settings": {"seed": 1}, "versions": {}}, "cells.jsonl"):
            pass


def test_mistakes(capsys, tmp_path):
    for given, said in (
        (["--sizes", "[2,1]"], "increasing numbers"),
        (["--sizes", "[5,10]"], "begin with 1"),
        (["--model", "gpt2", "--sae", "x"], "give --reference FILE"),
        (["--concepts", str(tmp_path / "none.yaml")], "cannot read concepts"),
        (["--site", "resid_post.99"], "no dictionary for resid_post.99"),
    ):
        assert run("--out", str(tmp_path / "out"), *given) == 2
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_another_model_and_a_concept_from_a_file(tmp_path):
    model = tiny_model("gpt2")
    model.hf.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    sae = random_sae()
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    sae.save_model(tmp_path / "saes" / "resid_post.1")
    (tmp_path / "texts.txt").write_text("\n".join(f"{a} {b} on {a}" for a in ("cat", "dog", "it") for b in "xyzuv"))
    texts = {"present": ["aa", "ab", "ba"], "absent": ["xx", "yx", "zz"], "tune": ["t", "u", "v"], "report": ["p", "q"]}
    (tmp_path / "c.yaml").write_text(json.dumps([{"name": "letters", "words": ["a"], **texts}]))
    given = ["--model", str(tmp_path / "model"), "--sae", str(tmp_path / "saes"), "--site", ""]
    given += ["--reference", str(tmp_path / "texts.txt"), "--concepts", str(tmp_path / "c.yaml")]
    assert run(*given, "--out", str(tmp_path / "out")) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary["concepts"]) == ["letters"]
    assert "prompting" not in summary["concepts"]["letters"]["chosen"]


def test_a_concept_of_a_file_that_lacks_something(tmp_path):
    path = tmp_path / "c.yaml"
    for text, said in (
        ("- present: [a]", "mapping with a name"),
        ("- {name: n, present: [a], absent: [b], tune: [c], report: [d]}", "words is missing"),
        ("- {name: n, presents: [a]}", "unknown key 'presents'"),
        ("- {name: n, present: a}", "not a list of texts"),
        ("- [", "cannot read"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            concepts.read_concepts(str(path))


def point(shown, norm=1.0):
    n = len(shown)
    draw = {"texts": ["x"] * n, "ids": [[1]] * n, "shown": shown, "nll": [1.0] * n, "tokens": [1] * n, "kl": [0.1] * n}
    return Point("w", norm, (draw,))


def test_further_random_latents_stand_in_for_those_that_cannot_reach_a_divergence(monkeypatch, tmp_path):
    model, dictionary = tiny_model(), random_dictionary()
    statistics = latent_statistics(model, dictionary, model.tokenize(["the cat sat", "birds fly high up", "xyz"]))
    site = KnownDictionary(dictionary, statistics)
    kept = Measurements(tmp_path / "measurements.jsonl", {})
    bench = Bench(model, replace(french(12), name="c"), kept, 4, 20.0, lambda: None)
    way = random_way(bench, site, [], 5, 0)
    assert list(way.sets) == random_latents(statistics.alive, [], 1, 5, 0)
    assert not set(way.sets) & set(way.spare)
    cannot = set(way.sets[1:3])
    monkeypatch.setattr(
        Bench, "solve", lambda self, one, *_: float("nan") if one.sets[0] in cannot else float(one.sets[0][0])
    )
    monkeypatch.setattr(Bench, "at", lambda self, one, norm, *_: point([one.sets[0][0] % 2 == 0], norm))
    used = [one for one in (*way.sets, *way.spare) if one not in cannot][:5]
    found = bench.at_divergence(way, 0.1, 1.0, (1.0,))
    assert len(found.draws) == 5
    assert found.norm == np.mean([latent for (latent,) in used])
    assert steering_page._draws([found, None]) == "mean of 5 draws"
    cannot |= set(way.spare)
    few = bench.at_divergence(way, 0.1, 1.0, (1.0,))
    assert len(few.draws) == 3
    assert steering_page._draws([few, found]) == "means of 3 to 5 draws"
    cannot |= set(way.sets)
    assert bench.at_divergence(way, 0.1, 1.0, (1.0,)) is None
    assert steering_page._draws([None]) == "none reaches any"


def test_words_follow_from_numbers():
    concept = replace(french(12), name="c")
    none, every = [False] * 40, [True] * 40
    kept = {
        "concept": concept,
        "unit": 1.0,
        "order": [1],
        "order_name": "o",
        "by_site": {},
        "by_order": {},
        "prefix": "",
        "one_token": None,
        "one_token_prefix": "",
        "predictions": [],
        "overall": {},
    }
    model, dictionary = tiny_model(), random_dictionary()
    site = KnownDictionary(dictionary, latent_statistics(model, dictionary, model.tokenize(["ab"])))
    ways = {"top-1": [point(none), point(every)], "top-2": [point(every), point(every)]}
    found = steering.SteeringResult(site=site, unsteered=point(none), prompting=None, norms=ways,
                           divergences={"top-1": [None], "top-2": [None]},
                           chosen={"top-1": point(every), "top-2": point(every)},
                           fluent={"top-1": [True, True], "top-2": [True, True]}, **kept)  # fmt: skip
    assert found.at_equal_norm(2, 0.95).value == 0.5
    garbled = replace(found, fluent={"top-1": [True, True], "top-2": [False, True]})
    assert garbled.at_equal_norm(2, 0.95).value == 0  # at the first strength one of them writes no text
    words = steering_page.verdict(found, (1, 2))
    assert "one latent at its best strength succeeds in 100% of prompts" in words
    assert "At equal norm, 2 (+0.50) latents show it more often than one." in words
    assert "At equal divergence, nothing can be compared." in words
    worse = replace(found, norms={"top-1": ways["top-2"], "top-2": ways["top-1"]})
    assert "At equal norm, 2 (-0.50) latents show it less often than one." in steering_page.verdict(worse, (1, 2))


def test_judges_and_splits_of_the_organisms_concepts():
    assert is_french(" de la Norvège est Oslo.")
    assert not is_french(" of Norway is Oslo.")
    assert not is_french(" la la la la la la la la la la la la la")
    assert shows_polarity("good", "It was great.")
    assert not shows_polarity("good", "It was great and awful.")
    for concept in organism_concepts(load_model("organism"), 40):
        sets = [set(concept.present), set(concept.absent), set(concept.tune), set(concept.report)]
        assert all(len(one) >= 12 for one in sets)
        assert not any(a & b for i, a in enumerate(sets) for b in sets[:i])
        assert concept.prefixes


def test_a_gender_for_any_model():
    concept = concepts.gender(tiny_model(max_position_embeddings=128), 4)
    assert concept.name in ("she", "he")
    assert concept.shown("She saw her dog.") == (concept.name == "she")
    assert not concepts.words_judge(["she"], ["he"])("she he")
    assert not set(concept.tune) & set(concept.report)


def test_the_probes_direction_is_that_of_a_planted_difference():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 300, 6, generator=generator).double() * torch.tensor([1.0, 5.0, 1, 1, 1, 1])
    planted = torch.tensor([1.0, 5.0, 0, 0, 0, 0]).double()  # as far in both, in units of their spread
    found = logistic_direction(noise[0] + planted, noise[1] - planted)
    assert found.norm() == pytest.approx(1)
    weights = torch.tensor([1.0, 1 / 5, 0, 0, 0, 0]).double()
    assert float(found @ weights / weights.norm()) > 0.98
    assert float(logistic_direction(noise[1] - planted, noise[0] + planted) @ found) == pytest.approx(-1, abs=1e-3)


def test_the_overall_score_is_a_harmonic_mean(monkeypatch):
    prompts, nll = ("a", "b"), {("a", "b"): [2.0, 8.0], ("b", "a"): [6.0, 4.0]}
    monkeypatch.setattr(baselines, "continuation_nll", lambda _model, texts, _ids: nll[tuple(texts)])
    bench = Bench(None, Concept("c", (), (), prompts, prompts, lambda text: True), None, 4, 20.0, lambda: None)
    usual = {"nll": [1.0, 1.0], "tokens": [2, 2]}
    monkeypatch.setattr(Bench, "unsteered", lambda self, split: Point("unsteered", 0.0, (usual,)))
    draw = {"ids": [[1, 2], [3, 4]], "nll": [2.0, 8.0], "tokens": [2, 2], "shown": [True, True]}
    # the first is likelier after its own prompt, at a lower probability than usual; the second after the other prompt
    fluency = 2 * np.exp(0.5 - 1.0)
    assert baselines.overall(bench, Point("x", 1.0, (draw,))).value == pytest.approx(3 / (0.5 + 0.5 + 1 / fluency) / 2)
