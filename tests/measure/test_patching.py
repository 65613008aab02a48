"""The sweep against one plain hooked forward an edit, and its arithmetic against definitions."""

import numpy as np
import pytest
import torch
from tiny import FAMILIES, random_dictionary, tiny_model

from saepatch.data.batches import batch_pairs
from saepatch.data.pairs import PromptPair
from saepatch.engine.components import Edit
from saepatch.engine.metrics import DeclaredMetric, kl_divergence, log_probability, logit_difference
from saepatch.errors import UserError
from saepatch.measure.controls import DRAWS, control_sets, differing_sets, with_controls
from saepatch.measure.curves import PairRanking, effect_curve, effect_curve_by_pair
from saepatch.measure.patching import patch_by_pair, patch_components, patch_latents
from saepatch.measure.quality import LatentStatistics, latent_statistics
from saepatch.records.statistics import bootstrap_ratio
from saepatch.splicing.interventions import Patch
from saepatch.splicing.splice import record_latents, splice

PAIRS = [
    PromptPair("the cat sat", "the dog sat", "x", "y", "a"),
    PromptPair("one big tree", "one red tree", "p", "q", "b"),
    PromptPair("abc", "abd", "r", "s", "c"),
    PromptPair("the cow ran", "the pig ran", "m", "n", "d"),
]


def plain_forward(model, dictionary, pair, group, direction, where=slice(1, None), metric=logit_difference):
    """One pair, one edit, one forward with a bare torch hook."""
    batch = batch_pairs(model, [pair])
    base, source = (batch.corrupted, batch.clean) if direction == "denoise" else (batch.clean, batch.corrupted)
    change = record_latents(model, dictionary, source).acts - record_latents(model, dictionary, base).acts
    delta = torch.zeros(1, base.input_ids.shape[1], model.d_model)
    for latent in group:
        delta[:, where] += change[:, where, latent, None] * dictionary.W_dec[latent]

    def hook(_module, _args, output):
        return (output[0] + delta, *output[1:]) if isinstance(output, tuple) else output + delta

    handle = model.layout.blocks[dictionary.site.layer].register_forward_hook(hook)
    try:
        logits = model.hf(input_ids=base.input_ids).logits[:, -1]
    finally:
        handle.remove()
    return float(metric(logits, batch))


@pytest.mark.parametrize(  # types are checked for one family: that takes three times as long
    "family", [pytest.param(name, marks=() if name == "llama" else pytest.mark.whole) for name in FAMILIES]
)
@pytest.mark.parametrize("layer", [0, 2])
def test_sweep_equals_one_plain_forward_an_edit(family, layer):
    model, dictionary = tiny_model(family), random_dictionary(f"resid_post.{layer}")
    groups = [(3,), (5,), (1, 2, 7), tuple(range(48))]
    for direction in ("denoise", "noise"):
        effects = patch_latents(model, dictionary, PAIRS, groups, direction=direction, batch_size=3, controls=0)
        assert effects.ran.any()
        for row, pair in enumerate(PAIRS):
            for column, group in enumerate(groups):
                expected = plain_forward(model, dictionary, pair, group, direction)
                assert abs(effects.patched[row, column] - expected) <= 2e-5, (pair.example, group)


@pytest.mark.parametrize("site", ["resid_pre.0", "resid_pre.2", "mlp_out.1", "attn_out.1"])
def test_other_streams(site):
    """All latents and no error term left over: patching a whole stream with the clean run's."""
    model, dictionary = tiny_model(), random_dictionary(site)
    effects = patch_latents(model, dictionary, PAIRS, [tuple(range(48))], controls=0)
    for row, pair in enumerate(PAIRS):
        batch = batch_pairs(model, [pair])
        with splice(model, dictionary, Patch(record_latents(model, dictionary, batch.clean))):
            expected = float(logit_difference(model.next_logits(batch.corrupted), batch))
        assert abs(effects.patched[row, 0] - expected) <= 2e-5


def test_positions_restrict_the_edit():
    model, dictionary = tiny_model(), random_dictionary()
    everything = [tuple(range(48))]
    last = patch_latents(model, dictionary, PAIRS, everything, positions="last", controls=0)
    for row, pair in enumerate(PAIRS):
        expected = plain_forward(model, dictionary, pair, everything[0], "denoise", where=slice(-1, None))
        assert abs(last.patched[row, 0] - expected) <= 2e-5
    assert np.abs(last.patched - patch_latents(model, dictionary, PAIRS, everything, controls=0).patched).max() > 1e-3


