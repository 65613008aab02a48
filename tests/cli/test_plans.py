"""`saepatch plan COMMAND …` and `--dry_run`: the plan of a command, from its own settings."""

import json

import pytest
from tiny import random_sae, tiny_model

from saepatch.cli.main import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model's config and a dictionary: a plan reads no weights."""
    folder = tmp_path_factory.mktemp("plans")
    tiny_model().hf.config.save_pretrained(folder / "model")
    random_sae(d_sae=48).save_model(folder / "saes" / "resid_post.1")
    return folder


def plan(capsys, *words):
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_commands_plan_is_that_of_its_settings(place, capsys):
    given = ["--model", place / "model", "--sae", place / "saes", "--site", "resid_post.1", "--pairs", "pairs.jsonl"]
    own = ["--site", "resid_post.1", "--tokens", "20", "--d_sae", "48", "--dtype", "float32", "--rows", "3"]
    for command in ("patch", "attribute"):
        wanted = plan(capsys, "plan", place / "model", *own, "--work", command)
        assert plan(capsys, "plan", command, *given, "--tokens", "20", "--batch_size", "3") == wanted
        assert plan(capsys, command, *given, "--dry_run", "--tokens", "20", "--batch_size", "3") == wanted
    wanted = plan(capsys, "plan", place / "model", *own[:4], "--dtype", "float32", "--devices", "2")
    steer = ["--model", place / "model", "--latent", "resid_post.1:3", "--prompt", "a", "--unit", "1"]
    assert plan(capsys, "plan", "steer", *steer, "--devices", "2", "--tokens", "20", "--d_sae", "16384") == wanted


def test_a_plan_knows_the_width_of_the_embedded_dictionaries_or_says_that_it_does_not(capsys):
    assert main(["patch", "--pairs", "ioi", "--site", "resid_post.3", "--dry_run"]) == 0
    told = capsys.readouterr().out
    assert "1024 × 128" in told
    assert "assumed" not in told
    assert main(["plan", "patch", "--pairs", "ioi", "--site", "resid_post.3", "--sae", "release/id"]) == 0
    assert capsys.readouterr().out.endswith("16,384 latents are assumed: --d_sae says how many there are\n")


def test_a_plan_refuses_what_its_command_refuses(place, capsys):
    assert main(["plan", "patch", "--model", str(place / "model")]) == 2
    assert "give either --pairs" in capsys.readouterr().err
    assert main(["patch", "--dry_run", "--pairs", "ioi", "--model", str(place / "none")]) == 2
    assert "there is no file or folder" in capsys.readouterr().err
    assert main(["plan", "patch", "--pairs", "ioi", "--sites", "x"]) == 2
    assert "--sites" in capsys.readouterr().err
