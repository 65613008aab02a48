"""Models of other libraries, and what their users try on ours."""

from copy import deepcopy

import pytest
import torch
from tiny import byte_tokenizer, random_dictionary, random_sae, tiny_model

from saepatch.dictionaries.loading import wrap_sae
from saepatch.errors import UserError
from saepatch.model.loading.load import wrap_model
from saepatch.splicing.interventions import Steer
from saepatch.splicing.splice import splice


def spliced(model, tokens, sae):
    with splice(model, sae, Steer(3, 5.0)):
        return model.logits(tokens)


def test_names_of_other_libraries_lead_to_ours():
    model = tiny_model()
    for name in ("run_with_cache", "run_with_hooks", "to_tokens", "trace", "add_sae", "cfg"):
        with pytest.raises(AttributeError, match=rf"no `model.{name}`: .*\(docs/coming-from.md\)"):
            getattr(model, name)
    with pytest.raises(AttributeError, match="'LanguageModel' object has no attribute 'nothing'"):
        _ = model.nothing
    assert not hasattr(model, "run_with_cache")
    assert deepcopy(model).n_layers == 3


def test_a_model_says_its_name_and_needs_a_tokenizer():
    hf = tiny_model().hf
    assert wrap_model(hf, byte_tokenizer()).name == "LlamaForCausalLM"
    hf.config._name_or_path = "owner/model"
    assert wrap_model(hf, byte_tokenizer()).name == "owner/model"
    with pytest.raises(UserError, match="no tokenizer: give it"):
        wrap_model(hf)


def test_a_sae_of_sae_lens_is_spliced_as_it_is():
    model, sae = tiny_model(), random_sae()
    tokens = model.tokenize(["the cat sat"])
    with pytest.raises(UserError, match="names no site: give it"):
        wrap_sae(sae)
    assert wrap_sae(sae, "resid_post.1").name == "TopKSAE"
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    expected = spliced(model, tokens, random_dictionary())
    assert torch.equal(spliced(model, tokens, sae), expected)
    assert torch.equal(spliced(model, tokens, [sae]), expected)
    with pytest.raises(UserError, match="a Linear is not a dictionary"):
        wrap_sae(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="wrapped already"):
        wrap_sae(random_dictionary())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # it says that its class has a new name
def test_the_model_inside_an_nnsight_model_is_taken():
    nnsight = pytest.importorskip("nnsight")
    model, tokens = tiny_model("gpt2"), tiny_model("gpt2").tokenize(["the cat sat"])
    other = wrap_model(nnsight.LanguageModel(deepcopy(model.hf), tokenizer=model.tokenizer))
    assert type(other.hf).__name__ == "GPT2LMHeadModel"
    dictionary = random_dictionary()
    assert torch.equal(spliced(other, tokens, dictionary), spliced(model, tokens, dictionary))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of TransformerLens
def test_the_model_inside_a_bridge_is_taken_unless_its_weights_were_processed(tmp_path):
    bridges = pytest.importorskip("transformer_lens.model_bridge")
    from transformers import AutoTokenizer

    model, dictionary = tiny_model("gpt2"), random_dictionary()
    tokens, hf = model.tokenize(["the cat sat"]), deepcopy(model.hf)
    hf.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    hf.config.architectures = ["GPT2LMHeadModel"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    bridge = bridges.TransformerBridge.boot_transformers(str(tmp_path), hf_model=hf, tokenizer=tokenizer, device="cpu")
    other = wrap_model(bridge)
    assert other.hf is hf
    torch.testing.assert_close(
        spliced(other, tokens, dictionary), spliced(model, tokens, dictionary), rtol=1e-4, atol=1e-4
    )
    bridge.enable_compatibility_mode()
    with pytest.raises(UserError, match="compatibility mode"):
        wrap_model(bridge)
