"""Self-repair of models whose repair is known, and parts that sum to the total in others."""

import numpy as np
import pytest
import torch
from planted import planted_model
from tiny import random_dictionary, tiny_model
from torch import nn

import saepatch as sp
from saepatch.data.pairs import PromptPair
from saepatch.engine.components import Heads, Stream
from saepatch.model.sites import Site


class Summing(nn.Module):
    """A block that adds what `attn` gives, then what `mlp` gives."""

    def __init__(self, attn, mlp):
        super().__init__()
        self.attn, self.mlp = attn, mlp

    def forward(self, hidden_states):
        x = hidden_states + self.attn(hidden_states)
        return x + self.mlp(x)


class Map(nn.Module):
    """`factor · x[read] + offset`, rectified if asked, at dimension `write`."""

    def __init__(self, read, write, factor, offset=0.0, rectified=False):
        super().__init__()
        self.wires, self.rectified = (read, write, factor, offset), rectified

    def forward(self, hidden_states):
        read, write, factor, offset = self.wires
        out = torch.zeros_like(hidden_states)
        value = factor * hidden_states[..., read] + offset
        out[..., write] = value.relu() if self.rectified else value
        return out


NOTHING = (1, 1, 0.0)


def repaired(attn, mlp, **options):
    """The first block's attention writes 1 to dimension 2, which raises x, at `a`, and nothing at `b`."""
    first = Summing(Map(1, 2, 1.0), Map(1, 1, -1.0))
    model = planted_model(4, [first, Summing(attn, mlp)], {"a": {1: 1.0}}, {"x": {2: 3.0, 3: 3.0}})
    pairs = [PromptPair("ca", "cb", "x", "y")] * 6
    return sp.self_repair(model, Stream(Site(0, "attn_out")), 0, pairs, **options)


def test_an_mlp_that_erases_a_share_of_the_effect_repairs_that_share():
    result = repaired(Map(*NOTHING), Map(2, 2, -0.4))
    np.testing.assert_allclose(result.direct, -3.0, rtol=1e-5)
    np.testing.assert_allclose(result.repair, [[0.0, 1.2, 0.0]] * 6, atol=1e-5)
    assert result.shares()["MLPs"].value == pytest.approx(0.4, abs=1e-5)
    np.testing.assert_allclose(result.change, -1.8, rtol=1e-5)


def test_a_backup_that_acts_when_the_node_is_silent_repairs_all_and_is_found():
    backup = Map(2, 3, -1.0, 1.0, rectified=True)
    pairs = [PromptPair("ca", "cb", "x", "y")] * 6
    result = repaired(backup, Map(*NOTHING), selection=pairs)
    np.testing.assert_allclose(result.change, 0.0, atol=1e-5)
    assert result.shares()["heads"].value == pytest.approx(1.0, abs=1e-5)
    assert [str(part) for part in result.backups] == ["attn_out.1"]
    # with the backup held to what it does in the other prompt, where it acts as well
    np.testing.assert_allclose(result.joint, 0.0, atol=1e-5)
    np.testing.assert_allclose(result.backups_alone, 3.0, atol=1e-5)


def test_mean_ablation_takes_the_mean_over_the_given_prompts():
    result = repaired(Map(*NOTHING), Map(*NOTHING), mean_over=["a", "a", "b", "c"])
    np.testing.assert_allclose(result.direct, -1.5, rtol=1e-5)
    assert result.ablation == "mean ablation"


def test_where_later_blocks_do_nothing_the_norm_repairs_all():
    model = tiny_model("gpt2")
    with torch.no_grad():
        for block in model.hf.transformer.h[1:]:
            for project in (block.attn.c_proj, block.mlp.c_proj):
                project.weight.zero_()
                project.bias.zero_()
    result = sp.self_repair(model, random_dictionary("resid_post.0"), _active(model, "resid_post.0"), PAIRS)
    assert np.abs(result.part_change).max() == 0
    np.testing.assert_allclose(result.change - result.direct, result.norm, atol=1e-6)
    assert np.abs(result.norm).max() > 1e-4


PAIRS = [PromptPair("abc", "xbz", "x", "y"), PromptPair("bac", "zxx", "y", "x"), PromptPair("cb", "xd", "z", "y")]


def _active(model, site):
    tokens = model.tokenize(["abc"])
    x = model.capture(tokens, [Site.parse(site)])[Site.parse(site)]
    return int(random_dictionary(site).activations(x)[0][0, -1].argmax())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "cohere"])
def test_parts_sum_to_the_total_in_every_family(family):
    """Post-norms, soft caps and parallel blocks included."""
    model = tiny_model(family)
    for component, unit in (
        (random_dictionary("resid_post.0"), _active(model, "resid_post.0")),
        (Heads(1, 4), 2),
        (Stream(Site(1, "mlp_out")), 0),
    ):
        result = sp.self_repair(model, component, unit, PAIRS, selection=PAIRS)
        np.testing.assert_allclose(result.direct + result.repair.sum(1), result.change, atol=2e-4)
        base = model.next_logits(model.tokenize([pair.clean for pair in PAIRS]))
        if component.site.stream == "z" and family != "gemma2":  # with plain hooks
            answers = [model.encode(pair.answer)[-1] for pair in PAIRS]
            project = model.layout.module(Site(1, "z"))
            for number, pair in enumerate(PAIRS):
                kept = []
                look = project.register_forward_pre_hook(lambda _m, args, kept=kept: kept.append(args[0].clone()))
                model.next_logits(model.tokenize([pair.corrupted]))
                look.remove()

                def swap(_m, args, kept=kept):
                    z = args[0].clone()
                    z[:, -1, 8:12] = kept[0][:, -1, 8:12]
                    return (z,)

                handle = project.register_forward_pre_hook(swap)
                ablated = model.next_logits(model.tokenize([pair.clean]))
                handle.remove()
                change = float(ablated[0, answers[number]] - base[number, answers[number]])
                assert result.change[number] == pytest.approx(change, rel=1e-3, abs=1e-4)


def test_pairs_are_chosen_on_one_resample_and_reported_on_another():
    model = tiny_model("llama")
    other = [PromptPair(pair.clean, pair.corrupted[::-1], pair.answer, pair.counter) for pair in PAIRS]
    result = sp.self_repair(model, Heads(0, 4), 1, PAIRS, selection=other, most=2)
    chosen = sp.self_repair(model, Heads(0, 4), 1, other)
    assert result.pairs.tolist() == sorted(np.argsort(chosen.direct)[:2].tolist())
    whole = sp.self_repair(model, Heads(0, 4), 1, PAIRS)
    np.testing.assert_allclose(result.change, whole.change[result.pairs], atol=1e-5)
    assert "backups chosen on the selection" in result.summary()
    assert len(list(result.rows())) == 2
    for options, phrase in (
        ({"selection": other[:2], "most": 1}, "same clean prompts"),
        ({"selection": other, "most": 1, "mean_over": ["a"]}, "no second sample"),
    ):
        with pytest.raises(sp.UserError, match=phrase):
            sp.self_repair(model, Heads(0, 4), 1, PAIRS, **options)
    with pytest.raises(sp.UserError, match="head 4 is out of range"):
        sp.self_repair(model, Heads(0, 4), 4, PAIRS)
    with pytest.raises(sp.UserError, match="so nothing is ablated"):
        sp.self_repair(model, Heads(0, 4), 0, [PromptPair("ab", "ab", "x", "y")])
