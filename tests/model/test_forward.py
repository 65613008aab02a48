"""The forward builder against whole passes, and sites of models whose layers differ."""

import pytest
import torch
from tiny import COMMON, FAMILIES, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from saepatch.errors import UserError
from saepatch.model import families
from saepatch.model.families import Family
from saepatch.model.forward import cache_among, columns_in
from saepatch.model.loading.load import wrap_model
from saepatch.model.sites import Site

PROMPTS, NEW = ["the cat", "abcdef"], [[70, 80, 90], [75]]
HYBRID = {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "lfm2"])
def test_passes_on_a_cache_are_those_of_whole_rows(family):
    """Padded on the left; in one step and token by token; with all logits and the last alone."""
    model = tiny_model(family, **(HYBRID if family == "lfm2" else {}))
    prompts = model.tokenize(PROMPTS, "left")
    rows = prompts.followed_by(model.pad([row[:-1] for row in NEW]))
    whole, start, site = model.logits(rows), prompts.width, Site(1, "resid_post")
    held = model.capture(rows, [site])[site]
    for steps in ([rows.width], range(start + 1, rows.width + 1)):
        cache, read = model.new_cache(), 0
        for end in (start, *steps):
            part = rows.columns(end)
            found = model.call(part, read, cache=cache)
            real = part.attention_mask[:, read:].bool()
            torch.testing.assert_close(found[real], whole[:, read:end][real], atol=1e-4, rtol=1e-4)
            read = end
            assert columns_in(cache) == end
    cache = model.new_cache()
    model.call(prompts, cache=cache)
    step = model.capture(rows, [site], start, cache, stop=False)[site]
    real = rows.attention_mask[:, start:].bool()
    torch.testing.assert_close(step[real], held[:, start:][real], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.call(rows, last=True), whole[:, -1:], atol=1e-5, rtol=1e-5)
    logits = model.logits_of_continuations(prompts, NEW)
    for row, (prompt, new) in enumerate(zip(PROMPTS, NEW, strict=True)):
        ids = [*model.encode(prompt), *new]
        alone = model.logits(model.pad([ids]))[0, -len(new) - 1 : -1]
        torch.testing.assert_close(logits[row, : len(new)], alone, atol=1e-4, rtol=1e-4)


def test_what_a_pass_is_given():
    model = tiny_model()
    even, padded = model.tokenize(["abc"]), model.tokenize(PROMPTS, "left")
    assert set(model.inputs(even)) == {"input_ids", "use_cache"}
    inputs = model.inputs(padded, start=0, last=True)
    assert set(inputs) == {"input_ids", "use_cache", "attention_mask", "position_ids", "logits_to_keep"}
    assert inputs["position_ids"][0].tolist() == [0, *range(len(model.encode(PROMPTS[0])))][-padded.width :]
    cache = model.new_cache()
    assert cache_among(model.inputs(even, cache=cache)) is cache
    with pytest.raises(UserError, match="the cache holds 0 columns, but the pass starts at column 2"):
        model.call(even, start=2, cache=cache)
    with pytest.raises(UserError, match="the cache holds 0 columns, but the pass starts at column 2"):
        model.call(even, start=2)
    model.call(even, cache=cache)
    with pytest.raises(UserError, match="the cache holds 4 columns, but the pass starts at column 0"):
        model.call(even, cache=cache)


def test_a_model_of_recurrent_states_alone(monkeypatch):
    """It has no heads, and its cache has another name and does not tell how many tokens it holds."""
    monkeypatch.setitem(FAMILIES, "mamba", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4})
    model = tiny_model("mamba")
    assert (model.n_heads, model.layout.streams) == (0, ["resid_pre", "resid_post", "attn_out"])
    assert model.takes_cache
    assert model.step_limit == 1
    tokens, cache = model.tokenize(["abcd"]), model.new_cache()
    model.call(tokens.columns(2), cache=cache)
    assert columns_in(cache) == 2
    with pytest.raises(UserError, match="reads 1 column at a time, not 3"):
        model.call(tokens, 2, cache=cache)
    for end in (3, 4, 5):
        step = model.call(tokens.columns(end), end - 1, cache=cache)
    torch.testing.assert_close(step, model.call(tokens, last=True), atol=1e-5, rtol=1e-5)
    cache = model.hf(tokens.input_ids, use_cache=True).cache_params
    with pytest.raises(UserError, match="only recurrent states"):
        model.call(tokens, 5, cache=cache)


def test_a_hybrid_offers_what_each_layer_has():
    model = tiny_model("lfm2", **HYBRID)
    offered = [[site.stream for site in model.layout.all_sites if site.layer == layer] for layer in range(3)]
    plain = ["resid_pre", "resid_post", "attn_out", "mlp_out"]
    assert offered == [[*plain, "neurons"], [*plain, "z", "neurons"], [*plain, "neurons"]]
    assert model.layout.streams == [*plain, "z"]
    assert model.layout.of_stream("z") == [Site(1, "z")]
    assert (model.width(Site(1, "z")), model.width(Site(0, "neurons"))) == (16, 32)
    assert model.layout.module(Site(0, "attn_out")) is model.layout.blocks[0].conv
    assert model.layout.module(Site(1, "attn_out")) is model.layout.blocks[1].self_attn
    with pytest.raises(UserError, match=r"site z\.0: this layer offers resid_pre.* the model has z at z\.1$"):
        model.layout.module(Site(0, "z"))


def test_families_list_alternatives(monkeypatch):
    """A Llama one block of which calls its MLP, and that its output projection, otherwise, and is narrower."""
    torch.manual_seed(0)
    options = COMMON | {"vocab_size": 259, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **options))
    block = hf.model.layers[1]

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

        def forward(self, x):
            return self.down(self.up(x).relu())

    block.add_module("mlp", Other())
    monkeypatch.setitem(
        families.FAMILIES,
        "llama",
        Family("model.layers", "self_attn", "mlp", "self_attn.o_proj", ("mlp.down_proj", "mlp.down")),
    )
    model = wrap_model(hf, tiny_model("gpt2").tokenizer, "mixed")
    assert [model.width(site) for site in model.layout.of_stream("neurons")] == [32, 24, 32]
    assert model.layout.module(Site(1, "neurons")) is block.mlp.down
    monkeypatch.setitem(families.FAMILIES, "llama", Family("model.layers", "self_attn", "mlp", neurons="mlp.down_proj"))
    model = wrap_model(hf, model.tokenizer, "mixed")
    assert model.layout.of_stream("neurons") == [Site(0, "neurons"), Site(2, "neurons")]
    assert "neurons" not in model.layout.streams
    with pytest.raises(
        UserError, match=r"site neurons\.1: this layer .*the model has neurons at neurons\.0, neurons\.2"
    ):
        model.layout.module(Site(1, "neurons"))


def test_the_unembedding_reads_contiguous_values_when_few_columns_are_asked_for():
    """Of a slice of columns, torch multiplies every row by frozen weights on its own, which takes many times longer."""
    model = tiny_model("llama")
    tokens, head, seen = model.tokenize(["abcd", "bcde"]), model.hf.get_output_embeddings(), []
    assert not head.weight.requires_grad
    handle = head.register_forward_hook(lambda _module, args, _out: seen.append(args[0].is_contiguous()))
    last = model.call(tokens, last=1)
    handle.remove()
    assert seen == [True]
    assert not head._forward_pre_hooks
    torch.testing.assert_close(last, model.call(tokens)[:, -1:], atol=1e-5, rtol=1e-5)