def test_every_latent_alone_counts_the_ones_that_do_not_differ_as_no_effect():
    model, dictionary = tiny_model(), random_dictionary()
    effects = patch_latents(model, dictionary, PAIRS)
    assert effects.patched.shape == (4, 48)
    assert 0 < effects.ran.sum() < effects.ran.size
    still = ~effects.ran
    assert np.array_equal(effects.change[still], np.zeros(still.sum()))
    expected = (effects.patched - effects.corrupted[:, None]).mean(0) / (effects.clean - effects.corrupted).mean()
    np.testing.assert_allclose(effects.ratios(), expected)
    best = effects.top(5)
    assert [effects.edits.index(e) for e in best] == list(np.argsort(-expected, kind="stable")[:5])
    assert len(effects.rows("task")) == effects.ran.sum()


def test_prompts_aligned_from_the_right():
    """Only columns where both prompts have an ordinary token are patched; the sweep and the splice agree on them."""
    model, dictionary = tiny_model(), random_dictionary()
    pairs = [PromptPair("a cat sat", "the horse sat", "x", "y"), PromptPair("abcdef", "abc", "x", "y")]
    effects = patch_latents(model, dictionary, pairs, [tuple(range(48))], controls=0, align="right")
    batch = batch_pairs(model, pairs, align="right")
    with splice(model, dictionary, Patch(record_latents(model, dictionary, batch.clean))):
        whole = logit_difference(model.next_logits(batch.corrupted), batch)
    np.testing.assert_allclose(effects.patched[:, 0], whole.numpy(), atol=2e-5)
    clean, corrupted = (record_latents(model, dictionary, t).acts for t in (batch.clean, batch.corrupted))
    change = clean - corrupted
    for row, shared in ((0, 9), (1, 3)):  # the shorter prompt's ordinary tokens; its BOS is against a letter
        change[row, : change.shape[1] - shared] = 0

    def hook(_module, _args, output):
        return output + change @ dictionary.W_dec

    handle = model.layout.blocks[1].register_forward_hook(hook)
    try:
        by_hand = logit_difference(model.next_logits(batch.corrupted), batch)
    finally:
        handle.remove()
    np.testing.assert_allclose(effects.patched[:, 0], by_hand.numpy(), atol=2e-5)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_edits_by_pair_are_those_of_each_pair_alone(direction):
    model, dictionary = tiny_model(), random_dictionary()
    edits = [[Edit(dictionary.site, (3, 7))], [Edit(dictionary.site, (5,)), Edit(dictionary.site, (1, 2))]]
    together = patch_by_pair(model, dictionary, PAIRS[:2], edits, direction=direction)
    for pair, own, effects in zip(PAIRS, edits, together):
        alone = patch_components(model, dictionary, [pair], own, direction=direction)
        np.testing.assert_allclose(effects.patched, alone.patched, atol=1e-5)
        np.testing.assert_allclose(effects.change, alone.change, atol=1e-5)


def test_controls_count_at_every_position_where_their_group_acts():
    """Also where a control changes nothing: its effect there is 0, not missing."""
    effects = patch_latents(tiny_model(), random_dictionary(), PAIRS, [(3, 7, 9)], controls=3, each_position=True)
    given = effects.where("given")
    assert len(given) > 3
    assert not effects.ran[:, effects.where("random")].any(0).all()
    assert {effects.control_sets(i, role) for i in given for role in ("random", "matched")} == {3}


def test_batch_size_and_order_of_pairs_change_nothing():
    model, dictionary = tiny_model(), random_dictionary()
    whole = patch_latents(model, dictionary, PAIRS)
    small = patch_latents(model, dictionary, PAIRS[::-1], batch_size=1)
    np.testing.assert_allclose(whole.patched, small.patched[::-1], atol=2e-5)
    np.testing.assert_allclose(whole.clean, small.clean[::-1], atol=2e-5)
    assert small.examples == whole.examples[::-1]


