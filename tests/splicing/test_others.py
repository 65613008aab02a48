"""A splice beside the library's capture of hidden states, users' own hooks, and other threads on the same model."""

from threading import Barrier, Thread

import pytest
import torch
from tiny import random_dictionary, tiny_model

from saepatch.model import hooks
from saepatch.model.sites import Site
from saepatch.splicing.interventions import Steer
from saepatch.splicing.splice import splice

SITE = Site(1)


def asked_for_states(model, tokens):
    return model.hf(tokens.input_ids, output_hidden_states=True).hidden_states[2].detach()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
@pytest.mark.parametrize("asked_before", [True, False])
def test_hidden_states_are_those_after_every_edit(family, asked_before):
    model, dictionary = tiny_model(family), random_dictionary("resid_post.1")
    tokens = model.tokenize(["the red hen"])
    if asked_before:
        asked_for_states(model, tokens)
    inner = {}
    with splice(model, dictionary, Steer(3, 2.0)):
        outer = model.capture(tokens, [SITE])[SITE]
        torch.testing.assert_close(asked_for_states(model, tokens), outer)
        with splice(model, dictionary, Steer(5, 1.0)):
            inner = model.capture(tokens, [SITE])[SITE]
            torch.testing.assert_close(asked_for_states(model, tokens), inner)
        torch.testing.assert_close(asked_for_states(model, tokens), outer)
    moved = [2.0 * dictionary.rows[3], 1.0 * dictionary.rows[5]]
    plain = asked_for_states(model, tokens)
    torch.testing.assert_close(outer[:, 1:], plain[:, 1:] + moved[0])
    torch.testing.assert_close(inner[:, 1:], plain[:, 1:] + moved[0] + moved[1])


@pytest.mark.parametrize("asked_before", [True, False])
def test_hooks_of_users_keep_their_order(asked_before):
    """One put on before the splice acts before it, one put on inside after it; hidden states show both."""
    model, dictionary = tiny_model("llama"), random_dictionary("resid_post.1")
    tokens, block, seen = model.tokenize(["a cow"]), model.layout.blocks[1], {}
    if asked_before:
        asked_for_states(model, tokens)

    def users(name):
        return block.register_forward_hook(lambda _m, _a, output: seen.update({name: output}))

    before = users("before")
    with splice(model, dictionary, Steer(3, 2.0)):
        after = users("after")
        states = asked_for_states(model, tokens)
        after.remove()
    before.remove()
    torch.testing.assert_close(states, seen["after"])
    torch.testing.assert_close(seen["after"][:, 1:], seen["before"][:, 1:] + 2.0 * dictionary.rows[3])


def test_a_splice_acts_on_its_own_thread():
    """Three threads on one model, two of them in splices of their own: passes, and generation."""
    model, dictionary = tiny_model("gpt2"), random_dictionary("resid_post.1")
    tokens, steers = model.tokenize(["my old dog"]), [Steer(3, 6.0), Steer(7, -6.0), None]

    def results():
        return [model.logits(tokens), torch.tensor(model.continue_ids(["a cow"], 4))]

    want = []
    for steer in steers:
        if steer is None:
            want.append(results())
        else:
            with splice(model, dictionary, steer):
                want.append(results())
    assert len({tuple(map(float, logits[0, -1, :5])) for logits, _ in want}) == 3
    got, barrier = {}, Barrier(3)

    def work(number, steer):
        for _ in range(4):
            barrier.wait(60)
            if steer is None:
                got.setdefault(number, []).append(results())
            else:
                with splice(model, dictionary, steer):
                    barrier_inside.wait(60)
                    got.setdefault(number, []).append(results())

    barrier_inside = Barrier(2)
    threads = [Thread(target=work, args=pair) for pair in enumerate(steers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for number, ours in enumerate(want):
        assert len(got[number]) == 4
        for theirs in got[number]:
            torch.testing.assert_close(theirs[0], ours[0])
            assert torch.equal(theirs[1], ours[1])
    assert "generate" not in model.hf.__dict__
    assert not any(block._forward_hooks for block in model.layout.blocks)


def test_a_hook_that_is_removed_as_it_is_about_to_run_does_nothing():
    """As when another thread leaves its splice while this one is in a forward pass."""
    model = tiny_model()
    tokens = model.tokenize(["a cow"])
    expected = model.logits(tokens)
    module = model.layout.module(Site(1, "z"))
    handles = []
    first = module.register_forward_pre_hook(lambda *_: handles.pop().remove())
    handles.append(hooks._on_input(module, torch.zeros_like))
    assert torch.equal(model.logits(tokens), expected)
    first.remove()
    with hooks.before_forward(model.hf, model.layout, lambda *_: None):
        key = next(reversed(model.hf._forward_pre_hooks))
        assert model.hf._forward_pre_hooks[key](model.hf, ()) is None
