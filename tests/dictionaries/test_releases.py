"""Dictionaries in the layouts that others publish, made small, served from 127.0.0.1, beside their own formulas."""

import json

import numpy as np
import pytest
import torch
from hub import serve, using
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from safetensors.torch import save_file
from tiny import tiny_model

from saepatch.dictionaries.loading import load_sae, wrap_sae
from saepatch.errors import UserError
from saepatch.model.sites import Site
from saepatch.splicing.splice import record_latents

WIDTH, D_SAE, K = 16, 16, 5  # square, so that a transposed matrix is not refused by its shape


def normal(*shape, seed):
    return 0.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = normal(40, WIDTH, seed=9)
W_ENC, W_DEC = normal(WIDTH, D_SAE, seed=1), normal(D_SAE, WIDTH, seed=2)
B_ENC, B_DEC, SKIP = normal(D_SAE, seed=3), normal(WIDTH, seed=4), normal(WIDTH, WIDTH, seed=5)
THRESHOLD = normal(D_SAE, seed=6).abs()
LINEAR = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T, "decoder.bias": B_DEC}


def top(pre):
    best = pre.relu().topk(K)
    return torch.zeros_like(pre).scatter(-1, best.indices, best.values)


def jump(pre, threshold):
    return torch.where(pre > threshold, pre.relu(), 0)


def stored(file, weights):
    file.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in weights.items()}
    if file.suffix == ".safetensors":
        save_file(weights, file)
    elif file.suffix == ".npz":
        np.savez(file, **{name: value.numpy() for name, value in weights.items()})
    else:
        torch.save(weights, file)


def told(file, config):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(config))  # is YAML, too


def gemma_scope_2(folder, affine=False):
    """Lieberum et al. 2024: JumpReLU; Gemma Scope 2's transcoders may have an affine skip connection."""
    weights = {"w_enc": W_ENC, "w_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": THRESHOLD}
    stored(folder / "params.safetensors", weights | ({"affine_skip_connection": SKIP} if affine else {}))
    acts = jump(X @ W_ENC + B_ENC, THRESHOLD)
    return acts, acts @ W_DEC + B_DEC + (X @ SKIP if affine else 0)


def gemma_scope(folder):
    weights = {"W_enc": W_ENC, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": THRESHOLD}
    stored(folder / "params.npz", weights)
    acts = jump(X @ W_ENC + B_ENC, THRESHOLD)
    return acts, acts @ W_DEC + B_DEC


def llama_scope(folder, factor):
    """He et al. 2024 for inference: the encoder's bias and the decoder's in units of the input, one threshold.

    sae_lens holds the same latents in units of the normalised input, `factor` times as large.
    """
    stored(folder / "checkpoints/final.safetensors", LINEAR)
    norm = WIDTH**0.5 / factor
    told(
        folder / "hyperparams.json",
        {"d_model": WIDTH, "d_sae": D_SAE, "hook_point_in": "blocks.0.hook_resid_post", "jump_relu_threshold": 0.3}
        | {"dataset_average_activation_norm": {"in": norm, "out": norm}},
    )
    acts = jump(X @ W_ENC + B_ENC / factor, 0.3)
    return factor * acts, acts @ W_DEC + B_DEC / factor


def llama_scope_r1(folder, factor):
    weights = LINEAR | {"log_jumprelu_threshold": THRESHOLD.log()}
    stored(folder / "sae_weights.safetensors", weights)
    told(folder / "config.json", {"d_model": WIDTH, "expansion_factor": 1, "hook_point_in": "blocks.0.hook_resid_post"})
    acts = jump(factor * X @ W_ENC + B_ENC, THRESHOLD)
    return acts, (acts @ W_DEC + B_DEC) / factor


def qwen_scope(file):
    stored(file, {"W_enc": W_ENC.T, "W_dec": W_DEC.T, "b_enc": B_ENC, "b_dec": B_DEC})
    acts = top(X @ W_ENC + B_ENC)
    return acts, acts @ W_DEC + B_DEC


def sae_bench(folder):
    """dictionary_learning's AutoEncoderTopK, whose weights sae_lens reads without executing what is pickled."""
    weights = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T, "b_dec": B_DEC}
    stored(folder / "ae.pt", weights | {"k": torch.tensor(K), "threshold": torch.tensor(0.1)})
    trainer = {"dict_class": "AutoEncoderTopK", "layer": 12, "k": K, "activation_dim": WIDTH, "dict_size": D_SAE}
    told(folder / "config.json", {"trainer": trainer | {"lm_name": "google/gemma-2-2b"}, "buffer": {"ctx_len": 128}})
    acts = top((X - B_DEC) @ W_ENC + B_ENC)
    return acts, acts @ W_DEC + B_DEC


