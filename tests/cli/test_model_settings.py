"""Every command that loads a model can say how: each of these settings reaches the loader."""

from dataclasses import fields

import pytest
import torch

from saepatch.cli.main import COMMANDS, main
from saepatch.errors import UserError
from saepatch.settings.mixins import ModelSettings

LOADING = {
    "demo": ("--out", "OUT"),
    "inspect": (),
    "patch": ("--pairs", "ioi", "--out", "OUT"),
    "attribute": ("--pairs", "ioi", "--out", "OUT"),
    "restore": ("--prompts", "refusal:report", "--out", "OUT"),
    "latent": ("resid_post.3:281",),
    "steer": ("--latent", "resid_post.3:281", "--prompt", "a"),
}


def test_commands_with_a_model_have_all_its_settings():
    with_model = {name for name, (config, _) in COMMANDS.items() if "model" in {each.name for each in fields(config)}}
    assert with_model == set(LOADING)
    assert all(issubclass(COMMANDS[name][0], ModelSettings) for name in LOADING)


@pytest.mark.parametrize("command", LOADING)
def test_each_setting_reaches_the_loader(command, tmp_path, monkeypatch, capsys):
    asked = {}

    def load(name, device, dtype, **options):
        asked.update(options, name=name, device=device, dtype=dtype)
        raise UserError("asked for")

    monkeypatch.setattr("saepatch.runs.interpret.load_model", load)
    given = [option.replace("OUT", str(tmp_path / "out")) for option in LOADING[command]]
    name = ["organism-base"] if command == "inspect" else ["--model", "organism-base"]
    given += ["--device", "meta", "--device_map", "auto", "--dtype", "bfloat16", "--revision", "v2"]
    assert main([command, *name, *given, "--prepend_bos", "--trust_remote_code"]) == 2
    assert "error: asked for" in capsys.readouterr().err
    assert asked == {
        "name": "organism-base",
        "device": "meta",
        "device_map": "auto",
        "dtype": "bfloat16",
        "revision": "v2",
        "prepend_bos": True,
        "trust_remote_code": True,
    }


@pytest.mark.parametrize("command", sorted(set(LOADING) - {"inspect"}))
def test_an_unknown_device_map_is_refused(command, capsys):
    assert main([command, *LOADING[command], "--device_map", "some"]) == 2
    assert "device_map 'some': use auto" in capsys.readouterr().err


@pytest.mark.whole
def test_inspect_spreads_a_model(capsys):
    assert main(["inspect", "organism", "--device_map", "auto", "--dtype", "bfloat16", "--sae", "organism"]) == 0
    assert "resid_post.3" in capsys.readouterr().out
    assert torch.get_default_dtype() == torch.float32
