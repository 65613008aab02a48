"""Steering at kept norm against its formula, at every token of a generation."""

import pytest
import torch
from tiny import random_dictionary, tiny_model

from saepatch.errors import UserError
from saepatch.model.hooks import edit_sites
from saepatch.splicing.interventions import SteerAtNorm
from saepatch.splicing.splice import splice


@torch.no_grad()
@pytest.mark.parametrize("latents", [(4,), (3, 9)])
def test_the_site_keeps_its_norm_and_the_push_fades(latents):
    model, dictionary = tiny_model("llama"), random_dictionary()
    steer = SteerAtNorm(latents, 3.0, (0.5,) * len(latents), fade=0.7, power=2.0)
    with splice(model, dictionary, steer):
        (ids,) = model.continue_ids(["the cat sat"], 5)
    prompt, new = model.encode("the cat sat"), []
    push = 1.5 * dictionary.W_dec[list(latents)].sum(0)

    def write(x):
        position = torch.arange(x.shape[1])
        token = (position - len(prompt)).clamp(min=0)
        moved = x + push * (1 / (1 + 0.7 * token[:, None])) ** 2
        moved = moved * x.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)
        return torch.where((position > 0)[:, None], moved, x) if model.bos_id == prompt[0] else moved

    with edit_sites(model.layout, {dictionary.site: write}):
        for _ in ids:  # one token after the other, nothing cached
            logits = model.hf(input_ids=torch.tensor([[*prompt, *new]]), use_cache=False).logits[0, -1]
            new.append(int(logits.argmax()))
    assert new == list(ids)
    tokens = model.tokenize(["the cat sat"])
    before = model.capture(tokens, [dictionary.site])[dictionary.site]
    with splice(model, dictionary, steer):
        after = model.capture(tokens, [dictionary.site], stop=False)[dictionary.site]
    assert after.norm(dim=-1) == pytest.approx(before.norm(dim=-1), rel=1e-4)
    assert not torch.allclose(after, before, atol=1e-2)


def test_mistakes():
    with pytest.raises(UserError, match="at least 0"):
        SteerAtNorm(1, 1.0, fade=-1)
