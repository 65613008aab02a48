"""Training: the loop, what is saved, and what the command line refuses."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs_of_training import documents, small
from tiny import tiny_model

from saepatch.dictionaries.loading import load_saes
from saepatch.errors import UserError
from saepatch.model.sites import Site
from training.__main__ import main, read
from training.config import SAEConfig
from training.loop.trainer import train_saes
from training.steps.learner import schedule

pytestmark = pytest.mark.whole

ROOT = Path(__file__).parents[2]
STORIES = ROOT.parent / "shared/models/stories260K"
STORY_TEXTS = ROOT.parent / "shared/data/tinystories_1000.jsonl"


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "saes"
    return out, train_saes(model, documents(), small(data="made up"), out).figures


# The loop and what it saves


def test_what_a_run_leaves(trained, model):
    out, found = trained
    files = {"config.yaml", "metrics.jsonl", "metrics.summary.json", "summary.json", "artifacts.jsonl"}
    assert {p.name for p in out.iterdir()} == files | {"resid_post.0", "resid_post.1", "resid_post.2"}
    summary = json.loads((out / "summary.json").read_text())
    for site, row in found.items():
        assert json.loads((out / str(site) / "metrics.json").read_text()) == row == summary["sites"][str(site)]
        assert {"fvu", "l0", "alive_share", "dense_share", "kl", "tokens", "seconds", "identity_error"} <= row.keys()
        assert {"ce_model", "ce_spliced", "ce_ablated", "ce_recovered"} <= row.keys()
        metadata = json.loads((out / str(site) / "cfg.json").read_text())["metadata"]
        assert metadata["hook_name"] == site.hook_name
        assert metadata["model_fingerprint"] == model.fingerprint
        assert metadata["dataset_path"] == "made up"
        assert metadata["training_tokens"] == 8192
        assert metadata["prepend_bos"] is True
        assert metadata["exclude_special_tokens"] == sorted(model.tokenizer.all_special_ids)
        assert metadata["metrics"] == row
    assert read([str(out / "config.yaml")]).to_dict() == small(data="made up").to_dict()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    log, densities = ([row for row in lines if ("lr" in row) == training] for training in (True, False))
    assert len(densities) == len(found)
    assert [row["step"] for row in log] == [256, 2304, 4352, 6400, 8192]
    assert log[-1]["resid_post.1/fvu"] < 0.7 * log[0]["resid_post.1/fvu"]


def test_training_helps(trained, model, tmp_path):
    _, found = trained
    untrained = train_saes(model, documents(), small(lr=1e-12, sites=["resid_post.1"]), tmp_path / "untrained").figures
    assert found[Site(1)]["fvu"] < 0.7 * untrained[Site(1)]["fvu"]
    assert found[Site(1)]["kl"] < untrained[Site(1)]["kl"]
    assert found[Site(1)]["identity_error"] < 1e-4


def test_a_run_is_repeatable_and_sites_do_not_disturb_each_other(trained, model, tmp_path):
    out, found = trained
    alone = train_saes(model, documents(), small(sites=["resid_post.1"]), tmp_path / "alone").figures
    first, second = load_saes(str(out))[Site(1)], load_saes(str(tmp_path / "alone"))[Site(1)]
    assert first.fingerprint == second.fingerprint
    assert alone[Site(1)]["fvu"] == found[Site(1)]["fvu"]


def test_schedule():
    rates = [schedule(step, 100, 0.1, 0.2) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[50] == rates[80] == 1
    assert rates[99] == pytest.approx(0.05)
    assert [schedule(step, 10, 0, 0) for step in (0, 9)] == [1, 1]


def test_a_loss_that_is_not_finite_stops_the_run(model, tmp_path):
    with pytest.raises(
        UserError, match=r"the loss at resid_post\.\d is (nan|inf) at step \d+: start again .* a lower lr"
    ):
        train_saes(model, documents(), small(lr=1e30, warmup=0.0), tmp_path / "run")
    assert not list((tmp_path / "run").glob("resid_post*"))


def test_dictionaries_are_not_overwritten_unasked(trained, model):
    out, _ = trained
    before = (out / "resid_post.1" / "sae_weights.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"holds resid_post\.1 already: .* --overwrite true"):
        train_saes(model, documents(), small(sites=["resid_post.1"]), out)
    assert (out / "resid_post.1" / "sae_weights.safetensors").read_bytes() == before


def test_overwrite(model, tmp_path):
    for seed in (0, 1):
        config = small(sites="resid_post.1", overwrite=True, tokens=1024, seed=seed)
        train_saes(model, documents(), config, tmp_path / "run")
    assert json.loads((tmp_path / "run/resid_post.1/cfg.json").read_text())["metadata"]["seed"] == 1
    assert not list((tmp_path / "run").glob(".*"))


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": ["resid_post.3"]}, "3 layers, 0 to 2"),
        ({"context": 65}, "longer than the 64 positions"),
        ({"sae": SAEConfig(k=200)}, "sae.k is 200, but the dictionary has 128 latents"),
    ],
)
def test_what_does_not_fit_the_model(model, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train_saes(model, documents(), small(**changes), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_text_that_is_too_short(model, tmp_path):
    with pytest.raises(UserError, match="too short to evaluate on"):
        train_saes(model, ["a", "b", "c", "d"], small(), tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "no config file 'nowhere.yaml'"),
        (["--nonsense", "3"], "nonsense"),
        (["--sae.nonsense", "3"], "nonsense"),
        (["--dead_after", "3"], "belongs under 'sae', --sae.dead_after on"),
        (["misplaced.yaml"], "'dead_after' is not a setting at the top level: it belongs under 'sae'"),
        (["--tokens", "many"], "tokens"),
        (["--sae.k", "0"], "sae.k is 0: use a number above 0"),
        (["--sae.k", "9", "--sae.d_sae", "8"], "sae.k is 9, but the dictionary has 8 latents"),
        (["--sites", "resid_pots.1"], "unknown stream 'resid_pots'"),
        (["--sites", "[]"], "sites is empty"),
        (["--held_out", "1"], "held_out is 1"),
        (["--warmup", "0.8", "--decay", "0.8"], "add up to more than 1"),
        (["--tokens", "100"], "less than one batch of 1024"),
        (["--buffer", "100"], "less than one batch of 1024"),
        (["--context", "1"], "at least 2 tokens"),
        (["--lr", "0"], "lr is 0"),
        (["--track", "pigeon"], "unknown tracker 'pigeon'"),
        (["--out", "run"], "no data to train on"),
        (["--data", "nowhere.jsonl"], "no file or folder 'nowhere.jsonl'"),
        (["--data", "a.pickle"], "kind of file that cannot be read"),
        (["--data", "empty.jsonl"], "empty.jsonl"),
        (["--data", "broken.jsonl"], "cannot read data 'broken.jsonl'"),
        (["--data", "blank.jsonl"], "contains no text"),
        (["--data", "numbers.jsonl"], "is int, not text"),
        (["--data", "good.jsonl", "--text_column", "body"], r"no column 'body': .*\(text\)"),
        (["--data", "good.jsonl", "--model", "nowhere/at/all"], "'nowhere/at/all'"),
        (["--data", "good.jsonl", "--out", "good.jsonl/run"], "cannot write to 'good.jsonl/run'"),
    ],
)
def test_command_line_refusals(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    files = {"a.pickle": "x", "empty.jsonl": "", "broken.jsonl": "{'text", "blank.jsonl": '{"text": " "}\n'}
    files |= {"numbers.jsonl": '{"text": 3}\n', "good.jsonl": '{"text": "one two"}\n{"text": "three four"}\n'}
    files["misplaced.yaml"] = "data: good.jsonl\ndead_after: 3\n"
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("error: ")
    assert re.search(message, captured.err), captured.err
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(files)


def test_presets_are_valid():
    presets = sorted((ROOT / "training/configs").glob("*.yaml"))
    assert {preset.stem for preset in presets} >= {"organism", "stories260k"}
    for preset in presets:
        config = read([str(preset), "--sae.k", "7", "--out", "elsewhere"])
        assert (config.sae.k, config.out) == (7, Path("elsewhere"))


# A model nobody here made


@pytest.mark.slow
def test_real_model_from_the_command_line(tmp_path, capsys):
    if not (STORIES.is_dir() and STORY_TEXTS.is_file()):
        pytest.skip(f"no real model at {STORIES}")
    small_run = ["--tokens", "60_000", "--eval_tokens", "3000", "--sites", "[resid_post.0, resid_post.2]"]
    given = ["training/configs/stories260k.yaml", "--model", str(STORIES), "--data", str(STORY_TEXTS)]
    assert main([str(ROOT / given[0]), *given[1:], *small_run, "--out", str(tmp_path / "run")]) == 0
    assert "resid_post.2" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["sites"]["resid_post.2"]["ce_recovered"] > 0.9
    assert set(load_saes(str(tmp_path / "run"))) == {Site(0), Site(2)}


@pytest.mark.slow  # test_resumed_training.py interrupts the tiny model
def test_an_interrupted_run_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path):
    if not (STORIES.is_dir() and STORY_TEXTS.is_file()):
        pytest.skip(f"no real model at {STORIES}")
    command = [sys.executable, "-m", "training", "--log_every", "1"]
    command += ["--model", str(STORIES), "--data", str(STORY_TEXTS)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    out = tmp_path / "run"
    run = subprocess.Popen(
        [*command, "--out", str(out)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = out / "metrics.jsonl"
    for _ in range(600):
        if log.is_file() and log.read_text().count("\n") > 2:
            break
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    _, complained = run.communicate(timeout=60)
    assert run.returncode == 130
    assert re.search(r"interrupted: after [\d,]+ tokens; a checkpoint is in .*--resume true", complained)
    assert "Traceback" not in complained
    assert {p.name for p in out.iterdir()} == {"metrics.jsonl", "checkpoints"}


def test_sites_with_and_without_dead_latents_share_a_log(tmp_path):
    """Only a site with dead latents has an auxiliary loss; which has some first is a matter of chance."""
    config = small(log_every=1, sae=SAEConfig(k=2, d_sae=64, dead_after=700))
    train_saes(tiny_model(), documents(), config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    auxiliary = [{key: value for key, value in row.items() if key.endswith("loss/auxiliary")} for row in rows]
    assert any(0.0 in row.values() and any(row.values()) for row in auxiliary)  # one site with, one without
    for row in rows:
        for site in ("resid_post.0", "resid_post.1"):
            if f"{site}/loss" in row:
                terms = row[f"{site}/loss/mse"] + row.get(f"{site}/loss/auxiliary", 0)
                assert terms == pytest.approx(row[f"{site}/loss"], rel=1e-5)
