"""Dictionaries that cannot be read: the message names the reason."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_sae

from saepatch.dictionaries.loading import load_sae
from saepatch.errors import UserError, reason_of
from saepatch.model.sites import Site


def test_an_unknown_architecture_is_named_beside_the_known_ones(tmp_path):
    folder = tmp_path / "resid_post.1"
    random_sae().save_model(folder)
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg | {"architecture": "telepathic"}))
    with pytest.raises(UserError, match="architecture 'telepathic', .*: use one of .*gated, .*topk"):
        load_sae(str(folder), "resid_post.1")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyError("batchtopk"), "KeyError: 'batchtopk'"),
        (OSError("no such file\nat all"), "no such file"),
        (RuntimeError(), "RuntimeError"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_a_reason_is_one_line_that_names_an_error_without_a_sentence(error, reason):
    assert reason_of(error) == reason


def changed(folder, **values):
    random_sae().save_model(folder)
    cfg = json.loads((folder / "cfg.json").read_text())
    named = {"hook_name": "blocks.1.hook_resid_post"}
    metadata = {**cfg.get("metadata", {}), **named, **values.pop("metadata", {})}
    (folder / "cfg.json").write_text(json.dumps({**cfg, **values, "metadata": metadata}))
    return str(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architecture": "batchtopk"}, r"trainer \(batchtopk\): .*save_inference_model"),
        ({"architecture": "jumprelu_transcoder"}, "cannot read the dictionary"),
        ({"k": 2**63 - 1}, "has k 9.*and 48 latents: correct k"),
        ({"k": 0}, "has k 0 and 48 latents"),
        ({"k": "many"}, "has k .many. and 48 latents"),
        ({"d_in": None}, "cannot read"),
        ({"metadata": {"hook_name": 5}}, "hook_name is 5, not a text; or give its site"),
        ({"metadata": {"hook_name": "model.layers.1.mlp"}}, "cannot read site 'model.layers.1.mlp'.*give its site"),
    ],
)
def test_a_changed_cfg_is_refused_with_its_reason(tmp_path, values, message):
    with pytest.raises(UserError, match=message) as refusal:
        load_sae(changed(tmp_path / "sae", **values))
    assert "\n" not in str(refusal.value)


def test_all_that_torch_says_of_weights_is_passed_on(tmp_path):
    folder = tmp_path / "sae"
    changed(folder, metadata={"hook_name": "blocks.0.hook_resid_post"})
    weights = load_file(folder / "sae_weights.safetensors")
    save_file(weights | {"b_surplus": weights["b_enc"].clone()}, folder / "sae_weights.safetensors")
    with pytest.raises(UserError, match=r"Error\(s\) in loading state_dict .*b_surplus"):
        load_sae(str(folder))


@pytest.mark.parametrize("name", ["model.layers.2", "transformer.h.2", "gpt_neox.layers.2", "model.decoder.layers.2"])
def test_the_module_path_of_a_block_is_its_output(tmp_path, name):
    assert load_sae(changed(tmp_path / "sae", metadata={"hook_name": name})).site == Site(2)
    assert load_sae(str(tmp_path / "sae"), "mlp_out.1").site == Site(1, "mlp_out")


def test_a_given_site_stands_where_the_file_says_nothing_that_can_be_read(tmp_path):
    place = changed(tmp_path / "sae", metadata={"hook_name": "encoder.block.1.layer.0"})
    assert load_sae(place, "resid_pre.1").site == Site(1, "resid_pre")


@pytest.mark.parametrize(("dtype", "stored"), [(torch.int64, "I64"), (torch.bool, "BOOL")])
def test_weights_that_are_no_floats_are_refused(tmp_path, dtype, stored):
    folder = changed(tmp_path / "sae")
    weights = load_file(f"{folder}/sae_weights.safetensors")
    save_file(weights | {"W_enc": weights["W_enc"].to(dtype)}, f"{folder}/sae_weights.safetensors")
    with pytest.raises(UserError, match=f"weights in W_enc stored as {stored}, not as floating-point"):
        load_sae(folder)
