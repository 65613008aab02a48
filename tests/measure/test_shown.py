"""Results as notebooks show them, and as frames: on a tiny model."""

import numpy as np
import pytest
from tiny import random_dictionary, random_sae, tiny_model

import saepatch as sp
from saepatch.circuits.circuit import TARGET, Circuit
from saepatch.circuits.nodes import Edge, Node
from saepatch.data.pairs import PromptPair
from saepatch.engine.components import Heads
from saepatch.engine.options import SweepOptions
from saepatch.errors import UserError
from saepatch.measure.attribution import attribute
from saepatch.measure.patching import patch_heads, patch_latents
from saepatch.measure.quality import splice_quality
from saepatch.model.sites import Site

PAIRS = [
    PromptPair("the cat sat", "the dog sat", "x", "y", "a"),
    PromptPair("the bat ran", "the hen ran", "p", "q", "b"),
    PromptPair("one big tree", "one red tree", "p", "q", "c"),
    PromptPair("the cow ran", "the pig ran", "m", "n", "d"),
    PromptPair("the ape sat", "the cod sat", "m", "n", "e"),
    PromptPair("the owl sat", "the ant sat", "r", "s", "f"),
]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def effects(model):
    return patch_latents(model, random_dictionary(), PAIRS, [[1, 2], 3], controls=2, min_gap=1e-3)


@pytest.fixture(scope="module")
def by_position(model):
    return patch_latents(model, random_dictionary(), PAIRS, each_position=True)


@pytest.fixture(scope="module")
def screen(model):
    return attribute(model, random_dictionary(), PAIRS, verify=4, sample=3)


def lines(value):
    return repr(value).splitlines()


def test_results_show_themselves_in_few_lines(model, effects, by_position, screen):
    dictionary = random_dictionary()
    node = Node(Site(1), 3, 4)
    circuit = Circuit.of_edges([(Edge(node, TARGET), 0.5)], {node: 0.25})
    quality = splice_quality(model, dictionary, ["the cat sat", "one big tree"])
    results = [effects, by_position, screen, circuit, quality, by_position.map(3), effects.plot(), screen.plot()]
    for value in [*results, patch_heads(model, PAIRS).plot(), by_position.plot()]:
        assert 1 <= len(lines(value)) <= 10
        assert max(map(len, lines(value))) < 250
        assert 1_000 < len(value._repr_html_()) < 60_000
    assert repr(model) == "LanguageModel('tiny-llama': llama, 3 layers, width 16, float32, cpu)"
    assert repr(dictionary) == "Dictionary('random topk' at resid_post.1: topk, 48 latents of width 16)"
    assert repr(effects).startswith(
        "Effects of 2 edits on 6 pairs (denoise, logit_difference, positions all)\nlargest: "
    )
    assert repr(circuit) == "Circuit of 2 nodes and 1 edges\nstrongest: resid_post.1 latent 3 at 4 → logits (0.500)"


def test_the_frame_of_effects_has_a_row_for_every_edit_with_what_the_summary_says(effects):
    frame = effects.to_frame()
    assert frame.dtypes.astype(str).to_dict() == {
        **dict.fromkeys(["site", "component", "units", "role", "token", "direction", "metric"], "string"),
        **dict.fromkeys(["latent", "position", "pairs_changed"], "Int64"),
        **dict.fromkeys(["ratio_of_means", "low", "high", "mean_change", "q"], "float64"),
        "why_no_interval": "string",
        "within_rounding": "bool",
    }
    assert "effect" not in frame  # nobody is to average it
    assert frame.attrs["pairs"] == 6
    for i, row in enumerate(frame.itertuples()):
        interval = effects.of(i)
        np.testing.assert_array_equal([row.ratio_of_means, row.low, row.high], interval.as_list())
        assert (row.why_no_interval if interval.reason else "") == interval.reason
    np.testing.assert_array_equal(frame["q"], effects.q_values())
    assert frame["latent"].isna().tolist() == [len(edit.units) != 1 for edit in effects.edits]
    assert frame["position"].isna().all()
    assert effects.to_frame(intervals=False).columns.isin(["low", "high"]).sum() == 0


def test_frames_name_positions_as_numbers_and_tokens_of_the_edited_prompt(by_position):
    frame, rows = by_position.to_frame(), by_position.to_pandas("pets")
    for i, row in enumerate(frame.itertuples()):
        pairs = np.flatnonzero(by_position.ran[:, i])
        texts = {PAIRS[pair].corrupted[row.position - 1] for pair in pairs}  # a BOS stands in front
        assert row.token == (texts.pop() if len(texts) == 1 else "…")
    assert (frame["token"] == "…").any()
    assert len(rows) == by_position.ran.sum()
    total = rows.groupby(["latent", "position"])["change"].sum() / len(PAIRS)
    expected = frame.set_index(["latent", "position"])["mean_change"]
    np.testing.assert_allclose(total, expected.loc[total.index])
    assert all(PAIRS[row.pair].corrupted[row.position - 1] == row.token for row in rows.itertuples())
    assert set(rows["task"]) == {"pets"}
    assert [row.token for row in by_position.rows()] == rows["token"].tolist()


