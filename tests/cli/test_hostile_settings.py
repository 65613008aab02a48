"""Settings that no run could use: values that miss, numbers without end, files that multiply. One line, exit code 2."""

import errno
import os

import pytest
import yaml

import saepatch.cli.guard as guard
from saepatch.cli.main import main
from saepatch.cli.parser import CommandResult, run_commands
from saepatch.errors import UserError
from saepatch.records import documents
from saepatch.records.documents import check_yaml, parse_json
from saepatch.settings.checks import check_values
from saepatch.settings.finished.runs import RunsConfig
from saepatch.settings.restore import RestoreConfig
from saepatch.settings.steer import SteerConfig
from saepatch.settings.sweeps import PatchConfig
from training.__main__ import main as train
from training.config import TrainingConfig


def refused(capsys, arguments, run=main):
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert len(err) <= guard.LONGEST + 10
    return err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pairs: ioi\nmin_gap:\n", "min_gap has no value"),
        ("pairs: ioi\npairs: facts\n", "key 'pairs' appears twice"),
        (f"pairs: ioi\nn: {'7' * 5000}\n", "4300 digits"),
        (f"pairs: {'[' * 3000}{']' * 3000}\n", "nested deeper"),
        ("pairs: ioi\nn: !!int ''\n", "index out of range"),
        ("n:\n", "holds no settings"),
        ("pairs: ioi\nconfig: settings.yaml\n", "loop"),
    ],
)
def test_a_config_file_that_cannot_be_meant(tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.yaml").write_text(text)
    assert message in refused(capsys, ["patch", "--config", "settings.yaml"])
    assert [path.name for path in tmp_path.iterdir()] == ["settings.yaml"]


def test_a_config_file_in_another_encoding(tmp_path, capsys):
    (tmp_path / "settings.yaml").write_bytes("pairs: größe".encode("utf-16"))
    assert "can't decode" in refused(capsys, ["patch", "--config", str(tmp_path / "settings.yaml")])


def test_what_the_run_would_refuse_is_refused_by_the_dry_run(tmp_path, capsys):
    (tmp_path / "settings.yaml").write_text("model: organism\nseed: null\nsites: [resid_post.1]\n")
    assert "seed has no value" in refused(capsys, [str(tmp_path / "settings.yaml"), "--dry_run"], train)
    for given in (["--seed", "-2"], ["--sae.k", str(2**64)], ["--data", str(tmp_path / "none.jsonl")]):
        refused(capsys, [*given, "--dry_run", "--out", str(tmp_path / "out")], train)
    (tmp_path / "out" / "resid_post.0").mkdir(parents=True)
    assert "holds resid_post.0" in refused(capsys, ["--dry_run", "--out", str(tmp_path / "out")], train)


@pytest.mark.parametrize("value", [-1, -(2**40), 10**30])
def test_seeds_that_no_generator_takes(value):
    for make in (
        lambda: PatchConfig(pairs="ioi", seed=value),
        lambda: SteerConfig(latent="resid_post.3:1", prompt="a", seed=value),
        lambda: RestoreConfig(prompts="refusal:tune", seed=value),
        lambda: TrainingConfig(seed=value),
    ):
        with pytest.raises(UserError, match="^seed "):
            make()


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 10**40])
def test_values_that_no_setting_takes(value):
    with pytest.raises(UserError, match=r"sae\.lr|sae\.k|sparsity"):
        TrainingConfig(sae=type(TrainingConfig().sae)(sparsity=value))
    with pytest.raises(UserError, match="min_gap"):
        check_values(PatchConfig, {"min_gap": value})


def test_a_value_that_is_missing_under_a_section():
    with pytest.raises(UserError, match=r"^sae\.k has no value"):
        check_values(TrainingConfig, {"sae": {"k": None, "d_sae": None}})


@pytest.mark.parametrize("text", ["a\0b", "a\ud83db", "\udcff"])
def test_texts_that_no_file_takes(text):
    with pytest.raises(UserError, match="out is .* remove the NUL"):
        PatchConfig(pairs="ioi", out=text)
    with pytest.raises(UserError, match="sites is "):
        TrainingConfig(sites=["resid_post.0", text])


def test_numbers_inside_texts_are_bounded(capsys):
    many = "9" * 6000
    for arguments in (
        ["steer", "--prompt", "a", "--latent", f"resid_post.0:{many}"],
        ["steer", "--prompt", "a", "--latent", f"resid_post.{many}:0"],
        ["patch", "--pairs", "ioi", "--shard", f"0/{many}"],
    ):
        assert "characters …" in refused(capsys, arguments)


def test_aliases_are_counted_before_they_are_written_out(monkeypatch):
    monkeypatch.setattr(documents, "MAX_NODES", 30)
    check_yaml("a: &a [1, 2, 3]\nb: [*a, *a, *a]\n")
    with pytest.raises(yaml.YAMLError, match="more than 30 values"):
        check_yaml("a: &a [1, 2, 3]\nb: &b [*a, *a, *a]\nc: {d: *b, e: *b}\n")
    with pytest.raises(yaml.YAMLError, match="alias"):
        check_yaml("a: &a [1, *a]\n")


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 2}', '{"b": [{"a": 1, "a": 1}]}', "[" * 20_000, "1" * 5000, '"\\ud800"']
)
def test_json_that_cannot_be_meant(text):
    with pytest.raises(UserError, match="^there is not"):
        parse_json(text, "there")


def run(command, capsys):
    code = run_commands({"runs": (RunsConfig, command)}, "saepatch", "", str, ["runs"])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EISDIR, errno.ENOENT, errno.EROFS])
def test_what_the_disk_refuses_is_one_line(number, capsys):
    def command(_):
        raise OSError(number, os.strerror(number), "runs/one/part-00001.parquet")

    code, _, err = run(command, capsys)
    assert code == 2
    assert err.startswith(f"error: runs/one/part-00001.parquet: {os.strerror(number)}: ")
    assert ("free some space" in err) == (number == errno.ENOSPC)
    assert err.count("\n") == 1


def test_an_output_that_is_full(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        monkeypatch.setattr(os, "dup2", lambda *_: None)
        code = run_commands({"runs": (RunsConfig, lambda _: CommandResult("text"))}, "saepatch", "", str, ["runs"])
        monkeypatch.undo()
        assert code == 2
        assert "No space left" in capsys.readouterr().err
        with pytest.raises(OSError, match="No space"):
            full.close()


def test_a_message_is_one_line_that_ends(capsys):
    def command(_):
        raise UserError("first\nlast " + "x" * 60_000)

    code, _, err = run(command, capsys)
    assert code == 2
    assert err.startswith("error: first last xxx")
    assert len(err) <= guard.LONGEST
    assert "58,058 characters" in err