def relu_linear(file, suffix=""):
    stored(file, {name.replace(".", f"{suffix}."): value for name, value in LINEAR.items()})
    acts = (X @ W_ENC + B_ENC).relu()
    return acts, acts @ W_DEC + B_DEC


def hook_z(file):
    stored(file, {"W_enc": W_ENC, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC})
    told(
        file.with_name(file.stem + "_cfg.json"),
        {"act_size": WIDTH, "dict_size": D_SAE, "act_name": "blocks.0.attn.hook_z"},
    )
    acts = ((X - B_DEC) @ W_ENC + B_ENC).relu()
    return acts, acts @ W_DEC + B_DEC


def older_sae_lens(folder):
    """Bloom 2024: no architecture is named, and the site is a hook_point."""
    stored(folder / "sae_weights.safetensors", {"W_enc": W_ENC, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC})
    told(folder / "cfg.json", SMALL | {"hook_point": "blocks.8.hook_resid_pre", "dtype": "torch.float32"})
    acts = ((X - B_DEC) @ W_ENC + B_ENC).relu()
    return acts, acts @ W_DEC + B_DEC


def qwen_transcoder(file):
    stored(file, {"W_enc": W_ENC.T, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC})
    sizes = {"d_model": WIDTH, "d_feature": D_SAE, "batch_size": 8}
    told(file.parent / "wandb-config.yaml", {name: {"value": value} for name, value in sizes.items()})
    told(file.parent / "config.yaml", {"model_name": "Qwen/Qwen3-4B"})
    acts = (X @ W_ENC + B_ENC).relu()
    return acts, acts @ W_DEC + B_DEC


SMALL = {"d_in": WIDTH, "d_sae": D_SAE}  # where sae_lens knows the true sizes by heart
# Release and id as a user gives them: the site, what makes the files, and what replaces sae_lens' knowledge.
DEFAULT = {
    "gemma-scope-2-270m-pt-transcoders/transcoder/layer_9_width_16k_l0_small_affine": ("mlp.9", gemma_scope_2, {}),
    "google/gemma-scope-2-270m-pt/resid_post/layer_9_width_4m_l0_big": ("resid_post.9", gemma_scope_2, {}),
    "llama_scope_lxr_8x/l0r_8x": ("resid_post.0", llama_scope, {}),
    "qwen-scope-3-1.7b-base-w32k-l50/layer0": ("resid_post.0", qwen_scope, SMALL | {"activation_fn_kwargs": {"k": K}}),
}
OTHERS = {
    "gemma-scope-2-270m-pt-res/layer_12_width_16k_l0_big": ("resid_post.12", gemma_scope_2, {}),
    "gemma-scope-2-270m-pt-att/layer_12_width_16k_l0_big": ("z.12", gemma_scope_2, {}),
    "gemma-scope-2-270m-pt-mlp/layer_12_width_16k_l0_big": ("mlp_out.12", gemma_scope_2, {}),
    "google/gemma-scope-2-270m-pt/transcoder/layer_5_width_3k_l0_small": ("mlp.5", gemma_scope_2, {}),
    "gemma-scope-2b-pt-res/layer_0/width_16k/average_l0_105": ("resid_post.0", gemma_scope, SMALL),
    "gemma-scope-2b-pt-att/layer_0/width_16k/average_l0_104": ("z.0", gemma_scope, SMALL),
    "gemma-scope-2b-pt-transcoders/layer_0/width_16k/average_l0_76": ("mlp.0", gemma_scope, SMALL | {"d_out": WIDTH}),
    "llama_scope_r1_distill/l0r_800m_slimpajama": ("resid_post.0", llama_scope_r1, {}),
    "sae_bench_gemma-2-2b_topk_width-2pow12_date-1109/blocks.12.hook_resid_post__trainer_0": (
        "resid_post.12",
        sae_bench,
        {},
    ),
    "deepseek-r1-distill-llama-8b-qresearch/blocks.19.hook_resid_post": ("resid_post.19", relu_linear, SMALL),
    "goodfire-llama-3.1-8b-instruct/layer_19": ("resid_post.19", relu_linear, SMALL),
    "mwhanna-qwen3-4b-transcoders/layer_0": ("mlp.0", qwen_transcoder, {}),
    "gpt2-small-hook-z-kk/blocks.0.hook_z": ("z.0", hook_z, {}),
    "gpt2-small-res-jb/blocks.8.hook_resid_pre": ("resid_pre.8", older_sae_lens, {}),
}
RELEASES = DEFAULT | OTHERS


