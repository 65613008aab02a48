"""A model whose later blocks sit on another device, played by torch's `meta` device; what comes from there is zeros."""

import numpy as np
import pytest
import torch
from tiny import random_dictionary, tiny_model
from torch import Tensor
from torch.utils._pytree import tree_map

from saepatch.data.pairs import PromptPair
from saepatch.engine.passes import kept_run, pieces
from saepatch.measure.attribution import FirstOrder, GradDrop, IntegratedGradients, attribute
from saepatch.measure.patching import patch_latents
from saepatch.measure.quality import latent_statistics, splice_quality
from saepatch.splicing.interventions import Clamp, Steer
from saepatch.splicing.splice import record_latents, splice
from saepatch.steering.contrasts import contrast


class Handed(torch.autograd.Function):
    """A copy on another device, and a gradient on the first; out of `meta` come zeros."""

    @staticmethod
    def forward(ctx, x, device):
        ctx.was = x.device
        return torch.zeros(x.shape, dtype=x.dtype, device=device)

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros(gradient.shape, dtype=gradient.dtype, device=ctx.was), None


@pytest.fixture
def spread(monkeypatch):
    """Blocks from the second on, and the unembedding, are elsewhere."""
    model, plain = tiny_model("qwen3", seed=2), Tensor.to

    def to(x, *args, **options):
        target = args[0].device if args and isinstance(args[0], Tensor) else args[0] if args else None
        if x.is_meta and target is not None and not isinstance(target, torch.dtype) and str(target) == "cpu":
            return Handed.apply(x, "cpu")
        if not x.is_meta and x.is_floating_point() and str(target) == "meta":
            return Handed.apply(x, "meta")
        return plain(x, *args, **options)

    def hop(_module, args, kwargs):
        return tree_map(lambda v: hand(v) if isinstance(v, Tensor) and not v.is_meta else v, (args, kwargs))

    def hand(v):
        return Handed.apply(v, "meta") if v.is_floating_point() else plain(v, "meta")

    for block in [*model.hf.model.layers[1:], model.hf.model.norm, model.hf.lm_head]:
        block.to("meta").register_forward_pre_hook(hop, with_kwargs=True)
    monkeypatch.setattr(Tensor, "to", to)
    return model


def test_values_are_handed_over_to_the_dictionary_and_back(spread):
    dictionary, tokens = random_dictionary("resid_post.1", "standard"), spread.tokenize(["a bird sang"])
    assert spread.hf(input_ids=tokens.input_ids).logits.is_meta
    for interventions, error in ((Steer(3, 1.0), "keep"), (Clamp(3, 1.0), "keep"), ((), "drop")):
        with splice(spread, dictionary, interventions, error=error):
            assert spread.logits(tokens).device == spread.device
    assert record_latents(spread, dictionary, tokens).acts.device == spread.device
    assert latent_statistics(spread, dictionary, tokens).maximum.shape == (dictionary.d_sae,)
    assert len(contrast(spread, dictionary, ["a bird"], ["a wolf"])) == dictionary.d_sae
    assert splice_quality(spread, dictionary, tokens).l0 > 0
    effects = patch_latents(spread, dictionary, [PromptPair("a bird", "a wolf", "x", "y")], [3], controls=0)
    assert effects.patched.shape == (1, 1)


@pytest.mark.parametrize(
    ("method", "long"),
    [
        (FirstOrder(), False),
        (IntegratedGradients(2), False),
        (GradDrop(), False),
        (FirstOrder(), True),
        pytest.param(IntegratedGradients(2), True, marks=pytest.mark.slow),
        pytest.param(GradDrop(), True, marks=pytest.mark.slow),
    ],
)
def test_gradients_are_handed_over_too(spread, method, long, monkeypatch):
    """Also of long prompts, which run in pieces."""
    if long:
        monkeypatch.setattr(pieces, "PIECE", 4)
        monkeypatch.setattr(kept_run, "piece_of", lambda width: 4)
    sites = [random_dictionary("resid_post.0"), random_dictionary("resid_post.1")]
    screen = attribute(spread, sites, [PromptPair("a small bird sang", "a small wolf sang", "x", "y")], method=method)
    assert len(screen) > 0
    assert np.isfinite(screen.score).all()
