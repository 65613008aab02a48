"""Blocks that return a list or a named tuple: edits and resumed passes against plain hooks."""

from typing import NamedTuple

import pytest
import torch
from tiny import random_dictionary, tiny_model
from torch import Tensor

from saepatch.data.pairs import PromptPair
from saepatch.measure.patching import patch_latents
from saepatch.model.hooks import edit_sites
from saepatch.model.sites import Site


class Emitted(NamedTuple):
    stream: Tensor
    beside: str


def listed():
    return tiny_model("openai-gpt", seed=4, n_embd=16, n_layer=3, n_head=4, n_positions=64)


@pytest.mark.parametrize("site", ["resid_pre.1", "resid_post.1", "resid_post.2"])
def test_blocks_that_return_lists(site):
    model, site = listed(), Site.parse(site)
    tokens = model.tokenize(["the red hen"])
    noise = torch.randn(tokens.width, 16, generator=torch.Generator().manual_seed(0))
    with edit_sites(model.layout, {site: lambda x: x + noise}):
        ours = model.logits(tokens)
    block = model.hf.transformer.h[site.enters - 1]
    handle = block.register_forward_hook(lambda _m, _a, output: [output[0] + noise, *output[1:]])
    want = model.logits(tokens)
    handle.remove()
    torch.testing.assert_close(ours, want)
    assert not torch.equal(ours, model.logits(tokens))


def test_latents_are_patched_in_blocks_that_return_lists():
    model, dictionary = listed(), random_dictionary("resid_post.1", "standard")
    pair = PromptPair("the red hen", "the old hen", "x", "y")
    effects = patch_latents(model, dictionary, [pair], [3, 9], controls=0, positions="last")
    clean, corrupted = (model.tokenize([text]) for text in (pair.clean, pair.corrupted))
    values = [model.capture(tokens, [dictionary.site])[dictionary.site] for tokens in (clean, corrupted)]
    acts = [dictionary.encode(x).acts[0, -1] for x in values]
    x, y = (model.encode(text)[-1] for text in "xy")
    for number, edit in enumerate(effects.edits):
        latent = edit.units[0]
        moved = (acts[0] - acts[1])[latent] * dictionary.rows[latent]

        def write(_module, _args, output, moved=moved):
            return [torch.cat([output[0][:, :-1], output[0][:, -1:] + moved], 1), *output[1:]]

        handle = model.hf.transformer.h[1].register_forward_hook(write)
        logits = model.next_logits(corrupted)[0]
        handle.remove()
        assert float(effects.patched[0, number]) == pytest.approx(float(logits[x] - logits[y]), abs=1e-4)


def test_named_tuples_stay_named():
    model = tiny_model("llama")
    tokens, site, seen = model.tokenize(["a cow"]), Site(1), []
    block = model.layout.blocks[1]
    names = block.register_forward_hook(lambda _m, _a, output: Emitted(output, "b"))
    with edit_sites(model.layout, {site: lambda x: 2 * x}):
        back = block.register_forward_hook(lambda _m, _a, output: seen.append(output) or output.stream)
        model.logits(tokens)
    back.remove()
    names.remove()
    assert isinstance(seen[0], Emitted)
    assert seen[0].beside == "b"
    torch.testing.assert_close(seen[0].stream, 2 * model.capture(tokens, [site])[site])
