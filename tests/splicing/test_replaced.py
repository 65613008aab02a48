"""What is replaced in a model acts on the thread that asked for it; other threads run the model as it is."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from tiny import random_dictionary, tiny_model

from saepatch.circuits.edges.backward import frozen_norms, gim, relp
from saepatch.data.pairs import PromptPair
from saepatch.errors import UserError
from saepatch.measure.attention import attention_patterns
from saepatch.measure.patching import patch_latents
from saepatch.model.hooks import droppable_blocks, watching
from saepatch.model.replaced import forwards_replaced, only_logits_of, skip_blocks

OPENED = {
    "blocks": lambda model: skip_blocks(model.layout, 2),
    "logits": lambda model: only_logits_of(model.hf, torch.tensor([5, 7])),
    "norms": lambda model: frozen_norms(model, Counter(norm=0)),
    "dropped": lambda model: droppable_blocks(model.layout, [1]),
}


@pytest.fixture
def other():
    with ThreadPoolExecutor(1) as pool:
        yield lambda call: pool.submit(call).result(60)


@pytest.mark.parametrize("what", OPENED)
def test_other_threads_run_the_model_as_it_is(what, other):
    model = tiny_model("gpt2")
    tokens = model.tokenize(["my red cow"])

    def gradient():
        with torch.enable_grad():
            x = model.hf.get_input_embeddings()(tokens.input_ids).detach().requires_grad_()
            logits = model.hf(inputs_embeds=x).logits
            return logits.detach(), torch.autograd.grad(logits[0, -1, 3], x)[0]

    want = gradient()
    with OPENED[what](model) as opened:
        if what == "dropped":
            opened.layer = 1
        got = other(gradient)
    assert all(torch.equal(*pair) for pair in zip(want, got, strict=True))


def test_calls_are_reported_of_the_own_thread_alone(other):
    model, seen = tiny_model(), []
    tokens, block = model.tokenize(["a hen"]), model.layout.blocks[1]
    with watching([block], lambda *_: seen.append("in"), [block], lambda *_: seen.append("out")):
        other(lambda: model.logits(tokens))
        assert seen == []
        model.logits(tokens)
    assert seen == ["in", "out"]


def test_threads_that_replace_one_forward_leave_in_any_order(other):
    model = tiny_model()
    tokens, block = model.tokenize(["a hen"]), model.layout.blocks[2]
    plain = model.logits(tokens)
    kept = []

    def enter():
        before = block.forward
        context = forwards_replaced({block: lambda x, *args, **kwargs: 2 * before(x, *args, **kwargs)})
        context.__enter__()
        kept.append(context)
        return model.logits(tokens)

    def leave(number):
        kept[number].__exit__(None, None, None)
        return model.logits(tokens)

    first = other(enter)
    second = enter()
    assert not torch.equal(first, plain)
    assert torch.equal(first, second)  # one doubling, not two
    assert torch.equal(other(lambda: leave(0)), plain)
    assert torch.equal(model.logits(tokens), second)
    assert torch.equal(leave(1), plain)
    assert "forward" not in block.__dict__


def test_a_sweep_beside_other_passes():
    """Sweeps skip blocks and unembed few tokens; passes of another thread must not."""
    model, dictionary = tiny_model("llama", seed=3), random_dictionary("resid_post.1")
    pairs = [PromptPair(f"my {a} ran", f"my {b} ran", "e", "o") for a, b in (("cow", "dog"), ("hen", "pig"))]
    tokens = model.tokenize(["a fox and", "my old hat"])
    want, swept = model.logits(tokens), patch_latents(model, dictionary, pairs, controls=0).patched
    barrier = Barrier(2)

    def sweep():
        barrier.wait(60)
        return [patch_latents(model, dictionary, pairs, controls=0).patched for _ in range(3)]

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(sweep)
        barrier.wait(60)
        got = [model.logits(tokens)]
        while not running.done():
            got.append(model.logits(tokens))
    assert all(torch.equal(logits, want) for logits in got)
    assert all((one == swept).all() for one in running.result())
    assert not any("forward" in module.__dict__ for module in model.hf.modules())


@pytest.mark.parametrize("rule", [gim, relp])
def test_attention_that_is_replaced_is_refused_to_other_threads(rule, other):
    """A pass there would attend as this thread asks, and its own replacement would be lost."""
    model = tiny_model()
    tokens = model.tokenize(["a hen"])
    plain = model.logits(tokens)
    with rule(model):
        for call in (lambda: model.logits(tokens), lambda: attention_patterns(model, tokens)):
            with pytest.raises(UserError, match="another thread"):
                other(call)
        model.logits(tokens)
    assert torch.equal(other(lambda: model.logits(tokens)), plain)
    assert other(lambda: attention_patterns(model, tokens)).keys() == {0, 1, 2}