def test_effects_are_normalised_by_definition_and_small_gaps_are_missing():
    model, dictionary = tiny_model(), random_dictionary()
    same = PromptPair("same text", "same text", "x", "y", "no gap")
    for direction, sign in (("denoise", 1), ("noise", -1)):
        effects = patch_latents(model, dictionary, [*PAIRS, same], [tuple(range(48))], controls=0, direction=direction)
        base = effects.corrupted if direction == "denoise" else effects.clean
        expected = sign * (effects.patched[:4, 0] - base[:4]) / (effects.clean - effects.corrupted)[:4]
        np.testing.assert_allclose(effects.normalised[:4, 0], expected)
        assert np.isnan(effects.normalised[4, 0])
        assert effects.missing == 1
        assert effects.mean_of_ratios(0).n == 4
        assert effects.of(0).n == 5
        row = effects.rows("t")[0]
        assert row.direction == direction
        assert row.effect == pytest.approx(effects.normalised[0, 0])


def test_pairs_without_any_gap_are_not_ranked():
    model, dictionary = tiny_model(), random_dictionary()
    same = [PromptPair("same text", "same text", "x", "y")]
    with pytest.raises(UserError, match="no effect to rank by"):
        patch_latents(model, dictionary, same).top(3)


def test_other_metrics_and_bad_input():
    model, dictionary = tiny_model(), random_dictionary()
    effects = patch_latents(model, dictionary, PAIRS, [(3, 4)], metric=log_probability, controls=0)
    assert effects.metric == "log_probability"
    assert (effects.clean < 0).all()
    for bad, complaint in [([48], "latent 48 is out of range"), ([], "no latents"), ([()], "no latents")]:
        with pytest.raises(UserError, match=complaint):
            patch_latents(model, dictionary, PAIRS, bad)
    with pytest.raises(UserError, match="width 12"):
        patch_latents(model, random_dictionary(d_in=12), PAIRS, [1])


def test_curve_has_controls_of_the_same_size_that_share_no_latent_with_the_top():
    model, dictionary = tiny_model(), random_dictionary()
    tokens = model.tokenize(
        [p.clean for p in PAIRS] + ["many other texts, to wake more latents", "zyxwvutsrq 0123456789"]
    )
    stats = latent_statistics(model, dictionary, tokens)
    ranking = [edit.units[0] for edit in patch_latents(model, dictionary, PAIRS).top(8)]
    curve = effect_curve(model, dictionary, PAIRS, ranking, (1, 4, 8), stats)
    roles = [edit.role for edit in curve.effects[0].edits]
    assert {role: roles.count(role) for role in set(roles)} == {"every": 1, "top": 3, "random": 15, "matched": 15}
    for number, k in enumerate((1, 4, 8)):
        for role in ("random", "matched"):
            mine = [edit.units for edit in curve.effects[0].edits if edit.role == role][number * DRAWS :][:DRAWS]
            for control in mine:
                assert len(set(control)) == k
                assert not set(control) & set(ranking[:k])
                assert all(stats.alive[latent] for latent in control)
    alone = patch_latents(model, dictionary, PAIRS, [tuple(ranking[:4])], controls=0)
    assert curve.top[1].value == pytest.approx(alone.of(0).value, abs=1e-6)


def test_the_seed_of_a_curve_is_that_of_its_intervals(monkeypatch):
    seeds = set()
    noting = lambda *given, seed: seeds.add(seed) or bootstrap_ratio(*given, seed=seed)  # noqa: E731
    monkeypatch.setattr("saepatch.measure.curves.bootstrap_ratio", noting)
    model, dictionary = tiny_model(), random_dictionary()
    stats = latent_statistics(model, dictionary, model.tokenize([pair.clean for pair in PAIRS]))
    effect_curve(model, dictionary, PAIRS, [1, 2], (1, 2), stats, seed=5)
    assert seeds == {5}


