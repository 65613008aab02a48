"""Rows in padded batches against the same rows alone, in families that read padding in different ways."""

import pytest
import torch
from tiny import random_dictionary, tiny_model

from saepatch.data.pairs import PromptPair
from saepatch.errors import UserError
from saepatch.measure.attribution import attribute
from saepatch.measure.patching import patch_latents
from saepatch.model.inputs.padding import Padding
from saepatch.model.sites import Site
from saepatch.splicing.interventions import Steer
from saepatch.splicing.splice import record_latents, splice
from saepatch.steering.contrasts import attribution_contrast
from saepatch.steering.fluency import continuation_nll

GRIFFIN = {"lru_width": 16, "num_key_value_heads": 1, "w_init_variance_scale": 1.0, "attention_window_size": 64}
BART = {"encoder_layers": 3, "decoder_layers": 3, "d_model": 16, "decoder_attention_heads": 4, "decoder_ffn_dim": 32}
GIT = {"vision_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}}
GIT |= {"num_image_with_embedding": None}
KINDS = {
    "llama": ({}, Padding()),
    "camembert": ({"is_decoder": True}, Padding(first=3)),  # counts from the padding's id + 1
    "recurrent_gemma": (GRIFFIN, Padding(left=False)),
    "bart": (BART | {"is_decoder": True}, Padding(left=False)),
    "git": (GIT, Padding(cached=False)),  # its cached steps see the padding of a row
}
TEXTS, NEW = ["the red hen", "a cow", "my old dog!"], [[70, 80, 90], [75], [60, 61]]


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    changes, padding = KINDS[request.param]
    return tiny_model(request.param, seed=5, **changes), padding


def close(got, want):
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


def test_what_is_found_on_load(kind):
    model, padding = kind
    assert model.padding == padding


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_in_a_batch_is_the_row_alone(kind, side):
    model, _ = kind
    tokens, site = model.tokenize(TEXTS, side), Site(1)
    real, logits, nexts = tokens.attention_mask.bool(), model.logits(tokens), model.next_logits(tokens)
    held, dictionary = model.capture(tokens, [site])[site], random_dictionary("resid_post.1")
    acts = record_latents(model, dictionary, tokens).acts
    for row, text in enumerate(TEXTS):
        alone = model.tokenize([text])
        close(logits[row][real[row]], model.logits(alone)[0])
        close(nexts[row], model.next_logits(alone)[0])
        close(held[row][real[row]], model.capture(alone, [site])[site][0])
        close(acts[row][real[row]], record_latents(model, dictionary, alone).acts[0])


def test_continuations_of_a_batch_are_those_of_each_prompt(kind):
    model, _ = kind
    alone = [model.continue_ids([text], 6)[0] for text in TEXTS]
    assert model.continue_ids(TEXTS, 6) == alone
    first = [int(model.next_logits(model.tokenize([text])).argmax()) for text in TEXTS]
    special = set(model.tokenizer.all_special_ids)
    assert all(token == ids[0] for token, ids in zip(first, alone, strict=True) if token not in special)
    with splice(model, random_dictionary("resid_post.1"), Steer(3, 4.0)):
        steered = [model.continue_ids([text], 6)[0] for text in TEXTS]
        assert model.continue_ids(TEXTS, 6) == steered


def test_given_continuations_cost_what_they_cost_alone(kind):
    model, _ = kind
    if model.hf.config.model_type == "recurrent_gemma":
        pytest.skip("its states cannot take several tokens on a cache")
    alone = [continuation_nll(model, [text], [new])[0] for text, new in zip(TEXTS, NEW, strict=True)]
    assert continuation_nll(model, TEXTS, NEW) == pytest.approx(alone, rel=1e-3)


def test_gradients_of_a_contrast(kind):
    model, _ = kind
    dictionary = random_dictionary("resid_post.1", "standard")
    whole = attribution_contrast(model, dictionary, ["a fox", "an owl"], TEXTS)
    close(attribution_contrast(model, dictionary, ["a fox", "an owl"], TEXTS, batch_size=1), whole)


def test_pairs_that_need_padding_where_it_changes_the_numbers(kind):
    model, padding = kind
    dictionary, pairs = random_dictionary("resid_post.1"), [PromptPair("the red hen", "a cow", "x", "y")]
    run = [
        lambda: patch_latents(model, dictionary, pairs, [3], controls=0, align="right").clean,
        lambda: patch_latents(model, dictionary, pairs, [3], controls=0, align="right").corrupted,
        lambda: attribute(model, dictionary, pairs, align="right").clean,
    ]
    if not padding.left:
        for measure in run:
            with pytest.raises(UserError, match="padding on the left changes this model's results: give it prompts of"):
                measure()
        return
    alone = [model.next_logits(model.tokenize([text]))[0] for text in ("the red hen", "a cow")]
    x, y = (model.encode(text)[-1] for text in "xy")
    want = [float(logits[x] - logits[y]) for logits in (*alone, alone[0])]
    for measure, gap in zip(run, want, strict=True):
        assert float(measure()[0]) == pytest.approx(gap, abs=1e-3)


def test_padding_outside_of_the_embeddings():
    """A tokenizer with a token for padding that the model was never resized for."""
    model = tiny_model("gpt2", seed=5)
    model.tokenizer.add_special_tokens({"pad_token": "<new>"})
    assert model.tokenizer.pad_token_id == 259
    alone = [model.continue_ids([text], 5)[0] for text in TEXTS]
    assert model.continue_ids(TEXTS, 5) == alone
    close(model.next_logits(model.tokenize(TEXTS))[1], model.next_logits(model.tokenize(TEXTS[1:2]))[0])


def test_what_generate_makes_of_padding_is_not_taken_for_granted():
    """Reformer's passes can be padded, but `generate` gives it no positions of the rows' own tokens."""
    layers = {"attn_layers": ["local"] * 3, "local_attn_chunk_length": 32, "axial_pos_embds": False}
    model = tiny_model("reformer", is_decoder=True, feed_forward_size=32, attention_head_size=4, hash_seed=0, **layers)
    assert model.padding == Padding(cached=False)
    alone = [model.continue_ids([text], 4)[0] for text in TEXTS]
    assert model.continue_ids(TEXTS, 4) == alone
    dictionary, tokens = random_dictionary("resid_post.1", d_in=model.d_model), model.tokenize(TEXTS, "left")
    with pytest.raises(UserError, match="changes what this model generates"), splice(model, dictionary, Steer(3, 4.0)):
        model.hf.generate(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, max_new_tokens=2)
    with splice(model, dictionary, Steer(3, 4.0)):
        model.logits(tokens)
