"""Prompts with pictures in every family, against plain hooks on the plain model, which reads pixels."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import random_dictionary

from pictures.tiny_vision import FAMILIES, picture, pixels_of, vision_model
from saepatch.data.batches import batch_pairs
from saepatch.data.pairs import PromptPair
from saepatch.engine.passes.kept_run import KeptRun
from saepatch.measure.attribution import attribute
from saepatch.measure.patching import patch_streams
from saepatch.model.hooks import first_of
from saepatch.model.inputs.images import ImagePrompt, Images
from saepatch.model.inputs.tokens import Tokens
from saepatch.model.positions import At
from saepatch.model.sites import Site
from saepatch.splicing.interventions import Ablate
from saepatch.splicing.splice import splice

BLOCKS = {"gemma3": "picture", "paligemma": "prompt"}  # the others read earlier tokens alone
TEXT = "a <image> b"


FEW = ("gemma3", "qwen3_vl")  # blocks that read each other; features added after early blocks, positions on three axes


@pytest.fixture(params=FAMILIES)
def model(request):
    return vision_model(request.param)


@pytest.fixture(params=[*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in FEW)])
def few(request):
    return vision_model(request.param)


@pytest.fixture
def pair(tmp_path):
    clean, corrupted = (picture(tmp_path, name, name) for name in ("red", "blue"))
    return PromptPair(ImagePrompt(TEXT, clean), ImagePrompt(TEXT, corrupted), "x", "y")


@cache
def _pixels(model, prompt):
    return pixels_of(model, prompt)


@torch.no_grad()
def plain(model, prompt, edits=None):
    """Next-token logits of a plain call, and what blocks emit; `edits[layer]` change what a block emits."""
    held, handles = {}, []

    def hook(layer):
        def run(_module, _args, output):
            x = first_of(output).clone()
            if layer in (edits or {}):
                edits[layer](x)
            held[layer] = x.clone()
            return (x, *output[1:]) if isinstance(output, tuple) else x

        return run

    for layer, block in enumerate(model.layout.blocks):
        handles.append(block.register_forward_hook(hook(layer)))
    try:
        logits = model.hf(**_pixels(model, prompt)).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    return logits, held


def test_logits_are_those_of_a_plain_call_and_text_stays_as_it_was(model, pair):
    before = model.next_logits(["some text"])
    tokens = model.tokenize([pair.clean, pair.corrupted])
    expected = torch.stack([plain(model, prompt)[0] for prompt in (pair.clean, pair.corrupted)])
    torch.testing.assert_close(model.next_logits(tokens), expected, rtol=1e-4, atol=1e-5)
    assert model.pictures.blocks == BLOCKS.get(model.name, "none")
    torch.testing.assert_close(model.next_logits(["some text"]), before)
    if not model.takes_cache:
        return
    cache = model.new_cache()  # some models keep the offset of a picture's positions for passes on a cache
    text = model.tokenize(["some text"])
    model.call(text.columns(4), cache=cache)
    torch.testing.assert_close(model.call(text, 4, cache=cache)[:, -1], before, rtol=1e-4, atol=1e-5)


def test_rows_of_several_lengths_share_a_batch(few, pair):
    model = few
    longer = ImagePrompt("longer " + pair.clean, *pair.clean.images)
    if model.name == "paligemma":
        pytest.skip("no padding with this model")
    both = model.next_logits(model.tokenize([pair.clean, longer], "left"))
    alone = torch.cat([model.next_logits(model.tokenize([prompt])) for prompt in (pair.clean, longer)])
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_every_layer_and_position_between_two_pictures(few, pair, direction):
    model = few
    if direction == "noise" and model.name not in ("gemma3", "qwen3_vl"):
        pytest.skip("both directions where a family has a trap")
    effects = patch_streams(model, [pair], direction=direction, positions="every")
    prompts = (pair.corrupted, pair.clean) if direction == "denoise" else (pair.clean, pair.corrupted)
    (base, source), (x, y) = prompts, (model.encode(text)[-1] for text in ("ax", "ay"))
    _, held = plain(model, source)
    width = held[0].shape[1]
    images = model.tokenize([pair.clean]).images.here[0]
    for number, edit in enumerate(effects.edits):
        if edit.site.layer not in (0, 2) or edit.position % (3 if model.name == "idefics3" else 1):
            continue  # enough of them

        def copy(z, edit=edit):
            z[:, edit.position] = held[edit.site.layer][:, edit.position]

        logits, _ = plain(model, base, {edit.site.layer: copy})
        assert effects.patched[0, number] == pytest.approx(float(logits[x] - logits[y]), abs=1e-5)
    changed = {edit.position for edit in effects.edits}
    first = 0 if model.name == "paligemma" else int(images.nonzero()[0])  # its text reads the picture after it
    assert changed == set(range(first, width))


def test_passes_resume_without_running_whole(few, pair):
    """On a cache where they can; an edit inside a picture whose tokens read each other starts before it."""
    model = few
    batch = batch_pairs(model, [pair])
    run, site = KeptRun(model, batch.corrupted, [Site(1)]), Site(1)
    assert run.way(site) in (("blocks",) if model.name == "paligemma" else ("shortcuts", "cache"))
    here = batch.corrupted.images.here[0].nonzero().flatten()
    column = int(here[-1])
    assert batch.corrupted.block_start(column) == {"gemma3": int(here[0]), "paligemma": 0}.get(model.name, column)
    if model.name in BLOCKS:
        with pytest.raises(Exception, match="inside a picture"):
            batch.corrupted.images.arguments(column, frozenset())
        with pytest.raises(Exception, match="inside a picture"):
            model.call(batch.corrupted.columns(column))


def test_the_pictures_features_swapped_at_the_projector_give_the_clean_logits(model, pair):
    """The planted check: nothing else tells the prompts apart."""
    clean, corrupted = model.tokenize([pair.clean]), model.tokenize([pair.corrupted])
    assert torch.equal(clean.input_ids, corrupted.input_ids)
    features = torch.where(clean.images.here[..., None, None], clean.images.features, corrupted.images.features)
    swapped = Images(**vars(corrupted.images) | {"features": features})
    logits = model.next_logits(Tokens(corrupted.input_ids, corrupted.attention_mask, corrupted.ordinary, swapped))
    torch.testing.assert_close(logits[0], plain(model, pair.clean)[0], rtol=1e-4, atol=1e-5)
    effects = patch_streams(model, [pair], "resid_pre", positions=At.image(), each_position=False)
    if model.name != "qwen3_vl":  # there, features are added after two blocks as well
        assert effects.normalised[0][0] == pytest.approx(1, abs=1e-4)
    else:
        assert abs(effects.normalised[0][0] - 1) > 1e-3


def test_attribution_at_image_positions_is_the_gradient_of_the_plain_model(few, pair):
    model = few
    site = Site(1)
    dictionary = random_dictionary(str(site))
    screen = attribute(model, dictionary, [pair], positions=At.image())
    here = model.tokenize([pair.clean]).images.here[0]
    leaf = []

    def keep(_module, _args, output):
        leaf.append(first_of(output).detach().requires_grad_())
        return (leaf[0], *output[1:]) if isinstance(output, tuple) else leaf[0]

    with model.layout.blocks[1].register_forward_hook(keep):
        logits = model.hf(**pixels_of(model, pair.corrupted)).logits[0, -1]
    x, y = (model.encode(text)[-1] for text in ("ax", "ay"))
    gradient = torch.autograd.grad(logits[x] - logits[y], leaf[0])[0][0]
    source = plain(model, pair.clean)[1][1]
    acts = [dictionary.encode(z).acts[0] for z in (source, leaf[0].detach())]
    expected = (acts[0] - acts[1]) * (gradient @ dictionary.rows.T) * here[:, None]
    for number in np.flatnonzero(screen.unit >= 0):
        want = float(expected[screen.position[number], screen.unit[number]])
        assert screen.score[number] == pytest.approx(want, rel=1e-3, abs=1e-5)
    assert set(screen.position.tolist()) == set(here.nonzero().flatten().tolist())


def test_a_splice_acts_on_the_pictures_tokens(few, pair):
    model = few
    dictionary, tokens = random_dictionary("resid_post.1"), model.tokenize([pair.clean])
    with splice(model, dictionary, Ablate(None, positions=At.image())):
        spliced = model.next_logits(tokens)[0]
    here = tokens.images.here[0]

    def ablate(z):
        decoded = dictionary.encode(z).acts @ dictionary.rows
        z[:, here] -= decoded[:, here]

    expected, _ = plain(model, pair.clean, {1: ablate})
    torch.testing.assert_close(spliced, expected, rtol=1e-4, atol=1e-5)


def test_prompts_are_equal_where_text_and_pictures_are():
    one, same = ImagePrompt("a <image>", "x.png"), ImagePrompt("a <image>", Path("x.png"))
    assert one == same
    assert (one != same) is False
    assert len({one, same}) == 1
    assert PromptPair(one, "b", "c", "d") == PromptPair(same, "b", "c", "d")
    for other in (ImagePrompt("a <image>", "y.png"), ImagePrompt("b <image>", "x.png"), ImagePrompt("a <image>")):
        assert one != other
    assert one != "a <image>"
    assert one != "a <image>"
    assert ImagePrompt("a") == "a"
    assert (one + "!", "!" + one) == (ImagePrompt("a <image>!", "x.png"), ImagePrompt("!a <image>", "x.png"))
