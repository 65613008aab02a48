"""A folder belongs to one command or experiment, finished or not."""

import json
from pathlib import Path

import pytest

from experiments import ioi, patchscope, safety
from experiments.steering import question as steering
from saepatch.cli.main import main
from saepatch.cli.parser import run_config
from saepatch.errors import UserError
from saepatch.runs.measurements import measurements
from saepatch.runs.ownership import check_owner
from training.__main__ import main as train

EXPERIMENTS = {
    "ioi": (ioi.IoiConfig, ioi.main),
    "patchscope": (patchscope.PatchscopeConfig, patchscope.main),
    "safety": (safety.SafetyConfig, safety.main),
    "steering": (steering.SteeringConfig, steering.main),
}


def begin(out: Path, experiment: str) -> Path:
    """As an experiment that was stopped leaves its folder."""
    with measurements(out, experiment, {"seed": 0}) as kept:
        kept.get("a", lambda: 1)
    return out


@pytest.mark.parametrize("left", ["parts", "answers", "checkpoints", "results.parquet", "summary", "measurements"])
def test_a_folder_of_another_run_is_refused(left, tmp_path):
    if left == "summary":
        (tmp_path / "summary.json").write_text(json.dumps({"top": {}}))
    elif left == "measurements":
        begin(tmp_path, "agreement")
    elif left == "results.parquet":
        (tmp_path / left).write_bytes(b"")
    else:
        (tmp_path / left).mkdir()
    with pytest.raises(UserError, match="holds a run of another command or experiment: give another --out"):
        check_owner(tmp_path, "ioi")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_leaves_the_folder_of_another_run_alone(experiment, tmp_path, capsys):
    (tmp_path / "summary.json").write_text(json.dumps({"top": {}}))
    config, run = EXPERIMENTS[experiment]
    assert run_config(config, run, experiment, ["--out", str(tmp_path)]) == 2
    assert "holds a run of another command or experiment" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize(
    "command",
    [
        ["patch", "--pairs", "ioi", "--site", "resid_post.3", "--latents", "1"],
        ["attribute", "--pairs", "ioi", "--site", "resid_post.3"],
        ["restore", "--prompts", "jailbreak:report", "--site", "resid_post.3", "--latents", "1"],
        ["demo"],
    ],
)
def test_commands_leave_the_folder_of_an_experiment_alone(command, tmp_path, capsys):
    assert main([*command, "--out", str(begin(tmp_path / "out", "safety"))]) == 2
    assert "another command" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["measurements.jsonl"]


def test_training_leaves_the_folder_of_an_experiment_alone(tmp_path, capsys):
    out = begin(tmp_path / "out", "safety")
    (tmp_path / "texts.txt").write_text("a b c\n" * 50)
    given = ["--model", "organism", "--data", str(tmp_path / "texts.txt"), "--sites", '["resid_post.0"]']
    assert train([*given, "--tokens", "2000", "--out", str(out)]) == 2
    assert "holds a run of another command" in capsys.readouterr().err


def test_a_run_may_write_into_its_own_folder(tmp_path):
    check_owner(tmp_path / "new", "steering")
    assert not (tmp_path / "new").exists()
    out = begin(tmp_path / "out", "steering")
    (out / "results.parquet").write_bytes(b"")
    check_owner(out, "steering")
    (out / "summary.json").write_text(json.dumps({"concepts": {}, "verdicts": {}}))
    check_owner(out, "steering")
    (out / "summary.json").write_text("{")
    with pytest.raises(UserError, match="another command or experiment"):
        check_owner(out, "steering")


def test_an_unfinished_experiment_is_listed_with_the_way_to_continue(tmp_path, capsys):
    out = begin(tmp_path / "out", "steering")
    assert main(["runs", str(tmp_path)]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split() == [str(out), "steering", "not", "finished"]
    assert main(["report", str(out)]) == 2
    assert "the steering experiment in it is not finished; give its command again" in capsys.readouterr().err