def test_matched_controls_fire_and_write_like_the_top_set():
    """Against statistics made by hand: matching by either alone, or by neither, would not keep within these bounds."""
    generator = torch.Generator().manual_seed(0)
    frequency = torch.rand(400, generator=generator)
    mean = torch.rand(400, generator=generator)
    stats = LatentStatistics(frequency, mean, mean, mean, torch.ones(400), mean, mean, 1000)
    chosen = list(range(8))
    random, matched = control_sets(chosen, 8, stats, seed=3)
    assert len(random) == len(matched) == DRAWS
    assert control_sets(chosen, 8, stats, seed=4)[1] != matched
    ones = torch.ones(400)
    # what latents write is their mean times their row's norm
    assert (
        control_sets(chosen, 8, LatentStatistics(frequency, ones, ones, ones, mean, ones, ones, 1000), seed=3)[1]
        == matched
    )

    def gap(sets, values):
        return float(np.mean([(values[list(s)] - values[chosen]).abs().mean() for s in sets]))

    for values in (frequency, mean):
        assert gap(matched, values) < 0.12 < 0.2 < gap(random, values)


def test_differing_controls_differ_and_leave_the_top_out():
    differs = np.zeros(48, dtype=bool)
    differs[:10] = True
    for drawn in differing_sets([0, 1, 2, 3], 4, differs):
        assert len(set(drawn)) == 4
        assert set(drawn) <= set(range(4, 10))
    assert all(len(drawn) == 2 for drawn in differing_sets(list(range(8)), 8, differs))  # only two are left
    assert all(set(drawn) == {8, 9} for drawn in differing_sets(list(range(10)), 8, differs))  # ranked, but not chosen
    assert all(not differs[list(drawn)].any() for drawn in differing_sets(list(range(10)), 10, differs))


def test_controls_follow_the_seed_and_may_be_all_that_is_left():
    model, dictionary = tiny_model(), random_dictionary()
    texts = [text for pair in PAIRS for text in (pair.clean, pair.corrupted)]
    alive = latent_statistics(model, dictionary, model.tokenize(texts)).alive.nonzero().flatten().tolist()
    dead = sorted(set(range(48)) - set(alive))
    half = len(alive) // 2
    ids = (*alive[:half], *dead[: len(alive) % 2])  # as many as live latents are left
    edits = with_controls(model, [dictionary], PAIRS, [{dictionary.site: ids}], 2, 0)
    assert [edit.role for edit in edits] == ["given", "random", "random", "matched", "matched"]
    assert edits[1].units == tuple(alive[half:])
    drawn = [with_controls(model, [dictionary], PAIRS, [{dictionary.site: ids[:3]}], 2, seed)[1:3] for seed in (0, 1)]
    assert drawn[0] != drawn[1]


def test_curve_by_pair_is_each_pair_with_its_own_ranking():
    model, dictionary = tiny_model(), random_dictionary()
    stats = latent_statistics(model, dictionary, model.tokenize([p.clean for p in PAIRS] + ["zyxwvutsrq 0123456789"]))
    singles = patch_latents(model, dictionary, PAIRS)
    rankings = [np.argsort(-row, kind="stable").tolist() for row in singles.change]
    by_pair = [PairRanking(*each) for each in zip(rankings, singles.ran, strict=True)]
    curve = effect_curve_by_pair(model, dictionary, PAIRS, by_pair, (1, 3), stats)
    gap = singles.gap.sum()
    assert curve.top[0].value == pytest.approx(singles.change.max(1).sum() / gap, abs=1e-5)
    three = [
        patch_latents(model, dictionary, [p], [tuple(r[:3])], controls=0).change[0, 0]
        for p, r in zip(PAIRS, rankings, strict=True)
    ]
    assert curve.top[1].value == pytest.approx(sum(three) / gap, abs=1e-5)
    assert curve.differing is not None
    rows = [row for one in curve.effects for row in one.rows("t")]
    assert len([row for row in rows if row.role == "top"]) == 2 * len(PAIRS)
    assert {row.latent for row in rows if row.role == "every"} == {"all"}


