"""Every command that loads a model can say how: each of these settings reaches the loader."""

from dataclasses import asdict, fields

import pytest
import torch
import yaml

from saepatch.cli.main import COMMANDS, main
from saepatch.errors import UserError
from saepatch.settings.checks import RENAMED
from saepatch.settings.mixins import ModelSettings

LOADING = {
    "demo": ("--out", "OUT"),
    "inspect": (),
    "patch": ("--pairs", "ioi", "--out", "OUT"),
    "attribute": ("--pairs", "ioi", "--out", "OUT"),
    "restore": ("--prompts", "refusal:report", "--out", "OUT"),
    "circuit": ("--pairs", "ioi", "--out", "OUT"),
    "edit": ("--requests", "organism", "--layers", "1", "--out", "OUT"),
    "latent": ("resid_post.3:281",),
    "steer": ("--latent", "resid_post.3:281", "--prompt", "a"),
    "play": (),
    "trace": (__file__,),
}


def test_commands_with_a_model_have_all_its_settings():
    named = {name for name, (config, _) in COMMANDS.items() if "model" in {each.name for each in fields(config)}}
    with_model = named - {"plan"}  # which reads a configuration and loads no weights
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


BEFORE = {  # keys that config.yaml had before commands shared their settings
    "patch": "align answers batch_size clean component controls corrupted corruption device device_map direction dtype "
    "each_position json latents metric min_gap model n out pairs part positions prepend_bos progress quiet sae seed "
    "shard site split track trust_remote_code",
    "attribute": "align answers batch_size clean corrupted corruption device device_map direction dtype json method "
    "metric min_gap model n out pairs part positions prepend_bos progress quiet sae sample seed shard site split steps "
    "track trust_remote_code verify",
    "restore": "chat controls device donor dtype error json judge k latents max_fvu model n out part prepend_bos "
    "progress prompts quiet ranking refusals sae seed select site template tokens track trust_remote_code",
    "demo": "device ioi_site json model out pairs quiet sae safety_site seed steering_site track",
}


@pytest.mark.parametrize("command", BEFORE)
def test_a_config_file_of_before_still_loads(command, tmp_path, capsys):
    config = COMMANDS[command][0]
    required = {"patch": {"pairs": "ioi"}, "attribute": {"pairs": "ioi"}, "restore": {"prompts": "refusal:report"}}
    values = asdict(config(**required.get(command, {})))
    file = tmp_path / "config.yaml"
    file.write_text(
        yaml.safe_dump({key: values[key if key in values else RENAMED[key]] for key in BEFORE[command].split()})
    )
    with pytest.raises(SystemExit) as stopped:
        main([command, "--config", str(file), "--print_config"])
    assert stopped.value.code in (0, None)
    assert yaml.safe_load(capsys.readouterr().out) == values
