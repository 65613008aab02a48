"""Models whose weights are not plain parameters: quantised ones, adapters, packages that are missing."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny import byte_tokenizer, random_dictionary, tiny_model
from torch import nn

from saepatch.errors import UserError
from saepatch.model.fingerprint import fingerprint, stored_tensors
from saepatch.model.hooks import SpliceError
from saepatch.model.loading.load import load_model, wrap_model
from saepatch.splicing.interventions import Steer
from saepatch.splicing.splice import record_latents, splice


class Quantised(torch.Tensor):
    """As torchao's: two plain tensors that no operation of torch is dispatched to."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors, context, size, stride):
        return cls(tensors["values"], tensors["scale"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"attempting to run unimplemented operator: {function}")


def quantised(values, scale):
    return Quantised(torch.tensor(values, dtype=torch.int8), torch.tensor(scale))


def test_quantised_weights_are_checked_and_hashed_by_what_they_store():
    weight = quantised([1, 2], [0.5])
    assert len(list(stored_tensors(weight))) == 2
    one, other = (fingerprint({"w": quantised([1, 2], [scale])}) for scale in (0.5, 0.25))
    assert one == fingerprint({"w": weight}) != other
    module = nn.Module()
    module.register_parameter("w", nn.Parameter(quantised([1, 2], [float("nan")]), requires_grad=False))
    with pytest.raises(UserError, match="NaN or infinite weights in w"):
        wrap_model(module, byte_tokenizer(), "quantised")


class Adapter(nn.Module):
    """As PEFT's layers: their weights stay when they are switched off."""

    disable_adapters = False
    active_adapters = ("default",)


def test_the_fingerprint_says_whether_an_adapter_acts():
    model = tiny_model()
    plain = model.fingerprint
    model.hf.adapter = Adapter()
    acting = model.fingerprint
    model.hf.adapter.disable_adapters = True
    assert len({plain, acting, model.fingerprint}) == 3
    model.hf.adapter.disable_adapters = False
    assert model.fingerprint == acting


def test_the_model_inside_an_adapter_is_taken_unless_prompts_are_learned():
    inside, wrapper = tiny_model().hf, nn.Module()
    wrapper.peft_config, wrapper.get_base_model = {"default": SimpleNamespace(is_prompt_learning=False)}, lambda: inside
    assert wrap_model(wrapper, byte_tokenizer(), "adapted").hf is inside
    wrapper.peft_config = {"default": SimpleNamespace(is_prompt_learning=True)}
    with pytest.raises(UserError, match="'adapted' has learned prompts"):
        wrap_model(wrapper, byte_tokenizer(), "adapted")


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "compressed-tensors", "torchao"])
def test_a_quantised_checkpoint_without_its_package(tmp_path, method):
    model = tiny_model()
    model.hf.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "quant_type": "int8_weight_only"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as refusal:
        load_model(str(tmp_path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("values", [{"num_hidden_layers": "two"}, {"hidden_size": -3}, {"vocab_size": None}])
def test_a_config_that_was_changed(tmp_path, values):
    model = tiny_model()
    model.hf.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | values))
    with pytest.raises(UserError, match="cannot load model"):
        load_model(str(tmp_path))


@pytest.mark.slow
def test_compiled_code_is_named():
    """It does not see hooks that are put on after it ran."""
    model, dictionary = tiny_model("qwen3"), random_dictionary("resid_post.1", "standard")
    tokens = model.tokenize(["a red hen"])
    with splice(model, dictionary, Steer(3, 4.0)):
        want = model.logits(tokens)
    model.hf.forward = torch.compile(model.hf.forward, backend="eager")
    with torch.no_grad():
        model.hf(**model.inputs(tokens))
    with pytest.raises(SpliceError, match="torch.compiler.set_stance"), splice(model, dictionary, Steer(3, 4.0)):
        model.logits(tokens)
    with torch.compiler.set_stance("force_eager"), splice(model, dictionary, Steer(3, 4.0)):
        torch.testing.assert_close(model.logits(tokens), want)
    with pytest.raises(UserError, match="is compiled.*_orig_mod"):
        wrap_model(torch.compile(tiny_model("qwen3").hf, backend="eager"), model.tokenizer, "compiled")


def test_rows_that_the_model_pads_itself_are_refused():
    """Reformer pads them to whole chunks, inside its blocks."""
    layers = {"attn_layers": ["local"] * 3, "local_attn_chunk_length": 8, "axial_pos_embds": False}
    model = tiny_model("reformer", is_decoder=True, feed_forward_size=32, attention_head_size=4, hash_seed=0, **layers)
    dictionary = random_dictionary("resid_post.1", d_in=model.d_model)
    with pytest.raises(UserError, match=r"holds 16 columns for 11 tokens"), splice(model, dictionary, Steer(3, 4.0)):
        model.logits(model.tokenize(["a long one"]))
    with pytest.raises(UserError, match=r"holds 16 columns for 11 tokens"):
        record_latents(model, dictionary, model.tokenize(["a long one"]))
    with splice(model, dictionary, Steer(3, 4.0)):
        model.logits(model.tokenize(["a fox"]))
