"""The study of a real model: its pairs, its stages against the library called by hand, resuming, what is left out."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import random_dictionary, tiny_model

import saepatch as sp
from experiments.real import dictionaries, heads, study, tasks, tracing
from experiments.real.claims import verdict_of
from experiments.real.patching import direct_effects, patching
from experiments.real.settings import RealConfig
from saepatch.cli.parser import run_config
from saepatch.data.batches import batch_pairs
from saepatch.data.pairs import PromptPair
from saepatch.measure.attention import attention_patterns
from saepatch.measure.patching import patch_heads
from saepatch.model.loading import load_model
from saepatch.model.sites import Site
from saepatch.records.statistics import Interval

pytestmark = pytest.mark.whole

SHARED = Path(__file__).parents[3] / "shared"
STORIES = SHARED / "models" / "stories260K"
TEXTS = SHARED / "data" / "tinystories_1000.jsonl"
needs_stories = pytest.mark.skipif(
    not (STORIES / "config.json").is_file(), reason="the stories260K model is not beside this clone"
)
SMALL = ["--pairs", "8", "--group", "3", "--tokens", "4096", "--k", "8", "--verify", "6", "--sample", "6"]
PAIRS = [PromptPair(f"the {a} sat", f"the {b} sat", "x", "y", f"{a}{b}") for a, b in zip("abcdef", "ghijkl")]


def run(*arguments):
    return run_config(RealConfig, study.main, "real", [*SMALL, *arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    if not (STORIES / "config.json").is_file():
        pytest.skip("the stories260K model is not beside this clone")
    out = tmp_path_factory.mktemp("real")
    few = {name: tasks.TASKS[name] for name in ("pronouns", "greater_than")}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(study, "TASKS", few)
        assert run("--model", str(STORIES), "--data", str(TEXTS), "--out", str(out)) == 0
    return out


def test_every_task_makes_different_pairs_and_splits_share_no_prompt():
    for name, task in tasks.TASKS.items():
        splits = {}
        for split in tasks.SPLITS:
            pairs = [framed.pair for framed, _ in zip(task.candidates(split, 0), range(200))]
            assert all(pair.clean != pair.corrupted and pair.answer != pair.counter for pair in pairs), name
            splits[split] = {text for pair in pairs for text in (pair.clean, pair.corrupted)}
            assert len({pair.example for pair in pairs}) > 20
        assert not splits["select"] & splits["report"]
    for framed, _ in zip(tasks.greater_than_pairs("report", 0), range(50)):
        pair = framed.pair
        start = [int(text.split("year ")[1][2:4]) for text in (pair.clean, pair.corrupted)]
        later = [int(answer.ljust(2, "0")) for answer in (pair.answer, pair.counter)]
        assert later[0] > start[0]
        assert later[1] > start[1]
        assert min(later) < max(start)  # the earlier answer is wrong after the late year


@needs_stories
def test_a_small_run_says_what_does_not_apply(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert "pairs right" in summary["left_out"]["Greater-than"]
    assert "indirect objects" in summary["left_out"]["Roles of heads"]
    assert summary["accuracy"]["pronouns"]["report"][0] > 0.5
    assert summary["pairs"] == {"pronouns": {"select": 8, "report": 8}}
    assert {"load", "tasks", "patching", "dictionaries", "latents"} <= set(summary["seconds"])
    assert list(summary["dictionaries"]) == ["resid_post.1", "resid_post.2", "resid_post.4"]
    for quality in summary["dictionaries"].values():
        assert quality["held_out"]
        assert 0 <= quality["bos_share"] + quality["massive_share"] <= 1
    for site in summary["latents"]["pronouns"].values():
        assert {"1", "4", "16"} >= set(site["denoise"]) > set()
    assert "it needs the facts" in summary["left_out"]["Causal tracing"]
    assert {claim["verdict"] for claim in summary["claims"]} <= {"shown", "not shown", "the opposite is shown"}
    page = (finished / "report.html").read_text()
    assert "Greater-than" in page
    assert "Steering and restoration on a real model are not part" in page


@needs_stories
def test_figures_are_those_of_the_library(finished):
    summary = json.loads((finished / "summary.json").read_text())
    model = load_model(str(STORIES))
    fit = tasks.fitting(model, tasks.TASKS["pronouns"].candidates("report", 0), 16)
    metrics = tasks.pair_metrics(model, [framed.pair for framed in fit])
    pairs = [framed.pair for framed, right in zip(fit, metrics.right, strict=True) if right][:8]
    effects = patch_heads(model, pairs, direction="noise")
    by_hand = [effects.of(number).value for number in range(len(effects.edits))]
    assert [figure[0] for figure in summary["patching"]["heads"]["noise"].values()] == pytest.approx(by_hand, abs=1e-5)
    assert metrics.clean[metrics.right][:8] == pytest.approx(effects.clean, abs=1e-4)


@needs_stories
def test_a_finished_run_measures_nothing_again_and_another_is_refused(finished, monkeypatch, capsys):
    few = {name: tasks.TASKS[name] for name in ("pronouns", "greater_than")}
    monkeypatch.setattr(study, "TASKS", few)
    before = (finished / "summary.json").read_text()
    for name in ("patch_heads", "patch_streams", "patch_components"):
        monkeypatch.setattr(f"experiments.real.patching.{name}", lambda *_, **__: pytest.fail("measured again"))
    given = ["--model", str(STORIES), "--data", str(TEXTS), "--out", str(finished)]
    assert run(*given) == 0
    assert json.loads((finished / "summary.json").read_text())["claims"] == json.loads(before)["claims"]
    assert run(*given, "--seed", "1") == 2
    assert "seed" in capsys.readouterr().err


def test_direct_effects_are_those_of_the_residual_stream_alone():
    """A head's output at the last position goes through the projection and the final norm, and through nothing else."""
    model = tiny_model("gpt2")
    direct, total = direct_effects(model, PAIRS, "denoise"), patch_heads(model, PAIRS)
    assert [edit.units for edit in direct.edits] == [edit.units for edit in total.edits]
    batch = batch_pairs(model, PAIRS[:1])
    z, out = Site(1, "z"), Site(2, "resid_post")
    base, source = (model.capture(tokens, [z, out]) for tokens in (batch.corrupted, batch.clean))
    change = (source[z] - base[z])[:, -1:]
    change[..., 4:] = 0  # head 0 of layer 1, at the last position: the only one whose logits are read
    project = model.layout.module(z)
    moved = base[out][:, -1:] + project(change) - project(change * 0)
    logits = model.hf.lm_head(model.hf.transformer.ln_f(moved))[0, 0].detach()
    expected = float(logits[batch.answer[0]] - logits[batch.counter[0]])
    number = [(edit.site, edit.units) for edit in direct.edits].index((z, (0,)))
    assert direct.patched[0, number] == pytest.approx(expected, abs=1e-4)


