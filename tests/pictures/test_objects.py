"""Boxes, and the ablation of the object in one."""

import numpy as np
import pytest
import torch

from pictures.tiny_vision import FAMILIES, picture, pixels_of, vision_model
from saepatch.data.pairs import PromptPair
from saepatch.errors import UserError
from saepatch.measure.objects import SETS, ablate_objects
from saepatch.model.inputs.images import UNKNOWN, ImagePrompt, Images
from saepatch.model.inputs.patches import patches_seen
from saepatch.model.inputs.tokens import Tokens
from saepatch.model.positions import At
from saepatch.splicing.splice import whole_prompt

SIZES = {"gemma3": (2, 2), "paligemma": (4, 4), "llava": (4, 4), "qwen2_vl": (2, 3), "qwen3_vl": (2, 3)}


@pytest.mark.parametrize("family", SIZES)
def test_each_token_stands_for_its_part_of_the_picture(family):
    """Cut into rows and columns; what a processor crops away, at the sides, belongs to no token."""
    config, processor = FAMILIES[family]()
    seen = patches_seen(processor, (24, 16), getattr(config, "image_token_id", None) or config.image_token_index)
    rows, columns = SIZES[family]
    left, wide = (4, 16) if family == "llava" else (0, 24)
    for number, box in enumerate(seen.tolist()):
        row, column = divmod(number, columns)
        x, y = wide / columns, 16 / rows
        expected = [left + column * x, row * y, left + (column + 1) * x, (row + 1) * y]
        assert box == pytest.approx(expected, abs=0.3)


def test_tiles_and_the_whole_picture_are_both_seen():
    config, processor = FAMILIES["idefics3"]()
    seen = patches_seen(processor, (24, 16), config.image_token_id)
    assert len(seen) == 5 * 4
    assert seen[0].tolist() == pytest.approx([0, 0, 6, 4], abs=0.3)  # the first tile
    assert seen[-4].tolist() == pytest.approx([0, 0, 12, 8], abs=0.3)  # the whole picture


def test_a_change_in_a_box_changes_its_token_alone(tmp_path):
    """The planted check: an encoder that mixes no patches."""
    model = vision_model("gemma3")
    layers = model.hf.model.vision_tower.encoder.layers
    kept = [layer.self_attn.out_proj.weight.clone() for layer in layers]
    prompts = [ImagePrompt("a <image> b", picture(tmp_path, name, box=box))
               for name, box in (("one", (0, 0, 3, 3)), ("two", (13, 9, 22, 14)))]  # fmt: skip
    try:
        with torch.no_grad():
            for layer in layers:
                layer.self_attn.out_proj.weight.zero_()
                layer.self_attn.out_proj.bias.zero_()
            images = model.tokenize([*prompts, ImagePrompt("a <image> b", picture(tmp_path, "white", "white"))]).images
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.self_attn.out_proj.weight.copy_(weight)
    features = images.features[:, images.here[0], 0]
    changed = (features[:2] - features[2]).abs().amax(-1) > 1e-5
    assert changed.tolist() == [[True, False, False, False], [False, False, False, True]]
    assert images.seen[0, images.here[0]][3].tolist() == pytest.approx([12, 8, 24, 16], abs=0.3)


@pytest.fixture
def pairs(tmp_path):
    colours = ("red", "blue")
    prompts = [ImagePrompt("a <image> b", picture(tmp_path, colour, colour)) for colour in colours]
    return [PromptPair(prompt, prompt, "x", "y", colour) for prompt, colour in zip(prompts, colours, strict=True)]


def test_ablation_against_a_hook_at_the_projector(pairs):
    model = vision_model("paligemma")
    result = ablate_objects(model, pairs, [(0, 0, 12, 8)] * 2, rim=1, draws=2)
    projector = model.hf.model.multi_modal_projector
    seen = []
    x, y = (model.encode(text)[-1] for text in ("ax", "ay"))

    @torch.no_grad()
    def run(prompt, tokens=(), mean=None):
        def hook(_module, _args, output):
            seen.append(output[0].clone())
            output = output.clone()
            output[0, list(tokens)] = mean if mean is not None else 0.0
            return output

        with projector.register_forward_hook(hook):
            logits = model.hf(**pixels_of(model, prompt)).logits[0, -1]
        return float(logits[x] - logits[y])

    whole = [run(pair.clean) for pair in pairs]
    mean = torch.cat(seen).mean(0)
    inner, outer = [0, 1, 4, 5], [row * 4 + column for row in range(3) for column in range(3)]
    np.testing.assert_allclose(result.whole, whole, atol=1e-5)
    for name, tokens in (("object", inner), ("object and rim", outer)):
        expected = [run(pair.clean, tokens, mean) for pair in pairs]
        np.testing.assert_allclose(result.ablated[SETS.index(name)], expected, atol=1e-5)
    assert result.tokens.tolist() == [4, 9, 7, 7, 9]  # 7 tokens are left beside object and rim
    rest = [token for token in range(16) if token not in outer]  # all of them, whatever is drawn
    expected = [run(pair.clean, rest, mean) for pair in pairs]
    for name in ("random", "registers"):
        np.testing.assert_allclose(result.ablated[SETS.index(name)], expected, atol=1e-5)
    assert "fall" in result._repr_html_()
    assert "object and rim" in repr(result)


def test_controls_are_of_the_size_of_the_object(pairs):
    model = vision_model("paligemma")
    result = ablate_objects(model, pairs, [(0, 0, 6, 4)] * 2, rim=0)
    assert result.tokens.tolist() == [1] * 5
    with pytest.raises(UserError, match="overlaps no part"):
        ablate_objects(model, pairs, [(90, 90, 99, 99)] * 2)
    with pytest.raises(UserError, match="1 boxes for 2 pairs"):
        ablate_objects(model, pairs, [(0, 0, 6, 4)])
    with pytest.raises(UserError, match="has no picture"):
        ablate_objects(model, [PromptPair("abc", "abc", "x", "y")], [(0, 0, 6, 4)])


def test_pictures_that_cannot_be_told_apart_are_not_chosen_one_by_one():
    here, zeros = torch.tensor([[False, True, True]]), torch.zeros(1, 3, dtype=torch.long)
    number = torch.where(here, UNKNOWN, -1)
    features, places, seen = torch.zeros(1, 3, 1, 8), zeros[..., None][..., :0], torch.full((1, 3, 4), torch.nan)
    images = Images(features, here, places, zeros, zeros, zeros, number, seen)
    tokens = Tokens(zeros + 5, zeros + 1, zeros == 0, images)
    with pytest.raises(UserError, match="cannot be told apart"):
        whole_prompt(vision_model("gemma3"), tokens).select(At.image())
