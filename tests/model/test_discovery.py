"""Streams of families that no table lists: found by what a block writes, and found where the tables have them."""

import pytest
import torch
from tiny import COMMON, FAMILIES, byte_tokenizer, random_dictionary, tiny_model

from saepatch.data.pairs import PromptPair
from saepatch.errors import UserError
from saepatch.measure.patching import patch_latents
from saepatch.model import families
from saepatch.model.hooks import edit_sites
from saepatch.model.loading.load import load_model
from saepatch.model.sites import Site

LFM2 = {"layer_types": ["conv", "full_attention", "conv"]}
TEXT = ["the red hen"]


def without_head_dim(family, **options):
    """Falcon derives it, and lets nobody set it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.delitem(COMMON, "head_dim")
        return tiny_model(family, **options)


def held(model, site):
    return model.capture(model.tokenize(TEXT), [site])[site]


# OPT's MLP works on rows of tokens: no module of it emits what enters the stream, and only the table knows.
@pytest.mark.parametrize("family", [*sorted(FAMILIES.keys() - {"opt"}), "lfm2"])
def test_discovery_finds_what_the_table_lists(family, monkeypatch):
    options = LFM2 if family == "lfm2" else {}
    listed = tiny_model(family, **options)
    monkeypatch.delitem(families.FAMILIES, family)
    found = tiny_model(family, **options)
    assert set(found.layout.all_sites) == set(listed.layout.all_sites)
    tokens = listed.tokenize(TEXT)
    ours, theirs = (model.capture(tokens, listed.layout.all_sites, stop=False) for model in (found, listed))
    for site in listed.layout.all_sites:
        torch.testing.assert_close(ours[site], theirs[site], rtol=0, atol=0)


DENSE = {"attn_out", "mlp_out", "z", "neurons"}
# By layer, what is offered beside the residual stream.
HYBRIDS = {
    "falcon": ({"num_hidden_layers": 2, "new_decoder_architecture": True}, [DENSE] * 2),
    "cohere": ({"num_hidden_layers": 2}, [DENSE] * 2),
    "olmoe": ({"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2}, [{"attn_out", "mlp_out", "z"}] * 2),
    "nemotron_h": (
        {"num_hidden_layers": 3, "layers_block_type": ["mamba", "attention", "mlp"], "mamba_num_heads": 4,
         "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 4},
        [{"attn_out"}, {"attn_out", "z"}, {"mlp_out", "neurons"}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", HYBRIDS)
def test_streams_by_layer(family):
    options, expected = HYBRIDS[family]
    model = without_head_dim(family, **options)
    assert [set(offered) - {"resid_pre", "resid_post"} for offered in model.layout.paths] == expected
    for layer, offered in enumerate(expected):
        parts = [held(model, Site(layer, stream)) for stream in ("attn_out", "mlp_out") if stream in offered]
        wrote = held(model, Site(layer)) - held(model, Site(layer, "resid_pre"))
        torch.testing.assert_close(sum(parts), wrote, atol=1e-4, rtol=1e-4)


def test_what_a_block_adds_to_in_place_is_held_as_it_was():
    """Falcon adds attention's output to the MLP's tensor in place."""
    model = without_head_dim("falcon", num_hidden_layers=2, parallel_attn=True, new_decoder_architecture=False)
    site = Site(0, "mlp_out")
    assert site in model.layout.overwritten
    tokens, kept = model.tokenize(TEXT), []
    with edit_sites(model.layout, {site: lambda x: kept.append(x) or x}):
        model.logits(tokens)
    wrote = held(model, Site(0)) - held(model, Site(0, "resid_pre"))
    torch.testing.assert_close(kept[0] + held(model, Site(0, "attn_out")), wrote, atol=1e-5, rtol=1e-5)


def test_multipliers_are_named(caplog):
    caplog.set_level("INFO", logger="saepatch")
    model = tiny_model("granite", residual_multiplier=0.3, attention_multiplier=1.0)
    assert set(model.layout.streams) == {"resid_pre", "resid_post"}
    assert "not offered in 3 blocks: what they write is multiplied by 0.3" in caplog.text


def test_blocks_that_share_keys_run_in_full_where_the_last_logits_are_asked_for():
    """Gemma 4's last blocks see the last position alone under `logits_to_keep=1`."""
    model = tiny_model(
        "gemma4_text", num_hidden_layers=4, num_kv_shared_layers=2, hidden_size_per_layer_input=4, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2, vocab_size_per_layer_input=259,
    )  # fmt: skip
    assert not model.last_alone
    pair = PromptPair("the red hen", "the old hen", "x", "y")
    effects = patch_latents(model, random_dictionary("resid_post.2", "standard"), [pair], [3, 9], controls=0)
    assert effects.patched.shape == (1, 2)


def test_models_of_several_residual_streams_are_refused_in_a_line():
    with pytest.raises(UserError, match="the model keeps 2 residual streams side by side") as refusal:
        tiny_model(
            "gemma3n_text", altup_num_inputs=2, num_kv_shared_layers=0, hidden_size_per_layer_input=4, laurel_rank=4,
            vocab_size_per_layer_input=259, activation_sparsity_pattern=[0.0] * 3, intermediate_size=[32] * 3,
            layer_types=["full_attention"] * 3, **{k: v for k, v in COMMON.items() if k != "intermediate_size"},
        )  # fmt: skip
    assert "\n" not in str(refusal.value)


def test_an_unembedding_that_is_called_the_decoder():
    model = tiny_model("modernbert-decoder", local_attention=8)
    assert len(model.layout.blocks) == 3


def test_a_type_that_no_auto_class_knows(tmp_path):
    """The text part of a model of images: its config names the class."""
    from transformers import Emu3ForCausalLM, Emu3TextConfig

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 259, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    Emu3ForCausalLM(Emu3TextConfig(num_hidden_layers=2, **sizes)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).n_layers == 2
