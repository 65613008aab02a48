"""Rounding that depends on what else is in a batch, as of 8-bit kernels, is measured and stated."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import random_dictionary, tiny_model
from torch import nn

import saepatch as sp
from saepatch.circuits.edges.edge_runs import EdgeRuns
from saepatch.circuits.node_runs import NodeRuns
from saepatch.circuits.nodes import Edge, Node
from saepatch.data.batches import batch_pairs
from saepatch.data.pairs import PromptPair
from saepatch.engine.corruptions import GaussianNoise, Zero
from saepatch.engine.passes.pieces import next_logits_in_pieces
from saepatch.engine.sweep import share_of_gap
from saepatch.measure.attribution import attribute
from saepatch.measure.patching import patch_latents
from saepatch.splicing.interventions import Patch
from saepatch.splicing.splice import record_latents, splice

PAIRS = [
    PromptPair(f"my {a} ran", f"my {b} ran", "x", "y") for a, b in (("pig", "fox"), ("ewe", "owl"), ("emu", "asp"))
]


class Rounded(nn.Module):
    """A linear map of inputs that are rounded to steps of the whole batch's largest value."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        step = x.abs().amax() / 63
        return self.linear((x / step).round() * step)


def worst_error(model, dictionary, effects):
    """Of the sweep's values, against one spliced forward of each row alone."""
    batch, worst = batch_pairs(model, PAIRS), 0.0
    for number, edit in enumerate(effects.edits):
        for row in range(len(PAIRS)):
            one = batch.rows([row])
            with splice(model, dictionary, Patch(record_latents(model, dictionary, one.clean), list(edit.units))):
                logits = model.next_logits(one.corrupted)[0]
            exact = float(logits[one.answer[0]] - logits[one.counter[0]])
            worst = max(worst, abs(float(effects.patched[row, number]) - exact))
    return worst


def test_rounding_that_depends_on_the_batch_is_stated():
    model, dictionary = tiny_model("qwen2", seed=6), random_dictionary("resid_post.0", "standard")
    latents = [1, 4, 9, 16]
    exact = patch_latents(model, dictionary, PAIRS, latents, controls=0)
    assert exact.rounding == 1e-4
    assert worst_error(model, dictionary, exact) < 1e-4 * np.abs(exact.gap).mean()
    for layer in model.hf.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, Rounded(getattr(layer.mlp, name)).eval())
    rounded = patch_latents(model, dictionary, PAIRS, latents, controls=0)
    error = worst_error(model, dictionary, rounded)
    assert error > 1e-3 * np.abs(rounded.gap).mean()  # so the share that goes with float32 would be wrong
    assert rounded.rounding * np.abs(rounded.gap).mean() > error / 2
    assert torch.isfinite(torch.tensor(rounded.rounding))
    (row, *_) = rounded.rows("t")
    assert (row.precision, row.rounding) == ("float32", rounded.rounding * np.abs(rounded.gap).mean())
    assert row.rounding > 10 * exact.rows("t")[0].rounding


def test_circuits_say_so(caplog):
    model, dictionary = tiny_model("qwen2", seed=6), random_dictionary("resid_post.0", "standard")
    members = [Node(dictionary.site, unit) for unit in (1, 4, 9)]
    assert NodeRuns(model, dictionary, PAIRS, members).rounding < 1e-4
    assert not caplog.records
    for layer in model.hf.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, Rounded(getattr(layer.mlp, name)).eval())
    edges = [Edge(node, Node(None, kind="logits")) for node in members]
    assert EdgeRuns(model, dictionary, PAIRS, edges).rounding > 1e-3
    assert "depend on what else is in a batch" in caplog.text
    caplog.clear()
    runs = NodeRuns(model, dictionary, PAIRS, members)
    alone = NodeRuns(model, dictionary, PAIRS[:1], members)
    assert runs.rounding * np.abs(runs.whole - runs.empty).mean() > abs(runs.whole[0] - alone.whole[0]) / 4
    assert "depend on what else is in a batch" in caplog.text


