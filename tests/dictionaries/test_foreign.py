"""Dictionaries that other trainers saved, beside those trainers' own formulas."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from saepatch.dictionaries.loading import load_sae, load_saes
from saepatch.errors import UserError
from saepatch.model.sites import Site

D_IN, D_SAE, K, THRESHOLD = 16, 16, 5, 0.6  # square, so that a transposed decoder is not refused by its shape


def normal(*shape, seed):
    return 0.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = normal(40, D_IN, seed=9)
ENCODER, DECODER = normal(D_SAE, D_IN, seed=1), normal(D_IN, D_SAE, seed=2)  # [out, in], as linear maps hold them
B_ENC, B_DEC = normal(D_SAE, seed=3), normal(D_IN, seed=4)
B_MAG, R_MAG = normal(D_SAE, seed=5), normal(D_SAE, seed=6)


def top(pre, k=K):
    best = pre.relu().topk(k)
    return torch.zeros_like(pre).scatter(-1, best.indices, best.values)


def above(pre):
    return pre.relu() * (pre.relu() > THRESHOLD)


def gated():
    pre = (X - B_DEC) @ ENCODER.T
    return (pre + B_ENC > 0) * (R_MAG.exp() * pre + B_MAG).relu()


LINEAR = {"encoder.weight": ENCODER, "decoder.weight": DECODER}
OWN = {"W_enc": ENCODER.T.contiguous(), "W_dec": DECODER.T.contiguous(), "b_enc": B_ENC, "b_dec": B_DEC}
ONE = {"k": torch.tensor(K), "threshold": torch.tensor(THRESHOLD)}
CENTRED = (X - B_DEC) @ ENCODER.T + B_ENC
CLASSES = {
    "AutoEncoder": (LINEAR | {"encoder.bias": B_ENC, "bias": B_DEC}, CENTRED.relu()),
    "GatedAutoEncoder": (
        LINEAR | {"decoder_bias": B_DEC, "gate_bias": B_ENC, "mag_bias": B_MAG, "r_mag": R_MAG},
        gated(),
    ),
    "AutoEncoderTopK": (LINEAR | {"encoder.bias": B_ENC, "b_dec": B_DEC} | ONE, top(CENTRED)),
    "BatchTopKSAE": (LINEAR | {"encoder.bias": B_ENC, "b_dec": B_DEC} | ONE, above(CENTRED)),
    "MatryoshkaBatchTopKSAE": (OWN | ONE, above(CENTRED)),
    "JumpReluAutoEncoder": (
        OWN | {"threshold": torch.full((D_SAE,), THRESHOLD)},
        above(X @ ENCODER.T + B_ENC),
    ),
}


def learned(folder, kind, file="ae.safetensors", **trainer):
    folder.mkdir(exist_ok=True)
    stated = {"dict_class": kind, "layer": 1, "submodule_name": "resid_post_layer_1", "k": K} | trainer
    (folder / "config.json").write_text(json.dumps({"trainer": stated, "buffer": {"ctx_len": 64}}))
    weights = {name: value.contiguous() for name, value in CLASSES[kind][0].items()}
    (save_file if file.endswith("safetensors") else torch.save)(weights, folder / file)


@pytest.mark.parametrize("kind", CLASSES)
def test_dictionary_learning(tmp_path, kind):
    learned(tmp_path / "sae", kind)
    dictionary = load_sae(str(tmp_path / "sae"))
    acts = CLASSES[kind][1]
    assert dictionary.site == Site(1)
    assert 0 < float((acts > 0).float().mean()) < 1
    latents = dictionary.encode(X[None])
    torch.testing.assert_close(latents.acts[0], acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(latents.reconstruction[0], acts @ DECODER.T + B_DEC, rtol=1e-5, atol=1e-5)
    assert list(load_saes(str(tmp_path / "sae"))) == [Site(1)]


def test_pickled_weights_are_refused_with_a_conversion_that_works(tmp_path):
    folder = tmp_path / "sae"
    learned(folder, "AutoEncoderTopK", "ae.pt")
    with pytest.raises(UserError, match="pickled weights") as refused:
        load_sae(str(folder))
    line = re.search(r'python -c "(.*)"', str(refused.value))
    exec(line[1], {})  # as `python -c` would
    acts = load_sae(str(folder)).encode(X[None]).acts[0]
    torch.testing.assert_close(acts, CLASSES["AutoEncoderTopK"][1], rtol=1e-5, atol=1e-5)


def test_what_cannot_be_read(tmp_path):
    folder = tmp_path / "sae"
    for trainer, message in (
        ({"dict_class": "CrossCoder"}, "is a CrossCoder of dictionary_learning"),
        ({"submodule_name": "unheard_of"}, "names no site"),
    ):
        learned(folder, "AutoEncoder", **trainer)
        with pytest.raises(UserError, match=message):
            load_sae(str(folder))
    assert load_sae(str(folder), "mlp_out.2").site == Site(2, "mlp_out")
    learned(folder, "AutoEncoder")
    save_file(LINEAR | {"bias": B_DEC}, folder / "ae.safetensors")
    with pytest.raises(UserError, match="b_enc has shape None"):
        load_sae(str(folder))
    learned(folder, "BatchTopKSAE")
    save_file(CLASSES["BatchTopKSAE"][0] | {"threshold": torch.tensor(-1.0)}, folder / "ae.safetensors")
    with pytest.raises(UserError, match="was never estimated"):
        load_sae(str(folder))


def test_sparsify(tmp_path):
    """Its decoder is stored as [latents, width], which sae_lens transposes."""
    folder = tmp_path / "layers.2"
    folder.mkdir()
    cfg = {"num_latents": D_SAE, "k": K, "d_in": D_IN, "activation": "topk", "transcode": False}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    stored = {"encoder.weight": ENCODER, "encoder.bias": B_ENC, "W_dec": DECODER.T.contiguous(), "b_dec": B_DEC}
    save_file(stored, folder / "sae.safetensors")
    dictionary = load_sae(str(folder))
    assert dictionary.site == Site(2)
    latents = dictionary.encode(X[None])
    torch.testing.assert_close(latents.acts[0], top(CENTRED), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(latents.reconstruction[0], top(CENTRED) @ DECODER.T + B_DEC, rtol=1e-5, atol=1e-5)
    (folder / "cfg.json").write_text(json.dumps(cfg | {"activation": "groupmax"}))
    with pytest.raises(UserError, match="only topk"):
        load_sae(str(folder))


@pytest.mark.parametrize("skip", [False, True])
def test_sparsify_transcoders(tmp_path, skip):
    """It does not centre what a transcoder reads."""
    folder = tmp_path / "h.2.mlp"
    folder.mkdir()
    cfg = {"num_latents": D_SAE, "k": K, "d_in": D_IN, "activation": "topk", "transcode": True, "skip_connection": skip}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    stored = {"encoder.weight": ENCODER, "encoder.bias": B_ENC, "W_dec": DECODER.T.contiguous(), "b_dec": B_DEC}
    w_skip = normal(D_IN, D_IN, seed=7)
    save_file(stored | ({"W_skip": w_skip} if skip else {}), folder / "sae.safetensors")
    dictionary = load_sae(str(folder))
    assert dictionary.site == Site(2, "mlp")
    latents, acts = dictionary.encode(torch.cat([B_DEC.expand_as(X), X], -1)[None]), top(X @ ENCODER.T + B_ENC)
    torch.testing.assert_close(latents.acts[0], acts, rtol=1e-5, atol=1e-5)
    written = acts @ DECODER.T + B_DEC + (X @ w_skip.T if skip else 0)
    torch.testing.assert_close(latents.reconstruction[0, :, :D_IN], written, rtol=1e-5, atol=1e-5)
    assert dictionary.alone([1, 2]) is None  # the k largest depend on all
    (folder / "cfg.json").write_text(json.dumps(cfg | {"k": 0}))
    with pytest.raises(UserError, match="has k 0 and 16 latents"):
        load_sae(str(folder))
