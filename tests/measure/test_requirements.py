"""Plans of large models against closed forms, and of a small one against what its passes hold."""

import json

import pytest
import torch
from tiny import random_dictionary, tiny_model

from saepatch.cli.main import main
from saepatch.data.pairs import PromptPair
from saepatch.engine.passes.kept_run import KeptRun
from saepatch.errors import UserError
from saepatch.measure.attribution import attribute
from saepatch.measure.requirements import requirements
from saepatch.model.sites import Site
from saepatch.settings.inspect import PlanConfig

# From the published configs: layers, width, inner width, heads, key-value heads, head width, vocabulary.
LLAMA = ("llama", 80, 8192, 28672, 64, 8, 128, 128256)
GEMMA = ("gemma3_text", 62, 5376, 21504, 32, 16, 128, 262208)
QWEN = ("qwen3", 64, 5120, 25600, 64, 8, 128, 151936)


def config_file(folder, kind, layers, width, inner, heads, kv, head, vocabulary):
    values = {
        "model_type": kind, "num_hidden_layers": layers, "hidden_size": width, "intermediate_size": inner,
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": head, "vocab_size": vocabulary,
        "tie_word_embeddings": kind == "gemma3_text",
    }  # fmt: skip
    path = folder / "config.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return str(path)


def matrices(kind, layers, width, inner, heads, kv, head, vocabulary):
    """Parameters of the blocks' matrices and of the embeddings."""
    block = width * head * (2 * heads + 2 * kv) + 3 * width * inner
    return layers * block, vocabulary * width * (1 if kind == "gemma3_text" else 2)


@pytest.mark.parametrize(("shape", "published"), [(LLAMA, 70_553_706_496), (QWEN, 32_762_123_264), (GEMMA, None)])
def test_large_models_are_counted_without_weights(tmp_path, shape, published):
    found = requirements(PlanConfig(model=config_file(tmp_path, *shape), tokens=512, devices=2))
    blocks, embeddings = matrices(*shape)
    assert found.parameters == pytest.approx(blocks + embeddings, rel=1e-4)  # norms are the rest
    assert published is None or found.parameters == published
    assert sum(needs.weights for needs in found.devices) == pytest.approx(
        2 * (found.parameters + (embeddings if shape is GEMMA else 0)), rel=1e-6
    )  # Gemma's tied embeddings lie on both devices
    _, layers, width, _, heads, kv, head, _ = shape
    assert sum(needs.caches for needs in found.devices) == 2 * layers * 512 * kv * head * 2
    assert [needs.blocks for needs in found.devices] == [(0, layers // 2), (layers // 2, layers)]
    assert found.shapes["residual stream"] == (1, 512, width)
    expected = 2 * 512 * blocks + 2 * layers * 512 * 512 * heads * head
    assert found.operations == pytest.approx(expected, rel=1e-4)


def test_what_does_not_fit_is_named(tmp_path, capsys):
    path = config_file(tmp_path, *LLAMA)
    given = ["plan", path, "--site", "resid_post.40", "--d_sae", "65536", "--device_tflops", "200"]
    assert main([*given, "--devices", "2", "--device_gb", "80"]) == 0
    said = capsys.readouterr().out
    assert "70.55 billion parameters" in said
    assert "It fits into 2 × 80 GB." in said
    assert main([*given, "--work", "attribute", "--device_gb", "80", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["too_small"] == [0]
    assert found["devices"][0]["dictionaries"] == 4 * (2 * 8192 * 65536 + 65536 + 8192)
    assert found["devices"][0]["activations"] == 40 * 128 * (8 * 8192 + 4 * 8192 + 3 * 28672) * 2
    assert found["seconds"] == pytest.approx(3 * found["operations"] / 2e14)


def test_long_prompts_hold_one_piece_and_the_caches_twice(tmp_path):
    path = config_file(tmp_path, *QWEN)
    short, long = (requirements(PlanConfig(path, work="attribute", tokens=n)).devices[0] for n in (4096, 32768))
    assert long.caches == 2 * 8 * short.caches
    assert long.activations == short.activations // 4 + 5 * 1024 * 32768


def test_a_small_models_plan_is_what_its_passes_hold(tmp_path):
    """Weights and caches to the byte; what a backward pass keeps, within a factor of 2."""
    model = tiny_model("llama", hidden_size=64, intermediate_size=192, head_dim=16)
    model.hf.save_pretrained(tmp_path)
    prompt = "a prompt of some length, in which"
    plan = PlanConfig(
        model=str(tmp_path),
        work="attribute",
        tokens=len(prompt) + 4,
        dtype="float32",
        site="resid_pre.0",
        d_sae=48,
    )
    (needs,) = requirements(plan).devices
    assert needs.weights == sum(p.numel() * p.element_size() for p in model.hf.parameters())
    tokens = model.tokenize([prompt + "the"])
    run = KeptRun(model, tokens, [Site(0, "resid_pre")])
    assert tokens.width == plan.tokens
    assert needs.caches == sum(x.numel() * 4 for layer in run.cache_layers for x in (layer.keys, layer.values))
    sae = random_dictionary("resid_pre.0", d_in=64)
    weights = {p.untyped_storage().data_ptr() for p in model.hf.parameters()}
    held: dict[int, int] = {}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        attribute(model, sae, [PromptPair(prompt + "the", prompt + "she", "x", "y", "a")])
    assert 0.5 < sum(held.values()) / needs.activations < 2


def test_bad_plans_are_refused(tmp_path):
    path = config_file(tmp_path, *QWEN)
    for changes, message in [
        ({"work": "train"}, "work 'train'"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"devices": 65}, "64 blocks"),
        ({"site": "resid_post.64"}, "0 to 63"),
        ({"model": "nowhere"}, "no file or folder .nowhere."),
    ]:
        with pytest.raises(UserError, match=message):
            requirements(PlanConfig(**{"model": path} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"hidden_size": -4}, "negative dimension"),
        ({"num_attention_heads": 0}, "check its model_type and its sizes"),
        ({"num_key_value_heads": 0}, "check its model_type and its sizes"),
        ({"vocab_size": -1}, "check its model_type and its sizes"),
        ({"rope_parameters": "x"}, "rope_parameters"),
        (
            {"model_type": "mamba", "num_attention_heads": None},
            "MambaConfig has num_attention_heads = None: plans are made for models of attention",
        ),
        ({"model_type": "reformer"}, "is_decoder=True"),
    ],
)
def test_hostile_configs_are_refused_in_a_line(tmp_path, capsys, changes, message):
    path = config_file(tmp_path, *QWEN)
    (tmp_path / "config.json").write_text(json.dumps({**json.loads((tmp_path / "config.json").read_text()), **changes}))
    assert main(["plan", path]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert message in said[0]


def test_a_config_that_is_nested_too_deeply(tmp_path):
    (tmp_path / "config.json").write_text("[" * 50_000)
    with pytest.raises(UserError, match="gives no causal language model"):
        requirements(PlanConfig(model=str(tmp_path)))


def test_sizes_by_layer_are_counted_by_the_largest(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3n_text"}))
    assert requirements(PlanConfig(model=str(tmp_path))).parameters > 1e9