def test_loading_says_so(caplog):
    model = tiny_model("qwen2", seed=6)
    sp.wrap_model(model.hf, model.tokenizer)
    assert "depend on what else" not in caplog.text
    model.hf.model.layers[0].mlp.up_proj = Rounded(model.hf.model.layers[0].mlp.up_proj)
    sp.wrap_model(model.hf, model.tokenizer)
    assert "results of 'Qwen2ForCausalLM' depend on what else is in a batch" in caplog.text


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("corruption", [Zero(), GaussianNoise((1, 2), samples=2)], ids=["zero", "noise"])
def test_what_a_corruption_changes_is_no_rounding(corruption, direction):
    """The corrupted run of equal prompts differs from a bare pass by all that the corruption did."""
    model, dictionary = tiny_model("qwen2", seed=6), random_dictionary("resid_post.0", "standard")
    of = {"corruption": corruption, "direction": direction}
    assert patch_latents(model, dictionary, PAIRS, [1, 4], controls=0, **of).rounding == 1e-4
    assert attribute(model, dictionary, PAIRS, **of).rounding == 1e-4


def test_effects_within_rounding_are_marked():
    model, dictionary = tiny_model("qwen2", seed=6), random_dictionary("resid_post.0", "standard")
    effects = patch_latents(model, dictionary, PAIRS, [1, 4, 9], controls=0)
    sizes = sorted(np.abs(effects.change.mean(0)) / np.abs(effects.gap).mean())
    assert "°" not in effects.summary()
    loose = replace(effects, rounding=(sizes[0] + sizes[1]) / 2)
    lines = loose.summary().splitlines()
    assert [line for line in lines if " °" in line] == [line for line in lines if f" {smallest(effects)} " in line]
    assert any(line.startswith("°: within rounding") for line in lines)


def smallest(effects):
    (unit,) = effects.edits[int(np.abs(effects.change.mean(0)).argmin())].units
    return unit


def test_attribution_states_its_precision():
    model, dictionary = tiny_model("qwen2", seed=6), random_dictionary("resid_post.0", "standard")
    screen = attribute(model, dictionary, PAIRS)
    row = screen.rows("t")[0]
    assert (row.precision, row.rounding) == ("float32", 1e-4 * np.abs(screen.gap).mean())
    for layer in model.hf.model.layers:
        layer.mlp.up_proj = Rounded(layer.mlp.up_proj).eval()
    rounded = attribute(model, dictionary, PAIRS)
    alone = [attribute(model, dictionary, [pair]) for pair in PAIRS]
    worst = max(abs(float(one.clean[0] - rounded.clean[row])) for row, one in enumerate(alone))
    assert 1e-3 < worst / np.abs(rounded.gap).mean() < 3 * rounded.rounding


def test_a_share_of_the_gap_is_of_its_size():
    clean, corrupted = np.array([2.0, 0.0]), np.array([0.0, 2.0])  # gaps of 2 and -2, whose mean is 0
    assert share_of_gap(0.5, clean, corrupted) == 0.25
    assert share_of_gap(None, clean, corrupted) == share_of_gap(0.5, clean, clean) == 0.0


def test_the_noise_is_the_largest_of_all_batches(monkeypatch):
    values = iter([0.3, 0.1])
    monkeypatch.setattr("saepatch.engine.sweep.batch_noise", lambda *_: next(values))
    pairs = [PromptPair("a cat sat", "the horse sat", "x", "y"), PromptPair("abcdef", "abc", "x", "y")]
    effects = patch_latents(tiny_model(), random_dictionary(), pairs, [3], controls=0, align="right")
    assert next(values, None) is None  # the second batch is padded, so it is measured, too
    assert effects.rounding == pytest.approx(2 * 0.3 / np.abs(effects.gap).mean())


def test_the_row_with_most_padding_runs_alone(monkeypatch):
    widths = []
    monkeypatch.setattr(
        "saepatch.engine.sweep.next_logits_in_pieces",
        lambda model, alone, piece: widths.append(alone.width) or next_logits_in_pieces(model, alone, piece),
    )
    pairs = [PromptPair("uvwxyz", "uvwxya", "x", "y"), PromptPair("abc", "abcdef", "x", "y")]
    patch_latents(tiny_model(), random_dictionary(), pairs, [3], controls=0, align="right", direction="noise")
    assert widths == [4]  # "abc" and its BOS
