"""What a sweep's result says of itself: effects, controls, tests, tables, maps and rows, on values set by hand."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import random_dictionary, tiny_model
from torch import nn

from saepatch.data.batches import batch_pairs
from saepatch.data.pairs import PromptPair
from saepatch.engine.components import Edit
from saepatch.errors import UserError
from saepatch.measure.patching import patch_heads, patch_latents, patch_streams
from saepatch.measure.results.effects import Effects, describe, precision_of, within_rounding
from saepatch.model.sites import Site
from saepatch.records.statistics import bootstrap_ratio

SITE, LATER = Site(1), Site(2)
PAIRS = [
    PromptPair("the cat sat", "the dog sat", "x", "y", "a"),
    PromptPair("one big tree", "one red tree", "p", "q", "b"),
    PromptPair("abc", "abd", "r", "s", "c"),
    PromptPair("the cow ran", "the pig ran", "m", "n", "d"),
]


def effects_of(change, edits, ran=None, gap=None, direction="denoise", positions="all"):
    """Effects whose `change` is the one given."""
    change = np.asarray(change, dtype=float)
    gap = np.full(len(change), 2.0) if gap is None else np.asarray(gap, dtype=float)
    corrupted = np.linspace(-1, 1, len(change))
    clean = corrupted + gap
    patched = corrupted[:, None] + change if direction == "denoise" else clean[:, None] - change
    return Effects(
        direction=direction,
        metric="logit_difference",
        positions=positions,
        edits=tuple(edits),
        examples=tuple(f"e{i}" for i in range(len(change))),
        clean=clean,
        corrupted=corrupted,
        patched=patched,
        ran=np.ones(change.shape, dtype=bool) if ran is None else np.asarray(ran),
    )


def with_controls():
    """Two groups, each with two random and two matched sets beside it, and a third group that has none."""
    edits, columns = [], []
    for group, size in (((1, 2), 1.0), ((3, 4), 0.5)):
        edits.append(Edit(SITE, group))
        columns.append(size)
        for role, values in (("random", (0.1, 0.3)), ("matched", (0.2, 0.6))):
            for number, value in enumerate(values):
                edits.append(Edit(SITE, (10 + number, 20), role=role, beside=group))
                columns.append(size * value)
    edits.append(Edit(LATER, (5, 6)))
    columns.append(0.1)
    noise = np.random.default_rng(0).normal(0, 0.02, (12, len(edits)))
    return effects_of(np.array(columns) + noise, edits)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_effects_are_normalised_by_definition(direction):
    change, gap = np.array([[1.0], [2.0], [3.0], [5.0]]), [2.0, 4.0, 1e-3, -5.0]
    effects = effects_of(change, [Edit(SITE, (7,))], gap=gap, direction=direction)
    np.testing.assert_allclose(effects.change, change)
    np.testing.assert_allclose(effects.normalised[:, 0], [0.5, 0.5, np.nan, -1.0])
    assert effects.missing == 1
    assert effects.of(0).value == pytest.approx(11 / 1.001)
    assert effects.of(0).n == 4
    assert effects.mean_of_ratios(0).value == pytest.approx(0.0)
    assert effects.mean_of_ratios(0).n == 3
    assert effects.of(Edit(SITE, (7,))) == effects.of(0)
    np.testing.assert_allclose(effects.ratios(), [11 / 1.001])


def test_the_seed_is_that_of_the_bootstrap():
    change = np.random.default_rng(3).lognormal(0, 1, (12, 1))
    effects = effects_of(change, [Edit(SITE, (7,))], gap=np.linspace(1, 3, 12))
    assert effects.of(0, seed=1) == bootstrap_ratio(change[:, 0], effects.gap, seed=1) != effects.of(0)


def test_controls_are_those_drawn_for_the_edit():
    effects = with_controls()
    first, second = effects.edits[0], effects.edits[5]
    for edit, size in ((first, 1.0), (second, 0.5)):
        assert effects.controls(edit, "random").value == pytest.approx(size * 0.2 / 2, abs=0.01)
        assert effects.controls(edit, "matched").value == pytest.approx(size * 0.4 / 2, abs=0.01)
        interval = effects.controls(edit, "random")
        assert interval.low < interval.value < interval.high
        assert interval.n == 12
    assert effects.controls(effects.edits[10], "random") is None
    assert len(effects.where("random")) == len(effects.where("matched")) == 4


def test_controls_beside_no_one_count_for_every_set_of_their_size():
    edits = [Edit(SITE, (1, 2), role="top"), Edit(SITE, (1,), role="top"), Edit(SITE, (7, 8), role="random")]
    effects = effects_of(np.ones((4, 3)) * [1.0, 1.0, 0.2], edits)
    assert effects.controls(0, "random").value == pytest.approx(0.1)
    assert effects.controls(1, "random") is None


def test_top_leaves_controls_out():
    change = [[0.5, 9.0, 1.0, 9.0, 9.0, -3.0]] * 3
    roles = ("single", "random", "single", "matched", "differing", "every")
    edits = [Edit(SITE, (number,), role=role) for number, role in enumerate(roles)]
    effects = effects_of(change, edits)
    assert [edit.units[0] for edit in effects.top(10)] == [2, 0, 5]
    assert [edit.units[0] for edit in effects.top(1)] == [2]
    flat = effects_of(change, edits, gap=[1.0, -1.0, 0.0])
    with pytest.raises(UserError, match="no effect to rank by"):
        flat.top(1)


def test_tests_are_of_what_ran_and_is_no_control():
    effects = with_controls()
    own = [0, 5, 10]
    # no surer than as many equal signs as there are pairs
    p = [max(stats.ttest_1samp(effects.change[:, i], 0).pvalue, 2.0 ** (1 - len(effects.gap))) for i in own]
    q = effects.q_values()
    np.testing.assert_allclose(q[own], stats.false_discovery_control(p), rtol=1e-6)
    assert np.isnan(np.delete(q, own)).all()
    p_max = effects.p_max(draws=200)
    assert (p_max[own] <= 0.05).all()
    assert np.isnan(np.delete(p_max, own)).all()
    once = effects_of(
        [[1.0, 1.0], [1.1, 0.0], [0.9, 0.0]], effects.edits[::5][:2], [[True, True], [True, False], [True, False]]
    )
    assert np.isnan(once.p_max()).tolist() == [False, True]
    assert np.isnan(once.q_values()).all()  # three equal signs have p = 0.25


def test_rounding_is_no_effect():
    """Changes of 1e-6 that all go one way are a t value of any size; as a share of the gap they are nothing."""
    rounding = np.random.default_rng(0).normal(1e-6, 1e-7, 20)
    effects = effects_of(np.stack([rounding, rounding * 1e4], 1), [Edit(SITE, (0,)), Edit(SITE, (1,))])
    assert effects.q_values()[0] == 1.0 > 0.01 > effects.q_values()[1]
    assert effects.p_max()[0] == 1.0 > 0.01 > effects.p_max()[1]


def test_no_edits_at_all():
    effects = effects_of(np.zeros((3, 0)), [])
    assert effects.top(3) == []
    assert effects.rows("t") == []
    assert effects.q_values().shape == effects.p_max().shape == (0,)


def test_summary_names_intervals_controls_q_and_what_is_missing():
    effects = with_controls()
    lines = effects.summary().splitlines()
    assert re.split(" {2,}", lines[0]) == [
        "what",
        "at",
        "effect [95 % interval]",
        "random controls",
        "matched controls",
        "differs in",
        "q",
    ]
    assert len(lines) == 1 + 3 + 3  # what q assumes, what the controls' sets leave open, both runs
    for line, index in zip(lines[1:4], (0, 5, 10), strict=True):
        edit = effects.edits[index]
        assert line.startswith(f"{edit.site} {describe(edit)} ")
        assert str(effects.of(index)) in line
        assert line.endswith(f"{effects.q_values()[index]:.2g}")
        for role in ("random", "matched"):
            assert str(effects.controls(index, role) or "–") in line
    assert len({len(line) for line in lines[:4]}) == 1
    assert "denoise, logit_difference: 2.000 clean, 0.000 corrupted, 12 pairs (0 with a gap below 0.01)" in lines[-1]
    assert len(effects.summary(1).splitlines()) == 5
    alone = effects_of([[1.0], [1.2], [1.1]], [Edit(SITE, (4,), position=3)], gap=[2.0, 2.0, 0.0]).summary()
    assert "controls" not in alone
    assert "3 pairs (1 with a gap below 0.01)" in alone
    assert alone.splitlines()[1].split()[:3] == ["resid_post.1", "4", "3"]


def test_maps_lay_units_against_positions():
    edits = [Edit(SITE, (7,), position=at) for at in (1, 2, 5)] + [
        Edit(SITE, (9,), position=2),
        Edit(LATER, (7,), position=1),
    ]
    edits.append(Edit(SITE, (8,), position=2, role="random"))
    ran = np.ones((3, 6), dtype=bool)
    ran[:, 1] = False
    effects = effects_of([[0.2, 0.0, -2.0, 1.0, 0.4, 9.0]] * 3, edits, ran)
    found = effects.map()
    assert found.labels == ("resid_post.1 7", "resid_post.1 9", "resid_post.2 7")
    assert found.positions == (1, 2, 5)
    nan = np.nan
    np.testing.assert_allclose(found.values, [[0.1, nan, -1.0], [nan, 0.5, nan], [0.2, nan, nan]])
    largest = effects.map(2)  # by size, whichever way
    assert largest.labels == ("resid_post.1 7", "resid_post.1 9")
    np.testing.assert_allclose(largest.values, found.values[:2])
    with pytest.raises(UserError, match="sweep with each_position=True"):
        effects_of([[1.0]] * 2, [Edit(SITE, (1,))]).map()


def test_maps_of_sweeps():
    model = tiny_model()
    layers = patch_streams(model, PAIRS[:1]).map()
    assert layers.labels == ("resid_post.0", "resid_post.1", "resid_post.2")
    assert layers.positions == tuple(range(5, 12))  # before the first token that differs the runs are the same
    assert layers.values[-1, -1] == pytest.approx(1.0, abs=1e-4)  # the last layer at the last token is the answer
    assert np.abs(layers.values[-1, :-1]).max() < 1e-4
    heads = patch_heads(model, PAIRS[:1], each_position=True).map()
    assert heads.labels[0] == "z.0 0"
    assert heads.values.shape == (12, 7)
    one = patch_latents(model, random_dictionary(), PAIRS[:1], each_position=True)
    assert one.map(3).values.shape[0] == 3


def test_rows_name_the_tokens_at_their_positions():
    model, dictionary = tiny_model(), random_dictionary()
    effects = patch_latents(model, dictionary, PAIRS, each_position=True)
    tokens = [[model.tokenizer.decode(i) for i in model.encode(pair.clean)] for pair in PAIRS]
    rows = effects.rows("task", tokens)
    assert len(rows) == effects.ran.sum()
    texts = {pair.example: pair.clean for pair in PAIRS}
    for row in rows:
        assert row.token == texts[row.example][int(row.position) - 1]  # a BOS stands in front
        assert (row.task, row.component, row.direction, row.role) == ("task", "latent", "denoise", "single")
    assert {row.token for row in replace(effects, tokens=()).rows()} == {""}
    texts = {pair.example: pair.corrupted for pair in PAIRS}  # unless they are given, those of the edited prompt
    assert all(row.token == texts[row.example][int(row.position) - 1] for row in effects.rows())
    shifted = patch_latents(
        model, dictionary, [PromptPair("a cat sat", "the cow sat", "x", "y")], each_position=True, align="right"
    )
    tokens = [[model.tokenizer.decode(i) for i in model.encode("a cat sat")]]
    assert all(row.token == "a cat sat"[int(row.position)] for row in shifted.rows("t", tokens))
    assert min(int(row.position) for row in shifted.rows("t")) < -1


def test_rows_keep_given_groups_that_did_nothing_and_drop_single_latents_that_did():
    edits = [Edit(SITE, (1, 2), role="top"), Edit(SITE, (3,)), Edit(SITE, tuple(range(48)), role="every")]
    ran = np.array([[True, True, True], [False, False, True]])
    rows = effects_of([[1.0, 0.5, 2.0], [0.0, 0.0, 2.0]], edits, ran, gap=[2.0, 0.0]).rows("t")
    assert [(row.example, row.latent) for row in rows] == [
        ("e0", "1,2"), ("e0", "3"), ("e0", "all"), ("e1", "1,2"), ("e1", "all"),
    ]  # fmt: skip
    assert rows[0].effect == 0.5
    assert rows[0].patched - rows[0].corrupted == pytest.approx(1.0)
    assert np.isnan(rows[3].effect)  # no gap
    assert {row.position for row in rows} == {"all"}


def test_pairs_without_a_gap_are_counted():
    model, dictionary = tiny_model(), random_dictionary()
    same = PromptPair("same text", "same text", "x", "y", "same")
    effects = patch_latents(model, dictionary, [*PAIRS, same])
    assert effects.missing == 1
    assert not effects.ran[4].any()
    assert f"5 pairs (1 with a gap below {effects.min_gap})" in effects.summary()
    assert batch_pairs(model, [same]).clean.lengths.tolist() == [10]
    strict = patch_latents(model, dictionary, [*PAIRS, same], [(1,)], controls=0, min_gap=1e3)
    assert strict.missing == 5
    assert np.isnan(strict.normalised).all()


def test_an_edit_that_was_none_is_told_apart_from_one_without_effect():
    effects = with_controls()
    assert "nothing was patched" not in effects.summary()
    ran = effects.ran.copy()
    ran[:, 5] = False
    none = replace(effects, ran=ran)
    assert "differs in 0: " in none.summary()
    assert "differs in 0: " not in none.summary(1)  # one that is not shown


def test_rounding_is_a_share_of_the_size_of_the_gaps():
    """Gaps of 100, 100 and -100: rounding is 0.01, whatever way the gaps go."""
    change = np.array([[0.02, 0.009], [0.021, 0.0091], [0.019, 0.0089]] * 4)
    effects = effects_of(change, [Edit(SITE, (0,)), Edit(SITE, (1,))], gap=[100.0, 100.0, -100.0] * 4)
    assert effects.q_values()[0] < 0.01
    assert effects.q_values()[1] == 1.0
    assert [row.rounding for row in effects.rows()] == pytest.approx([0.01] * 24)  # in the metric's units
    assert [within_rounding(mean, 1e-4, effects) for mean in (0.0099, -0.0099, 0.011, 0.0)] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(("dtype", "share"), [("float32", 1e-4), ("bfloat16", 2e-2), ("float16", 2e-2)])
def test_rounding_follows_the_precision(dtype, share):
    model = tiny_model().hf.to(getattr(torch, dtype))
    assert precision_of(model) == (dtype, share)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    assert precision_of(model) == (f"{dtype} over int8 weights", share)


def test_the_first_parameter_does_not_stand_for_all():
    model = tiny_model().hf.to(torch.bfloat16)
    model.model.embed_tokens.float()
    assert next(model.parameters()).dtype == torch.float32
    assert precision_of(model) == ("bfloat16", 2e-2)
    model.float()
    model.model.norm.bfloat16()  # less than 1 % of the weights
    assert precision_of(model) == ("float32", 1e-4)


def test_controls_are_at_the_edits_own_site_position_and_kind():
    edits = [Edit(SITE, (1,)), Edit(SITE, (9,), role="random", beside=(1,))]
    others = [
        Edit(LATER, (9,), role="random", beside=(1,)),
        Edit(SITE, (9,), 3, role="random", beside=(1,)),
        Edit(SITE, (9,), kind="head", role="random", beside=(1,)),
    ]
    effects = effects_of(np.ones((4, 5)) * [1.0, 0.2, 9.0, 9.0, 9.0], [*edits, *others])
    assert effects.controls(0, "random").value == pytest.approx(0.1)


def test_rows_of_a_map_are_ranked_by_their_largest_effect():
    edits = [Edit(SITE, (unit,), position=at) for unit in (1, 2) for at in (1, 2)]
    found = effects_of([[0.5, 0.5, 0.1, 0.9]] * 3, edits).map(1)
    assert found.labels == ("resid_post.1 2",)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_rows_hold_both_runs_and_the_patched_metric(direction):
    effects = effects_of([[1.0], [2.0]], [Edit(SITE, (3,))], gap=[2.0, 4.0], direction=direction)
    for number, row in enumerate(effects.rows("t")):
        assert (row.clean, row.corrupted) == (effects.clean[number], effects.corrupted[number])
        assert row.patched == effects.patched[number, 0]
        assert row.effect == pytest.approx(0.5)
