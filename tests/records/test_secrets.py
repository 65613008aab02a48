"""Secrets stay out of what runs write; servers listen on this machine alone."""

import logging
from pathlib import Path

import pytest
import yaml

from saepatch.cli.parser import run_commands
from saepatch.errors import UserError
from saepatch.records import provenance
from saepatch.records.files import write_yaml
from saepatch.records.secrets import redacted, redacted_values
from saepatch.runs.driver import Place
from saepatch.settings.finished.runs import RunsConfig
from saepatch.settings.sweeps import PatchConfig
from training.config import TrainingConfig
from training.loop.checkpoints import identifying_settings

SECRETS = ["hf_" + "a1B2" * 8, "ghp_" + "Zz09" * 9, "sk-proj-" + "x" * 30, "AKIA" + "ABCD1234" * 2]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("secret", SECRETS)
def test_tokens_are_told_by_their_form(secret, tmp_path, monkeypatch, capsys):
    address = f"https://user:{secret}@host.example/model"
    assert redacted(f"load {address}") == "load https://[redacted]@host.example/model"
    assert redacted_values({"a": [secret], "b": 1}) == {"a": ["[redacted]"], "b": 1}
    write_yaml({"model": address, "n": 3}, tmp_path / "config.yaml")
    assert secret not in (tmp_path / "config.yaml").read_text()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["n"] == 3
    monkeypatch.setattr("sys.argv", ["saepatch", "patch", "--model", address])
    monkeypatch.setattr("sys.orig_argv", ["saepatch"])
    assert provenance.command_line() == "saepatch patch --model https://[redacted]@host.example/model"
    place = Place(PatchConfig(pairs="ioi", model=address), tmp_path, 0, 1, [])
    assert secret not in str(place.settings)
    assert secret not in str(identifying_settings(TrainingConfig(model=address)))

    def command(_):
        logging.getLogger("saepatch").warning("loading %s", address)
        raise UserError(f"no {address}")

    assert run_commands({"runs": (RunsConfig, command)}, "saepatch", "", str, ["runs"]) == 2
    shown = capsys.readouterr().err
    assert secret not in shown
    assert shown.count("[redacted]") == 2


@pytest.mark.parametrize("text", ["resid_post.3: 281", "hf_hub", "a1b2c3d4e5f6a7b8", "https://host/path", "sk-learn"])
def test_what_is_no_secret_stays(text):
    assert redacted(text) == text


def test_servers_bind_to_this_machine(monkeypatch):
    launch = pytest.importorskip("trackio.launch")
    assert launch.LOCALHOST_NAME == "127.0.0.1"
    served = [line for line in (ROOT / "Makefile").read_text().splitlines() if "http.server" in line]
    assert served
    assert all("--bind 127.0.0.1" in line for line in served)
