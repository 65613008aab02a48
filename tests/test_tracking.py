"""The local log always works; W&B beside it never stops a run."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from saepatch import tracking
from saepatch.errors import UserError
from saepatch.tracking import open_tracker


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """A machine on which W&B knows nobody and reaches nothing."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DATA_DIR", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text(encoding="utf-8").splitlines()]


def leet(folder: Path, *flags: str) -> str:
    """What W&B's own reader finds in an offline run."""
    wandb = Path(sys.executable).with_name("wandb")
    done = subprocess.run(
        [wandb, "leet", "inspect", "--json", *flags, folder], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_local_log_is_on_disk_at_every_line(tmp_path):
    tracker = open_tracker("none", tmp_path / "run", run="r", config={})
    tracker.log({"loss": torch.tensor(0.5), "n": 3, "acc": np.float32(0.25)}, step=0)
    tracker.log({"loss": float("nan"), "gap": float("-inf")}, step=10)
    first, second = read_lines(tmp_path / "run" / "metrics.jsonl")  # before finish: a kill loses nothing
    assert (first["step"], first["loss"], first["n"], first["acc"]) == (0, 0.5, 3, 0.25)
    assert second["time"] >= first["time"] > 0
    assert np.isnan(float(second["loss"]))
    assert float(second["gap"]) == -np.inf
    tracker.finish()
    tracker.finish()


def test_resume_appends_and_a_new_run_starts_afresh(tmp_path):
    for resume, steps in ((False, [0]), (True, [0, 1]), (False, [2])):
        with open_tracker("none", tmp_path, run="r", config={}, resume=resume) as tracker:
            tracker.log({"x": 1.0}, step=steps[-1])
        assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == steps


def test_summary_and_tables_have_local_twins(tmp_path):
    with open_tracker("none", tmp_path, run="r", config={}) as tracker:
        tracker.summarise({"best": 0.1})
        tracker.summarise({"best": 0.2, "worst": float("inf")})
        tracker.table("steered/before", ["text", "score"], [["über\n", 1], ["b", float("nan")]])
    assert json.loads((tmp_path / "metrics.summary.json").read_text()) == {"best": 0.2, "worst": "Infinity"}
    assert read_lines(tmp_path / "steered_before.jsonl") == [
        {"text": "über\n", "score": 1},
        {"text": "b", "score": "NaN"},
    ]


def test_wrong_calls_are_errors(tmp_path):
    with open_tracker("none", tmp_path, run="r", config={}) as tracker:
        with pytest.raises(ValueError, match="1 cells for 2 columns"):
            tracker.table("t", ["a", "b"], [["x"]])
        with pytest.raises(ValueError, match="'metrics'"):
            tracker.table("metrics", ["a"], [])
        with pytest.raises(ValueError, match="'step'"):
            tracker.log({"step": 1.0}, step=0)
        with pytest.raises((TypeError, ValueError)):
            tracker.log({"loss": "much"}, step=0)


@pytest.mark.parametrize("spec", ["", "tensorboard", "wandb:cloud", "wandb:"])
def test_unknown_spec(spec, tmp_path):
    with pytest.raises(UserError, match="use one of none, wandb") as caught:
        open_tracker(spec, tmp_path / "run", run="r", config={})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another --out"):
        open_tracker("none", tmp_path / "file" / "run", run="r", config={})


def test_full_disk_warns_once_and_the_run_goes_on(tmp_path, caplog):
    tracker = open_tracker("none", tmp_path, run="r", config={})
    tracker._lines.close()
    tracker._lines = open("/dev/full", "w")  # noqa: SIM115  the tracker closes it
    for step in range(3):
        tracker.log({"x": 1.0}, step=step)
    tracker.finish()
    assert [record.message for record in caplog.records if "lines are being lost" in record.message] == [
        f"cannot write {tmp_path / 'metrics.jsonl'} ([Errno 28] No space left on device): lines are being lost"
    ]


@pytest.mark.parametrize("spec", ["wandb", "wandb:offline", "wandb:online"])
def test_without_a_key_wandb_runs_offline(spec, tmp_path, caplog):
    out = tmp_path / "a run"  # the blank must survive the shell
    with caplog.at_level(logging.INFO), open_tracker(spec, out, run="first", config={"k": {"path": out}}) as tracker:
        tracker.table("early", ["a"], [["before the first step"]])
        tracker.log({"loss": 1.0}, step=0)
        tracker.log({"loss": 0.5}, step=100)
        tracker.table("texts", ["text", "score"], [["x", 1], ["y", None]])
        tracker.log({"accuracy": 0.75}, step=100)
        tracker.log({"loss": 9.0}, step=50)
        tracker.summarise({"best": 0.5})
        command = tracker.sync_command
    (folder,) = (out / "wandb").glob("offline-run-*")
    assert command == f"wandb sync '{folder}'"
    assert any(command in record.message for record in caplog.records)
    assert any("no key" in record.message for record in caplog.records) == (spec != "wandb:offline")
    assert any("step 50 comes after step 100" in record.message for record in caplog.records)
    assert len(read_lines(out / "metrics.jsonl")) == 4

    summary = json.loads(leet(folder, "--summary"))
    assert (summary["project"], summary["name"], summary["exit_code"]) == ("saepatch", "first", 0)
    assert summary["config"]["k"]["path"] == str(out)
    assert (summary["summary"]["loss"], summary["summary"]["accuracy"], summary["summary"]["best"]) == (0.5, 0.75, 0.5)
    assert summary["summary"]["texts"]["nrows"] == 2
    rows = [
        record["history"] for line in leet(folder).splitlines() if (record := json.loads(line))["type"] == "history"
    ]
    assert [(row["step"]["num"], row["item"]["loss"]) for row in rows] == [(0, 1), (100, 0.5)]
    assert not (tmp_path / "home" / ".local" / "share" / "wandb").exists()  # everything of the run lies under --out


def test_an_exception_leaves_both_logs_complete(tmp_path):
    with pytest.raises(KeyError), open_tracker("wandb:offline", tmp_path, run="r", config={}) as tracker:
        tracker.log({"loss": 1.0}, step=0)
        raise KeyError("training went wrong")
    assert tracker._lines.closed
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    summary = json.loads(leet(folder, "--summary"))
    assert summary["summary"]["loss"] == 1.0
    assert summary["exit_code"] == 1


def test_a_server_that_does_not_answer(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(tracking, "INIT_TIMEOUT", 1.0)
    with open_tracker("wandb:online", tmp_path, run="r", config={}) as tracker:
        tracker.log({"loss": 1.0}, step=0)
    assert len([record for record in caplog.records if "W&B could not start" in record.message]) == 1
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.parametrize("broken", ["log", "summarise", "table", "finish"])
def test_an_exploding_wandb_does_not_stop_the_run(broken, tmp_path, monkeypatch, caplog):
    calls = []

    def explode(*args):
        calls.append(broken)
        raise RuntimeError("boom\nand a long trace")

    monkeypatch.setattr(tracking._WandbRun, broken, explode)
    with open_tracker("wandb:offline", tmp_path, run="r", config={}) as tracker:
        for step in range(3):
            tracker.log({"loss": 1.0}, step=step)
            tracker.summarise({"best": 1.0})
            tracker.table("t", ["a"], [["x"]])
    assert calls == [broken]
    (warning,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning.startswith("W&B ")
    assert "(boom)" in warning
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 3


def test_wandb_that_cannot_be_imported(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with open_tracker("wandb", tmp_path, run="r", config={}) as tracker:
        tracker.log({"loss": 1.0}, step=0)
    assert "W&B could not start" in caplog.text


def test_wandb_stays_unimported_until_asked_for():
    code = "import sys, saepatch.tracking; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