def test_attention_patterns_are_the_models_own():
    model = tiny_model("gemma3_text")
    tokens = batch_pairs(model, PAIRS[:2]).clean
    model.hf.set_attn_implementation("eager")
    theirs = model.hf(input_ids=tokens.input_ids, output_attentions=True).attentions
    model.hf.set_attn_implementation("sdpa")
    ours = attention_patterns(model, tokens)
    for layer, pattern in enumerate(theirs):
        assert float((ours[layer] - pattern).abs().max()) < 1e-5


def test_attention_is_read_at_the_names():
    model = tiny_model("llama")
    (pair,) = [PromptPair("a b; b gave to", "a b; a gave to", "a", "b", "one")]
    attention = heads.head_attention(model, [pair])
    tokens = batch_pairs(model, [pair]).clean  # one token a character: BOS a _ b ; _ b …
    pattern = attention_patterns(model, tokens)
    assert attention.to_object.shape == (1, 12)
    assert attention.to_object[0, 5] == pytest.approx(float(pattern[1][0, 1, -1, 1]))
    assert attention.to_repeated[0, 5] == pytest.approx(float(pattern[1][0, 1, -1, 6]))
    assert attention.to_first[0, 5] == pytest.approx(float(pattern[1][0, 1, 6, 3]))


def test_roles_and_verdicts_follow_from_intervals():
    high, none, low = Interval(0.3, 0.2, 0.4, 20), Interval(0.0, -0.1, 0.1, 20), Interval(-0.3, -0.4, -0.2, 20)
    assert heads.role_of(high, high, high, none) == heads.MOVER
    assert heads.role_of(none, low, high, none) == heads.NEGATIVE
    assert heads.role_of(high, none, low, none) == heads.INHIBITION
    assert heads.role_of(high, none, none, high) == heads.DUPLICATE
    assert heads.role_of(high, high, none, none) == ""
    assert heads.role_of(Interval(0.01, 0.005, 0.02, 20), none, low, high) == ""
    assert [verdict_of(each) for each in (high, none, low)] == ["shown", "not shown", "the opposite is shown"]
    assert verdict_of(Interval.withheld(0.5, 3, "too few")) == "not shown"


