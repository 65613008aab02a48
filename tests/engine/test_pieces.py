"""Long prompts in pieces: the same numbers as whole passes, and no pass over more columns than a piece."""

from itertools import product

import numpy as np
import pytest
import torch
from tiny import random_dictionary, tiny_model

import saepatch as sp
from saepatch.data.pairs import PromptPair
from saepatch.engine import changes
from saepatch.engine.components import Edit, EditPart, LatentUnits, Stream
from saepatch.engine.passes import kept_run, pieces
from saepatch.engine.passes.pieces import next_logits_in_pieces
from saepatch.measure.patching import patch_by_pair
from saepatch.model.sites import Site

PAIRS = [
    PromptPair("a long prompt about the cat that sat down", "a long prompt about the dog that sat down", "x", "y", "a"),
    PromptPair("q long prompt about the cat that sat down", "q long prompt about the owl that sat down", "p", "q", "b"),
]
FAMILIES = ["llama", "gemma2", "gemma3_text", "qwen3", "gpt2"]


def model_of(family):
    """Windows that reach from the prompts' end to what differs."""
    return tiny_model(family, **({"sliding_window": 16} if family.startswith("gemma") else {}))


@pytest.fixture
def short_pieces(monkeypatch):
    """Prompts of more than 8 tokens are long, and run 8 columns at a time; dictionaries read 10 positions at a time."""

    def patched(on):
        monkeypatch.setattr(pieces, "PIECE", 8 if on else 4096)
        monkeypatch.setattr(pieces, "piece_of", lambda width: 8)
        monkeypatch.setattr(kept_run, "piece_of", lambda width: 8)
        monkeypatch.setattr(kept_run, "PROBED", 24 if on else 2048)
        monkeypatch.setattr(changes, "NUMBERS", 480 if on else 2**26)

    return patched


def both(short_pieces, measure):
    """What is measured by whole passes and in pieces."""
    out = []
    for on in (False, True):
        short_pieces(on)
        out.append(measure())
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_gives_the_same_effects(short_pieces, family):
    model, sae = model_of(family), random_dictionary("resid_post.0")
    whole, cut = both(short_pieces, lambda: sp.patch_streams(model, PAIRS, stream="resid_pre"))
    np.testing.assert_allclose(cut.patched, whole.patched, atol=2e-5)
    assert np.array_equal(cut.ran, whole.ran)
    whole, cut = both(short_pieces, lambda: sp.patch_latents(model, sae, PAIRS, controls=0, each_position=False))
    assert whole.edits == cut.edits
    np.testing.assert_allclose(cut.patched, whole.patched, atol=2e-5)


GRADDROP = [(family, sp.GradDrop()) for family in ("llama", "gemma3_text")]


@pytest.mark.parametrize(
    ("family", "method"), [*product(FAMILIES, [sp.FirstOrder(), sp.IntegratedGradients(2)]), *GRADDROP]
)
def test_attribution_gives_the_same_estimates(short_pieces, family, method):
    model = model_of(family)
    saes = [random_dictionary("resid_post.0"), random_dictionary("resid_post.1")]
    whole, cut = both(short_pieces, lambda: sp.attribute(model, saes, PAIRS, method=method))
    assert len(cut) == len(whole) > 50
    assert np.array_equal(cut.unit, whole.unit)
    np.testing.assert_allclose(cut.score, whole.score, atol=2e-5)
    assert np.abs(whole.score).max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_edits_of_several_sites_give_the_same_effects(short_pieces, family):
    """At all positions or at one, with units frozen downstream, and a stream upstream of the latents."""
    model, saes = model_of(family), [random_dictionary(f"resid_post.{layer}") for layer in range(2)]
    first, second = (sae.site for sae in saes)
    stream = Site(0, "resid_pre")
    several = [
        Edit.of([EditPart(first, tuple(range(24))), EditPart(second, (1, 3, 5, 7))]),
        Edit.of([EditPart(first, tuple(range(48))), EditPart(second, tuple(range(40)), frozen=True)]),
        Edit.of([EditPart(stream, (0,), 26, kind="stream"), EditPart(first, tuple(range(40)), frozen=True)]),
        Edit.of([EditPart(stream, (0,), 26, kind="stream"), EditPart(second, tuple(range(30)), 37)]),
    ]
    components = [Stream(stream), *map(LatentUnits, saes)]
    whole, cut = both(short_pieces, lambda: patch_by_pair(model, components, PAIRS, [several] * len(PAIRS)))
    for one, other in zip(whole, cut, strict=True):
        np.testing.assert_allclose(other.patched, one.patched, atol=2e-5)
        assert one.ran.all()
        assert other.ran.all()
        assert np.abs(one.patched - one.corrupted[:, None]).min() > 1e-4


def test_no_pass_is_wider_than_a_piece(short_pieces):
    """Nor than the 24 columns of the prompt's start on which the ways of resuming are checked; it has 41."""
    short_pieces(True)
    model, sae = tiny_model("llama"), random_dictionary("resid_post.0")
    widths = []
    handle = model.layout.blocks[2].register_forward_pre_hook(
        lambda _, args, kwargs: widths.append((args[0] if args else kwargs["hidden_states"]).shape[1]), with_kwargs=True
    )
    for method in (sp.FirstOrder(), sp.GradDrop()):
        sp.attribute(model, sae, PAIRS[:1], method=method)
    edit = Edit.of([EditPart(sae.site, (1, 2)), EditPart(Site(1, "resid_post"), (0,), kind="stream")])
    components = [LatentUnits(sae), Stream(Site(1, "resid_post"))]
    patch_by_pair(model, components, PAIRS[:1], [[edit]])
    sp.patch_streams(model, PAIRS[:1], stream="resid_post", each_position=False)
    handle.remove()
    assert max(widths) == 24
    assert widths.count(8) > 10


def test_next_logits_in_pieces_are_those_of_whole_passes():
    for family in FAMILIES:
        model = model_of(family)
        tokens = model.tokenize([pair.clean for pair in PAIRS], side="left")
        expected = model.call(tokens, last=True)[:, -1].detach()
        for piece in (1, 7, 64):
            with torch.no_grad():
                torch.testing.assert_close(next_logits_in_pieces(model, tokens, piece), expected, atol=2e-5, rtol=0)
