"""Splices in models whose cache holds recurrent states, or does not tell what it holds, against uncached generation."""

import copy

import pytest
import torch
from tiny import random_dictionary, tiny_model

from saepatch.errors import UserError
from saepatch.model.loading.load import wrap_model
from saepatch.splicing.donors import OtherModel, Restore
from saepatch.splicing.interventions import Steer
from saepatch.splicing.splice import splice
from saepatch.steering.fluency import continuation_nll
from saepatch.steering.streaming import Sampling, stream

KINDS = {
    "mamba": {"state_size": 4},
    "mamba2": {"head_dim": 8, "num_heads": 4, "n_groups": 1, "state_size": 4},
    "falcon_mamba": {"state_size": 4},
    "rwkv": {"attention_hidden_size": 16},
}
TEXTS, N = ["the red hen", "a cow sat on"], 7


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return tiny_model(request.param, seed=2, **KINDS[request.param])


def generated(model, texts, cached, given_mask=True):
    tokens = model.tokenize(texts, "left")
    mask = {"attention_mask": tokens.attention_mask} if given_mask else {}
    ids = model.hf.generate(
        input_ids=tokens.input_ids, **mask, max_new_tokens=N, min_new_tokens=N, do_sample=False, use_cache=cached,
        pad_token_id=2,
    )  # fmt: skip
    return ids[:, tokens.width :].tolist()


EDITS = {
    "prompt": lambda: Steer(3, 6.0, positions="prompt"),
    "generated": lambda: Steer(3, 6.0, positions="generated"),
    "last": lambda: Steer(3, 6.0, positions="last"),
    "decay": lambda: Steer(3, 9.0, decay=0.2),
}


@pytest.mark.parametrize("edit", EDITS)
def test_cached_generation_is_uncached_generation(model, edit):
    dictionary = random_dictionary("resid_post.1")
    batches = [TEXTS] if model.padding.left else [[text] for text in TEXTS]
    for texts in [*batches, TEXTS[:1]]:
        ids = []
        for cached in (True, False):
            with splice(model, dictionary, EDITS[edit]()):
                ids.append(generated(model, texts, cached))
        assert ids[0] == ids[1]
    bare = generated(model, TEXTS[:1], True)
    assert (edit == "last") or ids[0] != bare


def test_steering_every_token_is_steering_prompt_and_generated(model):
    dictionary, both = random_dictionary("resid_post.1"), [EDITS[name]() for name in ("prompt", "generated")]
    with splice(model, dictionary, both):
        parts = generated(model, TEXTS[:1], True)
    with splice(model, dictionary, Steer(3, 6.0)):
        assert generated(model, TEXTS[:1], True) == parts


def test_a_donor_steps_beside_it(model):
    hf = copy.deepcopy(model.hf)
    with torch.no_grad():
        for weight in hf.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    hf.get_output_embeddings().weight.data = model.hf.get_output_embeddings().weight.data
    aligned, dictionary = wrap_model(hf, model.tokenizer, "aligned"), random_dictionary("resid_post.2")
    restore = Restore(OtherModel(aligned), None, "every", error=True)
    if not model.takes_cache:
        with pytest.raises(UserError, match="cannot continue from a cache"), splice(model, dictionary, restore):
            generated(model, TEXTS[:1], True)
        return
    restored = []
    for cached in (True, False):
        with splice(model, dictionary, restore):
            restored.append(generated(model, TEXTS, cached))
    norms = [module for module in model.hf.modules() if module is getattr(model.hf.backbone, "norm_f", None)]
    assert restored[0] == restored[1] != generated(model, TEXTS, True)
    assert norms


def test_given_continuations_and_streams(model):
    """Token by token on the cache, or, where there is none to step on, on whole rows."""
    new = [[70, 80, 90], [75]]
    costs = continuation_nll(model, TEXTS, new)
    for text, ids, cost in zip(TEXTS, new, costs, strict=True):
        prompt = model.encode(text)
        log_p = model.logits(model.pad([[*prompt, *ids]]))[0].log_softmax(-1)
        want = -sum(float(log_p[len(prompt) - 1 + i, token]) for i, token in enumerate(ids))
        assert cost == pytest.approx(want, rel=1e-3)
    dictionary, steer = random_dictionary("resid_post.1"), EDITS["prompt"]()
    if not model.takes_cache:
        with pytest.raises(UserError, match="cannot continue from a cache"):
            next(stream(model, TEXTS[0]))
        return
    with splice(model, dictionary, steer):
        *_, written = stream(model, TEXTS[0], Sampling(N))
        ids = generated(model, TEXTS[:1], False)[0]
    assert list(written.ids) == ids[: len(written.ids)]


@pytest.mark.parametrize("family", ["gemma3_text", "gemma2", "llama"])
def test_static_caches(family):
    model, dictionary = tiny_model(family), random_dictionary("resid_post.1")
    tokens = model.tokenize(TEXTS, "left")
    for edit in EDITS.values():
        written = []
        for implementation in ("static", "dynamic"):
            with splice(model, dictionary, edit()):
                ids = model.hf.generate(
                    tokens.input_ids, attention_mask=tokens.attention_mask, max_new_tokens=N, do_sample=False,
                    cache_implementation=implementation, pad_token_id=2, disable_compile=True,
                )  # fmt: skip
            written.append(ids)
        assert torch.equal(*written)