@pytest.mark.filterwarnings("ignore")  # the hub client's own, and sae_lens' advice
@pytest.mark.parametrize("spec", [*DEFAULT, *(pytest.param(spec, marks=pytest.mark.slow) for spec in OTHERS)])
def test_what_others_publish_is_what_they_compute(spec, tmp_path, monkeypatch):
    site, make, known = RELEASES[spec]
    release, _, number = spec.partition("/")
    lookup = get_pretrained_saes_directory().get(release)
    options = {}
    if lookup is None:
        owner, name, path = spec.split("/", 2)
        repository = f"{owner}/{name}"
    else:
        repository, path = lookup.repo_id, lookup.saes_map[number]
        monkeypatch.setattr(lookup, "config_overrides", {**(lookup.config_overrides or {}), **known})
        if number in lookup.norm_scaling_factor:
            monkeypatch.setitem(lookup.norm_scaling_factor, number, 2.5)
            options["factor"] = 2.5
    if "goodfire" in spec:
        options["suffix"] = "_linear"
    if "affine" in spec:
        options["affine"] = True
    acts, reconstruction = make(tmp_path / "repository" / path, **options)
    with serve({repository: tmp_path / "repository"}) as endpoint, using(endpoint, tmp_path / "cache"):
        dictionary = load_sae(spec)
    assert dictionary.site == Site.parse(site)
    assert 0 < float((acts > 0).float().mean()) < 1
    x = X if dictionary.site.stream != "mlp" else torch.cat([torch.zeros_like(X), X], -1)
    latents = dictionary.encode(x[None])
    torch.testing.assert_close(latents.acts[0], acts, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latents.reconstruction[0, :, dictionary.writes], reconstruction, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_cross_layer_transcoder_is_refused_before_it_is_fetched():
    for spec in ("mntss-gemma-2-2b-2.5m-clt-as-per-layer/layer_0", "google/gemma-scope-2-1b-pt/clt/width_1m_l0_big/x"):
        with pytest.raises(UserError, match="is a cross-layer transcoder"):
            load_sae(spec)


@pytest.mark.filterwarnings("ignore")
def test_folders_of_other_trainers_in_a_repository(tmp_path):
    folder = tmp_path / "repository" / "layers.2.mlp"
    stored(
        folder / "sae.safetensors", {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
    )
    told(folder / "cfg.json", {"num_latents": D_SAE, "k": K, "d_in": WIDTH, "activation": "topk", "transcode": True})
    sae_bench(tmp_path / "repository" / "trainer_0")
    with serve({"acme/saes": tmp_path / "repository"}) as endpoint, using(endpoint, tmp_path / "cache"):
        dictionary = load_sae("acme/saes/layers.2.mlp")
        with pytest.raises(UserError, match=r"pickled weights \(ae.pt\), which are not opened here: convert"):
            load_sae("acme/saes/trainer_0")
        with pytest.raises(UserError, match="cannot load dictionary 'absent' of 'acme/saes'"):
            load_sae("acme/saes/absent")
    assert dictionary.site == Site(2, "mlp")
    acts = dictionary.encode(torch.cat([X, X], -1)[None]).acts[0]
    torch.testing.assert_close(acts, top(X @ W_ENC + B_ENC), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="of the variance of what the MLP of block 2"):
        record_latents(tiny_model(), dictionary, ["the cat"])


def test_a_dictionary_that_reads_other_positions_is_refused():
    from sae_lens.saes.temporal_sae import TemporalSAE, TemporalSAEConfig

    sae = TemporalSAE(TemporalSAEConfig(d_in=16, d_sae=32, n_heads=2, n_attn_layers=1, bottleneck_factor=2))
    with pytest.raises(UserError, match="is a temporal SAE, which predicts each position"):
        wrap_sae(sae, "resid_post.1")