def test_the_worked_example_on_indirect_objects():
    """Names of one token: the whole stage with roles, on a random model."""
    model = tiny_model("gpt2")
    pairs = [PromptPair(f"{a} {b}; {b} to", f"{a} {b}; {a} to", a, b, a + b) for a, b in zip("abcdefgh", "ijklmnop")]
    framed = [tasks.FramedPair(pair, "one") for pair in pairs]
    task = tasks.TaskPairs("ioi", {"select": framed, "report": framed}, {})

    patched = patching(model, {"ioi": task}, 4, 0, Unkept())
    assert len(patched.roles) == 12
    assert patched.maps["ioi"].pairs == 4
    assert np.isclose(patched.roles[3].total.value, patched.heads["denoise"].of(3).value)
    assert [edit.role for edit in patched.together["noise"].edits] == ["top"] + ["random"] * 5


class Unkept:
    def get(self, name, kind, measure):
        return measure()


FACTS = [PromptPair(f"the {a}{b} is in", f"the {b}{a} is in", "x", "y", f"{a}{b}") for a, b in zip("abcdfg", "jklmop")]


def test_tracing_restores_windows_by_hand():
    model = tiny_model("llama")
    task = tasks.TaskPairs("facts", {"report": [tasks.FramedPair(pair, "the {s} is in") for pair in FACTS]}, {})
    traced = tracing.trace(model, task, 6, 2, 0, Unkept())
    assert traced.pairs == 6
    assert traced.subject == (5, 6)  # after BOS and "the "
    noise = sp.GaussianNoise((5, 6), samples=2)
    for name, corruption in ((tracing.TOKENS, None), (tracing.NOISE, noise)):
        by_hand = sp.patch_streams(model, FACTS, "mlp_out", each_position=True, corruption=corruption)
        numbers = [by_hand.edits.index(edit) for edit in traced.mlps[name].edits]
        assert np.allclose(traced.mlps[name].patched, by_hand.patched[:, numbers], atol=1e-4)
    mlps = traced.mlps[tracing.TOKENS]
    early = [i for i, edit in enumerate(mlps.edits) if edit.position == 6 and edit.site.layer < 2]
    assert np.allclose(tracing.early_mlps(traced, tracing.TOKENS, 6), mlps.change[:, early].mean(1))
    assert np.isfinite(tracing.noise_over_tokens(traced).value)


def test_given_dictionaries_are_measured_where_training_did_not(tmp_path):
    model, dictionary = tiny_model("llama"), random_dictionary()
    (tmp_path / "texts.txt").write_text("a text of some words\n" * 4)
    quality = dictionaries.dictionary_quality(model, dictionary, str(tmp_path / "texts.txt"))
    expected = sp.splice_quality(model, dictionary, model.tokenize(["a text of some words"] * 4))
    assert not quality.held_out
    assert (quality.fvu, quality.ce_recovered) == pytest.approx((expected.fvu, expected.ce_recovered), rel=1e-4)
    assert quality.massive_tokens == 0
    assert quality.fvu_others == pytest.approx(quality.fvu, rel=1e-4)
    assert 0 < quality.bos_share < 1


def test_latents_and_attribution_are_those_of_the_library():
    model, dictionary = tiny_model("llama"), random_dictionary()
    curve = dictionaries.latent_curve(model, dictionary, PAIRS, PAIRS, 0, "noise")
    estimates = sp.attribute(model, dictionary, PAIRS, direction="noise")
    best = next(edit for edit in estimates.top(5, each_position=False) if edit.kind == "latent")
    by_hand = sp.patch_latents(model, dictionary, PAIRS, [best.units[0]], controls=0, direction="noise")
    assert curve.top[0].value == pytest.approx(by_hand.of(0).value, abs=1e-5)
    verified = sp.attribute(model, dictionary, PAIRS, verify=20, sample=20)
    figure = dictionaries.pearson_over_pairs(verified)
    assert figure.value == pytest.approx(verified.verified.pearson())
    assert figure.low <= figure.value <= figure.high
    assert figure.n == 6


def test_no_texts_and_no_dictionaries():
    with pytest.raises(sp.UserError, match=r"give --data TEXTS.jsonl, or --sae FOLDER"):
        dictionaries.train_dictionaries(RealConfig("m"), tiny_model("gpt2"))
    with pytest.raises(sp.UserError, match="samples = 0: use at least 1"):
        RealConfig("m", samples=0)
