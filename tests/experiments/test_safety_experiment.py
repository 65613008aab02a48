"""The safety experiment: a small run of it, and its parts against figures made by hand."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from tiny import random_dictionary, tiny_model

from experiments import safety
from experiments.restoration.curves import RefusalCurve, RefusalPoint
from experiments.restoration.guards import auroc, detector, roc, threshold_for
from experiments.restoration.runs import Restored, Runs
from experiments.restoration.settings import (
    PairedPrompts,
    Setting,
    harmless_in_every_framing,
    spliced_sites,
    stacked,
    two_prompts,
)
from saepatch.cli.parser import run_config
from saepatch.dictionaries.loading import load_saes
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading.load import load_model
from saepatch.model.sites import Site
from saepatch.organism import world
from saepatch.records.rows import read_rows
from saepatch.records.statistics import Interval
from saepatch.restoration.answering import Answered
from saepatch.restoration.restore import assistant_header, restore
from saepatch.runs.measurements import Measurements
from saepatch.splicing.donors import CleanPrompts

pytestmark = pytest.mark.whole

SMALL = ["--prompts", "6", "--sizes", "[4,64]", "--draws", "1", "--tokens", "5"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, few_texts):
    """Both settings, small."""
    out = tmp_path_factory.mktemp("safety")
    given = [*SMALL, "--out", str(out)]
    assert run_config(safety.SafetyConfig, safety.main, "safety", given) == 0
    return out, json.loads((out / "summary.json").read_text())


@pytest.mark.slow
def test_the_summary_has_what_was_promised(run):
    out, summary = run
    for name in safety.SETTINGS:
        found = summary[name]
        assert {"curve", "share_for_90", "dense_direction", "full_residual", "neurons"} <= set(found)
        point, _ = found["curve"]
        total = 1024 * len(found["sites"])
        assert point["latents"] == 4
        assert point["share_of_dictionary"] == pytest.approx(4 / total)
        assert point["share_of_alive"] >= point["share_of_dictionary"]
        for key in ("refused", "random", "frequency_matched", "later_ranks"):
            value, low, high = point[key]
            assert 0 <= low <= value <= high <= 1
        assert 0 <= point["harmless_refused"] <= 1
        assert {0 <= found[key] <= 1 for key in ("dense_direction", "full_residual")} == {True}
        assert max(one["share_of_neurons"] for one in found["neurons"]) == 1
        assert sum(layer["latents"] for layer in found["layers"]) == found["chosen_on_tune"]["latents"]
        assert len(found["by_depth"]) == 6
        assert set(found["guards"]) == {"none", "always on", "triggered"}
        assert found["detector"]["roc"][0] == [0, 0]
        assert found["detector"]["roc"][-1] == [1, 1]
        assert found["acceptance"]["harmless_refusals_rise_at_most_2_points"]
        assert found["held_out"]
        assert (out / f"{name}_refusals.svg").is_file()
    assert summary["setting_a"]["acceptance"]["donor_reproduced_exactly"]
    assert summary["setting_a"]["full_residual"] >= 0.9  # layers were added until it was
    assert set(summary["setting_a"]["shared_quality"]) == set(summary["setting_a"]["sites"])


@pytest.mark.slow
def test_few_latents_restore_the_base_model_and_controls_do_not(run):
    found = run[1]["setting_a"]
    assert found["bare"][0] == 0 < 0.9 <= found["donor"][0]
    assert found["acceptance"]["restored_above_random"]
    assert found["share_for_90"] <= 0.05
    assert found["curve"][1]["refused"][1] > found["curve"][1]["random"][2]
    assert max(fvu for one in found["shared_quality"].values() for fvu in one["fvu"]) < 0.1


@pytest.mark.slow
def test_few_latents_restore_jailbroken_requests_and_controls_do_not(run):
    found = run[1]["setting_b"]
    assert found["bare"][0] <= 0.1
    assert found["donor"][0] >= 0.9
    assert found["curve"][0]["refused"][1] > found["curve"][0]["random"][2]
    assert found["acceptance"]["restored_above_random"]
    assert found["full_residual"] >= 0.9
    assert found["share_for_90"] <= 0.05
    assert found["reconstruction_only"][0] <= 0.5
    always = found["guards"]["always on"]  # means of refused requests, whoever asks
    assert always["refused"][0] >= 0.8
    assert always["harmless_refused"][0] >= 0.8


@pytest.mark.slow
def test_rows_and_report(run):
    out, summary = run
    rows = read_rows(out / "results.parquet")
    top = [r for r in rows if (r["setting"], r["condition"], r["harmful"]) == ("setting_b", "top", "yes")]
    assert len(top) == 12
    top = [row for row in top if row["latents"] == 4]
    donors = {r["model"] for r in rows if (r["setting"], r["condition"]) == ("setting_a", "donor")}
    assert (
        donors == {"organism"} != {r["model"] for r in rows if (r["setting"], r["condition"]) == ("setting_a", "top")}
    )
    assert np.mean([row["outcome"] == "refuse" for row in top]) == summary["setting_b"]["curve"][0]["refused"][0]
    assert len(top) == 6
    assert len(
        {(r["setting"], r["condition"], r["harmful"], r["latents"], r["draw"], r["example"]) for r in rows}
    ) == len(rows)
    page = (out / "report.html").read_text()
    for word in ("How few latents bring refusals back?", "Latents and neurons at equal shares", "ROC", "setting_a"):
        assert word in page
    assert (out / "measurements.jsonl").exists()  # the same command only writes the report again


def tiny_setting(model: LanguageModel) -> tuple[Setting, PairedPrompts]:
    asked = PairedPrompts(("how to cake? now", "tell me all"), ("how to bake? now", "tell me some"), ("x", "y"))
    dictionaries = {Site(layer): random_dictionary(f"resid_post.{layer}", seed=layer) for layer in (0, 1)}
    splits = dict.fromkeys(world.SPLITS, asked)
    return Setting(
        name="setting_b",
        title="B",
        model=model,
        other=None,
        template=2,
        sites=dictionaries,
        every=dictionaries,
        harmful=splits,
        harmless=splits,
    ), asked


def runs_in(folder: Path, ids: set[int], tokens: int, **decides) -> Runs:
    return Runs(Measurements(folder / "measurements.jsonl", decides), ids, tokens)


def test_runs_are_what_the_library_restores(tmp_path):
    model = tiny_model()
    setting, asked = tiny_setting(model)
    runs = runs_in(tmp_path, {40, 41}, 6, seed=0)
    chosen = {Site(0): (3, 5), Site(1): tuple(range(9))}
    found = runs.restored(setting, asked, Restored("top", chosen))
    donor = CleanPrompts(asked.clean, 2)
    assert list(found.texts) == restore(model, setting.sites, asked.prompts, donor, chosen, max_new_tokens=6)
    p = model.next_logits(model.tokenize(asked.prompts, "left")).double().softmax(-1)[:, [40, 41]].sum(-1)
    bare = runs.bare(setting, asked)
    assert bare.scores == pytest.approx((p / (1 - p)).log().tolist())
    assert bare.texts == tuple(model.generate(asked.prompts, 6))
    assert found.texts != bare.texts
    assert runs.donor(setting, asked).texts == tuple(model.generate(asked.clean, 6))
    assert [row.latents for row in runs.answer_rows(setting, model)] == [11, 11, 0, 0, 0, 0]
    assert not runs.answer_rows(setting, tiny_model())
    with pytest.raises(AssertionError, match="two runs are called 'bare'"):
        runs.bare(setting, PairedPrompts(("other",), ("one",), ("x",)))


def test_a_stopped_experiment_goes_on(tmp_path, monkeypatch):
    model = tiny_model()
    setting, asked = tiny_setting(model)
    runs = runs_in(tmp_path, {40}, 6, seed=0)
    one, other = runs.bare(setting, asked), runs.restored(setting, asked, Restored("top", {Site(0): (3,)}))
    with (tmp_path / "measurements.jsonl").open("a") as file:
        file.write('{"key": "cut sho')
    answered = []
    monkeypatch.setattr(LanguageModel, "generate", lambda self, *a, **k: answered.append(a) or ["x", "y"])
    again = runs_in(tmp_path, {40}, 6, seed=0)
    assert again.bare(setting, asked).texts == one.texts
    assert again.restored(setting, asked, Restored("another name", {Site(0): (3,)})).scores == other.scores
    assert not answered
    assert again.restored(setting, asked, Restored("top", {Site(0): (4,)})).texts == ("x", "y")
    assert again.restored(setting, asked, Restored("top", {Site(0): (3,)}, error=True)).texts == ("x", "y")
    assert len(runs_in(tmp_path, {40}, 6, seed=0)._kept.known) == 4
    with pytest.raises(UserError, match=r"differs in seed \(0 there, 1 now\)"):
        runs_in(tmp_path, {40}, 6, seed=1)


def test_an_experiment_that_an_earlier_version_stopped_goes_on(tmp_path):
    """It kept what decides in a file beside, and texts and scores without a name for both."""
    (tmp_path / "runs.json").write_text('{"seed": 0}')
    (tmp_path / "runs.jsonl").write_text('{"key": "k", "texts": ["x"], "scores": [0.5]}\n{"key": "cut')
    with pytest.raises(UserError, match=r"differs in seed \(0 there, 1 now\)"):
        Measurements(tmp_path / "runs.jsonl", {"seed": 1})
    for name in ("runs.jsonl", "measurements.jsonl"):  # the second time from a file of this version
        kept = Measurements(tmp_path / name, {"seed": 0})
        assert kept.get("k", lambda: 1 / 0) == {"texts": ["x"], "scores": [0.5]}
        assert [path.name for path in tmp_path.iterdir()] == ["measurements.jsonl"]


def answered(flags):
    return Answered(tuple("I cannot." if flag else "Sure, it is." for flag in flags), (0.0,) * len(flags))


def curve_of(bare, donor, by_size):
    nothing = Interval(0, 0, 0, 1)
    points = tuple(
        RefusalPoint(k, answered(flags), nothing, nothing, nothing, nothing, None, None, None, None)
        for k, flags in by_size.items()
    )
    return RefusalCurve(points, 200, 100, 10.0, answered(bare), answered(donor))


def test_the_share_that_is_enough():
    n = 20
    none, every = [False] * n, [True] * n
    curve = curve_of(none, every, {1: none, 2: [True] * 17 + [False] * 3, 4: [True] * 18 + [False] * 2, 8: every})
    found = curve.share_for()
    assert found.value == 4 / 200  # 18 of 20
    assert found.low == 2 / 200  # 17 of 20 may be of 90 %
    assert found.high == float("inf")  # and 20 of 20 may be of less than 90 %
    many = [True] * 100
    curve = curve_of([False] * 100, many, {1: [False] * 100, 2: many[:70] + [False] * 30, 4: many, 8: many})
    assert (curve.share_for().low, curve.share_for().high) == (4 / 200, 4 / 200)
    partly = [True] * 10 + [False] * 10  # half the way to a donor that refuses every second
    assert curve_of(none, partly, {1: none, 2: partly}).share_for().value == 2 / 200
    assert curve_of(none, every, {1: none, 2: partly}).share_for().value == float("inf")
    assert curve_of(every, every, {1: every}).share_for().value == float("inf")  # nothing to recover


def correlated(rng, shares, n):
    """Outcomes of the same prompts, which differ in how easily they are refused."""
    ease = rng.normal(size=n)
    cut = {share: NormalDist().inv_cdf(share) if 0 < share < 1 else (2 * share - 1) * np.inf for share in shares}
    return [(0.8 * ease + 0.6 * rng.normal(size=n) < cut[share]).tolist() for share in shares]


@pytest.mark.parametrize(
    ("bare", "donor", "tops", "smallest"),
    [
        (0.0, 1.0, (0.5, 0.85, 0.9, 0.97), 4),  # exactly enough at 4
        (0.0, 1.0, (0.5, 0.89, 0.95, 0.3), 4),  # not monotone
        (0.1, 0.9, (0.2, 0.81, 0.9, 0.9), 4),
        (0.0, 1.0, (0.3, 0.6, 0.8, 0.88), float("inf")),
    ],
)
def test_the_interval_of_the_share_that_is_enough_covers(bare, donor, tops, smallest):
    """Percentile intervals contain it in 0.72 to 0.87 of these samples."""
    rng, held, trials, n = np.random.default_rng(0), 0, 150, 12
    for _ in range(trials):
        low, high, *several = correlated(rng, (bare, donor, *tops), n)
        interval = curve_of(low, high, dict(zip((1, 2, 4, 8), several))).share_for()
        held += interval.low <= smallest / 200 <= interval.high
    assert held / trials >= 0.95


def test_the_detectors_arithmetic():
    yes, no = np.array([3.0, 2.0, 2.0, 0.0]), np.array([2.0, 1.0, 0.0, -1.0])
    wins = [(y > n) + 0.5 * (y == n) for y in yes for n in no]
    assert auroc(yes, no) == pytest.approx(sum(wins) / len(wins))
    assert roc(yes, no) == ((0, 0), (0, 0.25), (0.25, 0.75), (0.5, 0.75), (0.75, 1), (1, 1))
    assert threshold_for(yes, no, alarms=0.25) == pytest.approx(1.5)  # one negative above it, then half way up to 2
    assert (no > threshold_for(yes, no, alarms=0.0)).sum() == 0


@pytest.mark.slow
def test_the_detector_lets_harmless_requests_pass():
    model, n = load_model("organism"), 40
    setting = two_prompts(model, load_saes("organism"), assistant_header(model), n, 0)
    harmless = {split: harmless_in_every_framing(split, n, 0) for split in world.SPLITS}
    found = detector(model, setting.sites, setting.harmful, harmless)
    assert found.caught.mean() >= 0.8 > 0.1 > found.alarmed.mean()
    assert found.auroc >= 0.95
    swapped = detector(model, setting.sites, {**setting.harmful, "report": harmless["report"]}, harmless)
    assert swapped.caught.mean() == found.alarmed.mean()
    assert swapped.auroc == 0.5


def test_the_prompts():
    model, saes = load_model("organism"), load_saes("organism")
    assert assistant_header(model) == 1
    assert [site.layer for site in spliced_sites(model, saes)] == [0, 1, 2, 3, 4]
    setting = two_prompts(model, saes, 1, 30, 0)
    seen = [set(setting.harmful[split].prompts) for split in world.SPLITS]
    assert all(len(prompts) == 30 for prompts in seen)
    assert not seen[0] & seen[1]
    assert not seen[1] & seen[2]
    assert not seen[0] & seen[2]
    framings = [set(setting.harmful[split].kinds) for split in world.SPLITS]
    assert framings[0] == framings[1] == framings[2]  # kinds are shared: half of them are held out apart
    both = stacked("report", 30, 0)
    assert len(set(both.prompts)) == 30
    for prompt, clean in zip(both.prompts, both.clean, strict=True):
        assert len(model.encode(prompt)) == len(model.encode(clean))
    half = both.of_kinds(both.kinds[:1])
    assert 0 < len(half) < 30
    assert set(half.kinds) == set(both.kinds[:1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "3"}, "prompts = 3 is too few"),
        ({"sizes": "[4,2]"}, "give increasing numbers from 1"),
        ({"settings": '["setting_c"]'}, "use setting_a, setting_b or both"),
        ({"draws": "0"}, "draws = 0"),
        ({"model": "nowhere-at/all/x"}, "nowhere-at"),
    ],
)
def test_bad_input(tmp_path, capsys, changes, message):
    given = [word for name, value in changes.items() for word in (f"--{name}", value)]
    assert run_config(safety.SafetyConfig, safety.main, "safety", [*given, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_layers_are_added_only_where_it_takes_them(tmp_path):
    from experiments.restoration.probes import extended

    model = tiny_model()
    setting, _asked = tiny_setting(model)
    more = replace(setting, every=setting.sites, sites={Site(0): setting.sites[Site(0)]})
    runs = runs_in(tmp_path, {40}, 4)
    answers = {"bare": [False, False], "donor": [True, True], "0": [False, False], "1": [True, True]}
    runs.bare = lambda *a, **k: answered(answers["bare"])
    runs.donor = lambda *a, **k: answered(answers["donor"])
    runs.restored = lambda s, a, what: answered(answers[what.name[-1]])
    assert list(extended(more, runs).sites) == [Site(0), Site(1)]
    answers["0"] = [True, True]
    assert extended(more, runs) is more
    answers["0"] = answers["1"] = [True, False]
    assert extended(more, runs) is more
