"""The pronoun experiment: its pairs, and a small slice of it on the shipped model and on a real one."""

import json
from pathlib import Path

import pytest

from experiments import pronouns
from experiments.pairs.question import fitting
from saepatch.cli.parser import run_config
from saepatch.data.batches import batch_pairs
from saepatch.model.loading.load import load_model

pytestmark = pytest.mark.whole

SHARED = Path(__file__).parents[4] / "shared"
STORIES = SHARED / "models" / "stories260K"
TEXTS = SHARED / "data" / "tinystories_1000.jsonl"
needs_stories = pytest.mark.skipif(
    not (STORIES / "config.json").is_file(), reason="the stories260K model is not beside this clone"
)


SIZES = [1, 4, 16]


def run(*arguments):
    small = ["--sizes", str(SIZES), "--verify", "20", "--sample", "20"]
    return run_config(pronouns.PronounsConfig, pronouns.main, "pronouns", [*small, *arguments])


def check(out, pairs):
    summary = json.loads((out / "summary.json").read_text())
    assert summary["pairs"] == pairs
    assert summary["site"] in summary["ce_recovered"]
    for key in ("denoise_top", "denoise_random", "denoise_matched", "noise_top", "noise_random", "noise_matched"):
        assert [point[0] for point in summary[key]] == SIZES
        for _, value, low, high in summary[key]:
            assert low <= value <= high
    for name in ("report.html", "results.parquet", "config.yaml", "denoise.svg", "noise.svg", "baselines.svg"):
        assert (out / name).stat().st_size > 0
    return summary


@pytest.mark.slow  # test_study.py has the same stages on indirect objects
def test_on_the_shipped_model(tmp_path, capsys):
    assert run("--pairs", "12", "--out", str(tmp_path)) == 0
    summary = check(tmp_path, 12)
    assert summary["clean"] > 0 > summary["corrupted"]
    assert {k: v for k, v, *_ in summary["denoise_top"]}[16] > 0.5
    assert summary["site"] in capsys.readouterr().out


@needs_stories
def test_story_pairs_line_up_and_splits_share_no_name_or_template():
    model = load_model(str(STORIES))
    words = {}
    for split in ("select", "report"):
        pairs = [one.pair for one in fitting(model, pronouns.story_pairs(split, 0), 1000)]
        assert len(pairs) > 40
        batch_pairs(model, pairs)  # raises where lengths or answers do not fit
        assert {pair.answer for pair in pairs} == {" She", " He"}
        for pair in pairs:
            assert ("girl" in pair.clean) == (pair.answer == " She")
        for name in (*pronouns.GIRLS, *pronouns.BOYS):
            clean = sum(f" {name}" in pair.clean for pair in pairs)
            either = clean + sum(f" {name}" in pair.corrupted for pair in pairs)
            if either > 3:
                assert 0.2 <= clean / either <= 0.8, f"{name} is on one side only"
        names = {n for n in (*pronouns.GIRLS, *pronouns.BOYS) for p in pairs if f" {n}" in p.clean + p.corrupted}
        words[split] = (names, set(pronouns.TEMPLATES[split]))
    assert not words["select"][0] & words["report"][0]
    assert not words["select"][1] & words["report"][1]


@needs_stories
@pytest.mark.slow
def test_a_slice_of_training_and_experiment_on_a_real_model(tmp_path):
    from training.__main__ import main as train

    saes, out = tmp_path / "saes", tmp_path / "out"
    preset = Path(__file__).parents[3] / "training" / "configs" / "stories260k.yaml"
    size = ["--tokens", "60000", "--sites", '["resid_post.1", "resid_post.3"]', "--eval_tokens", "4000"]
    assert train([str(preset), "--model", str(STORIES), "--data", str(TEXTS), "--out", str(saes), *size]) == 0
    assert run("--model", str(STORIES), "--sae", str(saes), "--out", str(out), "--pairs", "16") == 0
    summary = check(out, 16)
    assert set(summary["ce_recovered"]) == {"resid_post.1", "resid_post.3"}
    assert summary["clean"] > 0 > summary["corrupted"]
    assert all(value > 0.5 for value in summary["ce_recovered"].values())


def test_bad_input(tmp_path, capsys):
    assert run("--pairs", "1", "--out", str(tmp_path)) == 2
    assert "too few for an interval" in capsys.readouterr().err
    assert run("--model", "organism", "--sae", str(tmp_path), "--out", str(tmp_path / "o")) == 2
    assert "has no dictionary" in capsys.readouterr().err
