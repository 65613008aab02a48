"""Direct logit attribution: rows that sum to the logit in every family, and formulas written out by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import random_dictionary, tiny_model

import saepatch as sp
from saepatch.data.pairs import PromptPair

GRANITE = {"residual_multiplier": 0.3, "logits_scaling": 4.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.2}
FAMILIES = {
    "gpt2": {},
    "llama": {},
    "gemma2": {"final_logit_softcapping": 3.0},
    "gemma3_text": {},
    "olmo2": {},
    "qwen3": {},
    "cohere": {"logit_scale": 0.25},  # attention and MLP in parallel
    "gpt_neox": {},  # likewise
    "phi": {},  # a bias in the unembedding
    "granite": GRANITE,
}
PROMPTS = ["one two", "a bee"]
TARGETS, COUNTERS = [[70, 80], [90, 100]], [[75, 85], [95, 105]]


def closes(result):
    rows = np.abs(result.effect).max(1)
    np.testing.assert_array_less(np.abs(result.total - result.logit), 1e-4 * np.maximum(rows, np.abs(result.logit)))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_sum_to_the_logit_in_every_family(family):
    model = tiny_model(family, **FAMILIES[family])
    with torch.no_grad():  # gains and biases of norms that matter
        for name, weight in model.hf.named_parameters():
            if "norm" in name or ".ln_" in name:
                weight.add_(0.5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    dictionaries = [random_dictionary("resid_post.0", "jumprelu")]
    if family != "granite":  # its layout offers no attn_out, which is multiplied before it is added
        dictionaries += [random_dictionary("attn_out.1"), random_dictionary("mlp_out.2", "gated")]
    for counters in (None, COUNTERS):
        result = sp.direct_attribution(model, dictionaries, PROMPTS, TARGETS, counters)
        closes(result)
        logits = model.next_logits(model.tokenize(PROMPTS)).double()
        expected = logits.gather(1, torch.tensor(TARGETS))
        if counters:
            expected = expected - logits.gather(1, torch.tensor(counters))
        np.testing.assert_allclose(result.emitted, expected, rtol=1e-4, atol=1e-5)
        if family != "gemma2":
            np.testing.assert_allclose(result.logit, result.emitted, rtol=1e-4, atol=1e-4)
        assert len(result.activation) > 0
    streams = sp.direct_attribution(model, [], PROMPTS, TARGETS, positions="every")
    closes(streams)
    kinds = [part.kind for part in streams.parts]
    assert kinds.count("attn_out") == kinds.count("mlp_out") == 3
    assert kinds.count("embeddings") == 1
    assert len(streams.prompt) == sum(len(model.encode(prompt)) for prompt in PROMPTS)


def outputs(hf, modules, ids):
    """What modules give on one row, by plain hooks."""
    kept = {}
    handles = [
        module.register_forward_hook(
            lambda _m, _a, out, name=name: kept.update({name: (out[0] if isinstance(out, tuple) else out)[0].clone()})
        )
        for name, module in modules.items()
    ]
    with torch.no_grad():
        logits = hf(torch.tensor([ids])).logits[0]
    for handle in handles:
        handle.remove()
    return kept, logits


def by_name(result, number=0, target=0):
    return {str(part): effect for part, effect in zip(result.parts, result.effect[number, :, target], strict=True)}


def test_gpt2_rows_are_those_of_the_formula():
    model = tiny_model("gpt2")
    hf, ids = model.hf, model.encode("abc")
    with torch.no_grad():
        hf.transformer.ln_f.weight.normal_(1, 0.3)
        hf.transformer.ln_f.bias.normal_(0, 0.3)
    blocks = hf.transformer.h
    modules = {"embeddings": hf.transformer.drop, "x": blocks[-1]}
    for layer, block in enumerate(blocks):
        modules |= {f"attn_out.{layer}": block.attn, f"mlp_out.{layer}": block.mlp}
    kept, logits = outputs(hf, modules, ids)
    norm, row = hf.transformer.ln_f, hf.lm_head.weight[70].detach()
    x = kept["x"][-1]
    sigma = ((x - x.mean()).square().mean() + norm.eps).sqrt()
    result = sp.direct_attribution(model, [], ["abc"], [[70]])
    rows = by_name(result)
    for name, value in kept.items():
        if name != "x":
            part = value[-1]
            hand = row @ (norm.weight.detach() * (part - part.mean())) / sigma
            assert rows[name] == pytest.approx(float(hand), rel=1e-3, abs=1e-5)
    assert rows["final norm bias"] == pytest.approx(float(row @ norm.bias.detach()), rel=1e-4)
    assert result.logit[0, 0] == pytest.approx(float(logits[-1, 70]), rel=1e-4)


def test_gemma_rows_are_those_of_the_formula_before_the_cap():
    model = tiny_model("gemma2", final_logit_softcapping=3.0)
    hf, ids = model.hf, model.encode("abc")
    with torch.no_grad():
        hf.model.norm.weight.normal_(0, 0.3)
    modules = {"x": hf.model.layers[-1]}
    for layer, block in enumerate(hf.model.layers):
        modules |= {f"attn_out.{layer}": block.post_attention_layernorm}
        modules |= {f"mlp_out.{layer}": block.post_feedforward_layernorm}
    kept, logits = outputs(hf, modules, ids)
    x, row = kept["x"][-1], hf.lm_head.weight[70].detach()
    gain = 1 + hf.model.norm.weight.detach()
    sigma = (x.square().mean() + hf.model.norm.eps).sqrt()
    result = sp.direct_attribution(model, [], ["abc"], [[70]])
    rows = by_name(result)
    for name, value in kept.items():
        if name != "x":
            assert rows[name] == pytest.approx(float(row @ (gain * value[-1]) / sigma), rel=1e-3, abs=1e-5)
    uncapped = float(row @ (gain * x) / sigma)
    assert result.logit[0, 0] == pytest.approx(uncapped, rel=1e-4)
    assert result.emitted[0, 0] == pytest.approx(float(logits[-1, 70]), rel=1e-4)
    assert result.slope[0, 0] == pytest.approx(float(1 - np.tanh(uncapped / 3) ** 2), rel=1e-4)
    assert "before the soft cap of 3" in result.summary()


def test_a_latent_adds_its_activation_times_its_decoder_row():
    """Of a dictionary that rescales and normalises: in the units of the stream."""
    model = tiny_model("llama")
    hf, ids = model.hf, model.encode("abc")
    for changes in ({}, {"rescale_acts_by_decoder_norm": True}, {"normalize_activations": "layer_norm"}):
        dictionary = random_dictionary("resid_post.1", **changes)
        kept, _ = outputs(hf, {"site": hf.model.layers[1], "x": hf.model.layers[2]}, ids)
        acts = dictionary.sae.encode(kept["site"][None])
        base = dictionary.sae.decode(acts)[0, -1]
        result = sp.direct_attribution(model, dictionary, ["abc"], [[70]])
        norm, x = hf.model.norm, kept["x"][-1]
        toward = hf.lm_head.weight[70].detach() * norm.weight.detach() / (x.square().mean() + 1e-6).sqrt()
        assert result.latents[2].tolist() == acts[0, -1].nonzero().flatten().tolist()
        latent = int(result.latents[2, 0])
        without = acts.clone()
        dictionary.sae.encode(kept["site"][None])  # decoding uses up the normalisation's state
        without[0, -1, latent] = 0
        hand = float(toward @ (base - dictionary.sae.decode(without)[0, -1]).detach())
        assert result.latent_effect[0, 0] == pytest.approx(hand, rel=1e-3, abs=1e-5)
        error = float(toward @ (kept["site"][-1] - base).detach())
        assert by_name(result)["resid_post.1 error"] == pytest.approx(error, rel=1e-3, abs=1e-5)
        closes(result)


def test_pairs_give_answers_less_counter_answers_and_rows_are_flat():
    model = tiny_model("qwen3")
    pairs = [PromptPair("ab", "cd", "x", "y"), PromptPair("abc", "cde", "y", "z")]
    result = sp.direct_attribution(model, random_dictionary("resid_post.1"), pairs)
    logits = model.next_logits(model.tokenize([pair.clean for pair in pairs]))
    answers = [[model.encode(token)[-1] for token in (pair.answer, pair.counter)] for pair in pairs]
    expected = [float(row[a] - row[b]) for row, (a, b) in zip(logits, answers, strict=True)]
    np.testing.assert_allclose(result.logit[:, 0], expected, rtol=1e-3, atol=1e-4)
    rows = list(result.rows("task"))
    for number in range(2):
        total = sum(row["effect"] for row in rows if row["prompt"] == number)
        assert total == pytest.approx(expected[number], rel=1e-3, abs=1e-4)
    assert "rows sum to the logit difference" in result.summary()


def test_models_and_dictionaries_whose_rows_would_not_sum_are_refused():
    with pytest.raises(sp.UserError, match=r"block 0 emit does not add up"):
        sp.direct_attribution(tiny_model("opt", do_layer_norm_before=False), [], PROMPTS, TARGETS)
    with pytest.raises(sp.UserError, match="not one matrix of width 16"):
        sp.direct_attribution(tiny_model("opt", word_embed_proj_dim=8), [], PROMPTS, TARGETS)
    model = tiny_model("llama")
    for sites, phrase in (
        (["resid_post.0", "resid_post.1"], "both describe the residual stream"),
        (["resid_post.1", "attn_out.1"], "is a part of resid_post.1"),
        (["mlp_out.1", "mlp_out.1"], "two dictionaries at mlp_out.1"),
    ):
        with pytest.raises(sp.UserError, match=phrase):
            sp.direct_attribution(model, [random_dictionary(site) for site in sites], PROMPTS, TARGETS)
    for targets, phrase in (
        (None, "there are no targets"),
        ([[1]], r"give token ids \[2 prompts"),
        ([[1], [300]], "outside the vocabulary"),
        ([[1], [2, 3]], "not as many token ids"),
    ):
        with pytest.raises(sp.UserError, match=phrase):
            sp.direct_attribution(model, [], PROMPTS, targets)


def test_a_token_that_a_dictionary_was_not_trained_on_is_its_error_term():
    model, partly = tiny_model("llama"), random_dictionary("resid_post.1")
    partly.sae.cfg.metadata.exclude_special_tokens = model.encode("b")[1:]
    ours = sp.direct_attribution(model, partly, ["abc"], [model.encode("x")[1:]], positions="all")
    whole = sp.direct_attribution(
        model, replace(partly, every_position=True), ["abc"], [model.encode("x")[1:]], positions="all"
    )
    assert set(ours.position[ours.latents[0]]) == {1, 3}
    assert set(whole.position[whole.latents[0]]) == {1, 2, 3}
    np.testing.assert_allclose(ours.total, ours.logit, atol=1e-4)
    at, known = ours.position.tolist().index(2), ours.position.tolist().index(3)
    names = [str(part) for part in ours.parts]
    assert ours.effect[at, names.index("resid_post.1 b_dec"), 0] == 0
    np.testing.assert_allclose(ours.effect[known], whole.effect[known], atol=1e-6)
