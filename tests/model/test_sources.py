"""Models that are no plain folder: GGUF files, adapters over another model, unknown quantisations."""

import json
import re
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import random_dictionary, tiny_model

from saepatch.errors import UserError
from saepatch.model.loading.load import load_model
from saepatch.model.loading.sources import source_of
from saepatch.splicing.interventions import Steer
from saepatch.splicing.splice import splice

TEXTS = ["the cat sat", "a dog ran off"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def folder(model, tmp_path):
    model.hf.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def stated(folder, **fields):
    """Fields written into the config of a model's folder."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def test_a_missing_gguf_file_fails_at_once(tmp_path):
    began = time.monotonic()
    for name in ("model.gguf", "owner/model.gguf", str(tmp_path / "gone.gguf")):
        with pytest.raises(UserError, match=re.escape(f"there is no file {name!r}")):
            load_model(name)
    assert time.monotonic() - began < 5  # no hub is asked


@pytest.mark.parametrize("method", ["nosuch", None])
def test_a_quantisation_that_would_be_passed_over_is_refused(folder, method):
    stated(folder, quantization_config={"quant_method": method, "bits": 4} if method else {"bits": 4})
    with pytest.raises(UserError, match=f"is quantised by {json.dumps(method)}, which the installed"):
        load_model(str(folder))


def adapter(folder, model, scale=0.1):
    """A LoRA adapter in PEFT's format over two maps of the model, and what it adds to their weights."""
    folder.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 6, "bias": "none"}
    config |= {"target_modules": ["q_proj", "down_proj"], "base_model_name_or_path": "../model"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(3)
    tensors, added = {}, {}
    for name, module in model.hf.named_modules():
        if name.endswith(("q_proj", "down_proj")):
            down = scale * torch.randn(2, module.in_features, generator=generator)
            up = scale * torch.randn(module.out_features, 2, generator=generator)
            tensors[f"base_model.model.{name}.lora_A.weight"] = down
            tensors[f"base_model.model.{name}.lora_B.weight"] = up
            added[f"{name}.weight"] = 6 / 2 * up @ down
    save_file(tensors, folder / "adapter_model.safetensors")
    return added


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_is_the_model_with_its_products_added(folder, model, merge):
    pytest.importorskip("peft", reason="needs saepatch[peft]")
    lora = folder.parent / "lora"
    added = adapter(lora, model)
    expected = tiny_model()
    with torch.no_grad():
        for name, parameter in expected.hf.named_parameters():
            parameter += added.get(name, 0)
    adapted = load_model(str(lora), merge_adapter=merge)
    tokens = model.tokenize(TEXTS)
    torch.testing.assert_close(adapted.logits(tokens), expected.logits(tokens), rtol=1e-4, atol=1e-4)
    assert float((adapted.logits(tokens) - model.logits(tokens)).abs().max()) > 0.01
    assert adapted.fingerprint != model.fingerprint
    with (
        splice(adapted, random_dictionary(), Steer(3, 4.0)),
        splice(expected, random_dictionary(), Steer(3, 4.0)),
    ):
        torch.testing.assert_close(adapted.logits(tokens), expected.logits(tokens), rtol=1e-4, atol=1e-4)


def test_adapters_that_cannot_be_read(folder, model):
    lora = folder.parent / "lora"
    adapter(lora, model)
    config = json.loads((lora / "adapter_config.json").read_text())
    assert source_of(str(lora)).path == str(lora / "../model")
    for base, message in ((None, "does not name the model below"), ("/no/such", "which is no folder here")):
        (lora / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        with pytest.raises(UserError, match=message):
            source_of(str(lora))
    (lora / "adapter_config.json").write_text(json.dumps(config))
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    with pytest.raises(UserError, match="no adapter_model.safetensors"):
        load_model(str(lora))


GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm",
    "model.layers": "blk",
}  # fmt: skip


def write_gguf(path, model):
    """A Llama as a GGUF file with 8-bit matrices, in llama.cpp's layout: query and key rows are interleaved."""
    gguf = pytest.importorskip("gguf", reason="needs saepatch[gguf]")
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *tokens, "▁", *(f"t{i}" for i in range(config.vocab_size - 260))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, value in model.hf.state_dict().items():
        array = value.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        for ours, theirs in GGUF_NAMES.items():
            name = name.replace(ours, theirs)
        kind = gguf.GGMLQuantizationType.Q8_0 if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        quantised = gguf.quants.quantize(np.ascontiguousarray(array), kind)
        writer.add_tensor(name, quantised, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_expanded_and_its_quantisation_is_in_its_name(tmp_path):
    pytest.importorskip("gguf", reason="needs saepatch[gguf]")
    changes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 300}
    made = tiny_model(**changes)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, made)
    model = load_model(str(path))
    assert model.name == f"{path} (GGUF, Q8_0, expanded)"
    assert {value.dtype for value in model.hf.parameters()} == {torch.float32}
    ours, theirs = made.hf.state_dict(), model.hf.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert float((value - theirs[name]).abs().max()) <= float(value.abs().max()) / 127 + 1e-6, name
    tokens = model.pad([[1, 40, 50, 60, 70]])
    expected = made.logits(tokens)
    assert float((model.logits(tokens) - expected).norm() / expected.norm()) < 0.05
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot read"):
        load_model(str(path))