def test_curves_are_means_over_draws_that_follow_the_seed_and_the_pair():
    model, dictionary = tiny_model(), random_dictionary()
    stats = latent_statistics(model, dictionary, model.tokenize([p.clean for p in PAIRS] + ["zyxwvutsrq 0123456789"]))
    singles = patch_latents(model, dictionary, PAIRS[:2])
    ranking = np.argsort(-singles.change[0], kind="stable").tolist()
    curves = [effect_curve(model, dictionary, PAIRS[:2], ranking, (2,), stats, seed=seed) for seed in (0, 1)]
    for seed, curve in enumerate(curves):
        effects = curve.effects[0]
        for role in ("top", "random", "matched", "every"):
            change = effects.change[:, effects.where(role)].mean(1)
            of_role = getattr(curve, role)
            expected = bootstrap_ratio(change, effects.gap, seed=seed)
            assert (of_role if role == "every" else of_role[0]) == expected
    sets = [[effects.edits[i].units for i in effects.where("random")] for (effects,) in (c.effects for c in curves)]
    assert sets[0] != sets[1]
    by_pair = [PairRanking(ranking, singles.ran.any(0))] * 2
    for role in ("random", "differing"):
        drawn = []
        for seed in (0, 1):
            curve = effect_curve_by_pair(model, dictionary, PAIRS[:2], by_pair, (2,), stats, seed)
            drawn.append([[each.edits[i].units for i in each.where(role)] for each in curve.effects])
        assert drawn[0][0] != drawn[0][1]  # two pairs
        assert drawn[0][0] != drawn[1][0]  # two seeds
        assert drawn[0][1] == drawn[1][0]  # a pair's seed is the curve's and its number


def literal_kl(model, pair, logits):
    """sum over the vocabulary of p log(p / q), p the clean prompt's next-token distribution."""
    clean = model.hf(input_ids=batch_pairs(model, [pair]).clean.input_ids).logits[0, -1]
    p, q = (torch.softmax(each.double(), -1) for each in (clean, logits))
    return (p * (p / q).log()).sum()


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_kl_from_the_clean_run_equals_plain_hooks_and_its_formula(direction):
    model, dictionary = tiny_model(), random_dictionary()
    groups = [(3,), (1, 2, 7), tuple(range(48))]
    options = {"direction": direction, "controls": 0, "batch_size": 3}
    effects = patch_latents(model, dictionary, PAIRS, groups, metric=kl_divergence(), **options)
    assert effects.metric == "kl_divergence"
    np.testing.assert_allclose(effects.clean, 0, atol=1e-10)
    for row, pair in enumerate(PAIRS):
        corrupted = model.hf(input_ids=batch_pairs(model, [pair]).corrupted.input_ids).logits[0, -1]
        between = float(literal_kl(model, pair, corrupted).detach())
        assert effects.corrupted[row] == pytest.approx(between, rel=1e-4, abs=1e-9)
        for column, group in enumerate(groups):
            expected = plain_forward(
                model,
                dictionary,
                pair,
                group,
                direction,
                metric=lambda logits, _, p=pair: literal_kl(model, p, logits[0]),
            )
            assert effects.patched[row, column] == pytest.approx(expected, rel=1e-3, abs=1e-8)
            share = (between - expected if direction == "denoise" else expected) / between
            moved = effects.change[row, column] / effects.gap[row]
            assert moved == pytest.approx(share, rel=1e-3, abs=1e-4)
    alone = patch_latents(model, dictionary, PAIRS[2:3], groups, metric=kl_divergence(), **options)  # rows of their own
    np.testing.assert_allclose(alone.patched[0], effects.patched[2], rtol=1e-4, atol=1e-9)


def test_metrics_of_ones_own_are_told_what_they_declare():
    model, dictionary = tiny_model(), random_dictionary()

    def further(logits, batch):
        assert batch.clean_logits.shape == logits.shape
        return (logits - batch.clean_logits).abs().sum(-1)

    def bare(logits, batch):
        assert batch.clean_logits is None
        return logits[:, 0]

    effects = patch_latents(
        model, dictionary, PAIRS, [(3,)], controls=0, metric=DeclaredMetric(further, clean_logits=True)
    )
    assert (effects.clean == 0).all()
    assert (effects.corrupted > 0).all()
    assert effects.metric == "test_metrics_of_ones_own_are_told_what_they_declare"
    patch_latents(model, dictionary, PAIRS, [(3,)], controls=0, metric=bare)
    whole = patch_latents(model, dictionary, PAIRS, [(3,), (1, 2)], controls=0, metric=logit_difference.function)
    few = patch_latents(model, dictionary, PAIRS, [(3,), (1, 2)], controls=0)
    np.testing.assert_allclose(whole.patched, few.patched, atol=1e-5)