def test_the_frames_of_a_screen_agree_with_it(screen):
    frame, nodes = screen.to_frame(), screen.to_pandas()
    edits, mean = screen.means()
    known = {(str(e.site), e.kind, e.units[0], e.position): value for e, value in zip(edits, mean)}
    for row in frame.itertuples():
        unit = 0 if row.component == "error" else row.latent
        assert known[row.site, row.component, unit, row.position] == row.mean_estimate
    assert frame["mean_estimate"].abs().is_monotonic_decreasing
    assert len(nodes) == len(screen)
    assert nodes["verified"].value_counts().to_dict() == {"top": 4, "random": 3}
    run = nodes.loc[screen.verified.index]
    np.testing.assert_array_equal(run["exact"], screen.verified.exact)
    assert frame.merge(screen.to_frame(each_position=False), on=["component", "latent"]).shape[0] == len(frame)
    assert "position" not in screen.to_frame(each_position=False)


def test_a_map_has_tokens_and_is_saved(by_position, tmp_path):
    drawn = by_position.map(3)
    assert len(drawn.tokens) == len(drawn.positions)
    assert set(drawn.tokens) - {"…"} <= set("abcdefghijklmnopqrstuvwxyz ")
    assert drawn.plot().chart.columns[-1].split()[0] == str(drawn.positions[-1])
    assert "resid_post.1" in drawn.save(tmp_path / "map.svg").read_text(encoding="utf-8")
    with pytest.raises(UserError, match=r"in \.svg"):
        drawn.save(tmp_path / "map.pdf")


def test_results_write_pages_of_their_own(effects, screen, tmp_path):
    for name, result in {"effects": effects, "screen": screen}.items():
        page = result.report(str(tmp_path / f"{name}.html")).read_text(encoding="utf-8")
        assert result.title in page
        assert "<figure" in page


def test_long_lists_of_units_are_shortened_with_their_number(model):
    effects = patch_latents(model, random_dictionary(), PAIRS, [range(40), [1, 2]], controls=0)
    units = {row[1] for row in effects.blocks()[1].rows}
    assert units == {"0,1,2,3,4,5,6,7,8,9,10,11,12,… (40)", "1,2"}


def test_equal_runs_are_shown_without_effects(model):
    same = [PromptPair("the cat", "the cat", "x", "y", str(i)) for i in range(3)]
    effects = patch_latents(model, random_dictionary(), same, [[1]], controls=0)
    assert "largest" not in repr(effects)
    assert "there are no effects to rank" in effects._repr_html_()
    assert effects.to_frame()["ratio_of_means"].isna().all()
    with pytest.raises(UserError, match="verify=50"):
        attribute(model, random_dictionary(), PAIRS[:1]).plot()


def test_a_metric_may_be_given_by_name(model):
    named = patch_latents(model, random_dictionary(), PAIRS[:1], [[1]], controls=0, metric="probability")
    assert named.metric == "probability"
    screen = attribute(model, random_dictionary(), PAIRS[:1], metric="log_probability")
    assert screen.metric == "log_probability"
    with pytest.raises(UserError, match="unknown metric 'probabilty': use one of"):
        patch_latents(model, random_dictionary(), PAIRS[:1], metric="probabilty")
    with pytest.raises(UserError, match="is a int: give a function"):
        SweepOptions(metric=3)


def test_results_on_circuits_are_a_few_lines(model):
    sites = [random_dictionary(f"resid_post.{layer}") for layer in (0, 1)]
    found = [
        sp.edges(model, sites, PAIRS[:2], sp.EdgeOptions(verify=2)),
        sp.direct_attribution(model, sites[1:], PAIRS[:2]),
        sp.self_repair(model, Heads(0, model.n_heads), 1, PAIRS),
        sp.scrub(
            model, [sp.HypothesisNode(Heads(0, model.n_heads), len, position=-1)], ["abc", "abd", "bcd"], [1, 2, 3]
        ),
    ]
    for value, kind in zip(found, ("Edges", "DirectAttribution", "SelfRepair", "Scrubbed"), strict=True):
        assert repr(value).startswith(kind)
        assert 1 < len(lines(value)) <= 10
        assert max(map(len, lines(value))) < 300
    edge, mean = found[0].top(1)[0]
    assert f"{edge} ({mean:.3g})" in repr(found[0])


def test_the_saes_of_sae_lens_are_taken_as_they_are(model):
    sae, dictionary = random_sae(), random_dictionary()
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    sae.load_state_dict(dictionary.sae.state_dict())
    for run in (patch_latents, attribute):
        theirs, ours = (run(model, given, PAIRS).to_pandas() for given in (sae, dictionary))
        assert theirs.equals(ours)
    with pytest.raises(UserError, match="names no site"):
        patch_latents(model, random_sae(), PAIRS)
