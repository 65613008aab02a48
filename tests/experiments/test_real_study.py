"""The study of a real model: its pairs, its stages against the library called by hand, resuming, what is left out."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import random_dictionary, tiny_model

import saepatch as sp
from experiments.pairs import question
from experiments.real import study
from experiments.real.claims import Claim, OtherRun, verdict_of
from experiments.real.settings import RealConfig
from experiments.real.stages import dictionaries, heads, restoration, steering, tasks, texts, tracing
from experiments.real.stages.patching import direct_effects, patching
from saepatch.cli.parser import run_config
from saepatch.data.batches import batch_pairs
from saepatch.data.pairs import PromptPair
from saepatch.measure.attention import attention_patterns
from saepatch.measure.patching import patch_heads
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading.load import load_model
from saepatch.model.sites import Site
from saepatch.records.rows import read_rows
from saepatch.records.statistics import Interval
from saepatch.report import read_page

pytestmark = pytest.mark.whole

SHARED = Path(__file__).parents[3] / "shared"
STORIES = SHARED / "models" / "stories260K"
TEXTS = SHARED / "data" / "tinystories_1000.jsonl"
needs_stories = pytest.mark.skipif(
    not (STORIES / "config.json").is_file(), reason="the stories260K model is not beside this clone"
)
SMALL = ["--pairs", "8", "--group", "3", "--tokens", "4096", "--k", "8", "--verify", "6", "--sample", "6"]
SMALL += ["--tasks", "[pronouns,greater_than]", "--dictionaries", "1"]
SMALL += ["--prompts", "6", "--new_tokens", "6", "--draws", "2"]
PAIRS = [PromptPair(f"the {a} sat", f"the {b} sat", "x", "y", f"{a}{b}") for a, b in zip("abcdef", "ghijkl")]


def run(*arguments):
    return run_config(RealConfig, study.main, "real", [*SMALL, *arguments])


def only_praise():
    return [concept for concept in texts.concepts() if concept.name == "praise"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    if not (STORIES / "config.json").is_file():
        pytest.skip("the stories260K model is not beside this clone")
    out = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(study, "concepts", only_praise)
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
    assert {"load", "tasks", "patching", "dictionaries", "latents", "steering"} <= set(summary["seconds"])
    assert set(summary["seconds"]) - {"load"} == set(summary["processor_seconds"])
    assert list(summary["dictionaries"]) == ["resid_post.2"]
    for quality in summary["dictionaries"].values():
        assert quality["held_out"]
        assert 0 <= quality["bos_share"] + quality["massive_share"] <= 1
    latents = summary["latents"]["pronouns"]
    assert set(latents) == {"on_select", "resid_post.2"}
    assert {"1", "4", "16"} >= set(latents["resid_post.2"]["denoise"]) > set()
    drawn = read_page(json.loads((finished / "page.json").read_text()))
    (chart,) = [
        b for s in drawn.sections for b in s.blocks if getattr(b, "title", "").endswith("what few units restore")
    ]
    lines = {line.name: dict(zip(map(str, line.x), line.y)) for line in chart.series}
    assert lines["latents"] == {k: figure[0] for k, figure in latents["resid_post.2"]["denoise"].items()}
    assert {"random latents", "matched latents", "principal components"} < set(lines)
    assert "it needs the facts" in summary["left_out"]["Causal tracing"]
    assert {claim["verdict"] for claim in summary["claims"]} <= {"shown", "not shown", "the opposite is shown"}
    page = (finished / "report.html").read_text()
    assert "Greater-than" in page
    assert "chanind/gemma-2-2b-batch-topk" in page  # published dictionaries
    assert "answers are in French" in summary["left_out"]["Restoration"]
    methods = {"one latent", "8 latents", "random latent", "difference of means", "prompting", "unsteered"}
    assert methods <= set(summary["steering"]["praise"]) <= methods | {"one-token prefix"}
    assert {"Latents restore more than principal components", "Several latents steer better than one"} <= {
        claim["claim"] for claim in summary["claims"]
    }


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
    rows = [row for row in read_rows(finished / "results.parquet") if row["task"] == "pronouns: heads"]
    mine = {(row["example"], row["site"], row["latent"]): row["patched"] for row in rows if row["direction"] == "noise"}
    for (pair, edit), value in np.ndenumerate(effects.patched):
        if effects.ran[pair, edit]:
            place = (effects.examples[pair], str(effects.edits[edit].site), str(effects.edits[edit].units[0]))
            assert mine[place] == pytest.approx(value, abs=1e-4)


@needs_stories
def test_texts_have_a_row_each(finished):
    rows = read_rows(finished / "texts.parquet")
    summary = json.loads((finished / "summary.json").read_text())
    for method, figures in summary["steering"]["praise"].items():
        mine = [row for row in rows if row["method"] == method]
        assert len(mine) == 6 * (2 if method == "random latent" else 1)
        assert np.mean([row["shown"] for row in mine]) == pytest.approx(figures["success"][0])
        assert all(row["shown"] == only_praise()[0].shown(row["text"]) for row in mine)


@needs_stories
def test_a_finished_run_measures_nothing_again_and_another_is_refused(finished, monkeypatch, capsys):
    monkeypatch.setattr(study, "concepts", only_praise)
    before = (finished / "summary.json").read_text()
    for name in ("patch_heads", "patch_streams", "patch_components"):
        monkeypatch.setattr(f"experiments.real.stages.patching.{name}", lambda *_, **__: pytest.fail("measured again"))
    monkeypatch.setattr(LanguageModel, "generate_ids", lambda *_, **__: pytest.fail("generated again"))
    given = ["--model", str(STORIES), "--data", str(TEXTS), "--out", str(finished)]
    assert run(*given, "--beside", str(finished / "summary.json")) == 0
    assert "in " + str(STORIES) in capsys.readouterr().out
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

    def value(self, name, measure):
        return measure()


UNKEPT = Unkept()


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
    ranking = dictionaries.first_units(model, dictionary, PAIRS, "noise")
    curve = dictionaries.latent_curve(model, dictionary, ranking, PAIRS, PAIRS, 0, "noise")
    estimates = sp.attribute(model, dictionary, PAIRS, direction="noise")
    best = next(edit for edit in estimates.top(5, each_position=False) if edit.kind == "latent")
    by_hand = sp.patch_latents(model, dictionary, PAIRS, [best.units[0]], controls=0, direction="noise")
    assert curve.top[0].value == pytest.approx(by_hand.of(0).value, abs=1e-5)
    verified = sp.attribute(model, dictionary, PAIRS, verify=20, sample=20)
    figure = dictionaries.correlation(verified)
    assert figure.value == pytest.approx(verified.verified.pearson())
    assert figure.reason == "no interval: a few large nodes decide it"
    assert figure.n == 6


def test_no_texts_and_no_dictionaries():
    with pytest.raises(sp.UserError, match=r"give --data TEXTS.jsonl, or --sae FOLDER"):
        dictionaries.train_dictionaries(RealConfig("m"), tiny_model("gpt2"))
    with pytest.raises(sp.UserError, match="samples = 0: use at least 1"):
        RealConfig("m", samples=0)


def test_given_words_tell_a_concept_without_those_that_latents_are_chosen_on():
    for concept, words in zip(texts.concepts()[1:], (texts.ILLNESS_WORDS, f"{texts.GOOD_WORDS} {texts.BAD_WORDS}")):
        chosen_on = set(re.findall(r"\w+", " ".join((*concept.present, *concept.absent)).lower()))
        assert not chosen_on & set(words.split())
    for concept in texts.concepts():
        assert not {*concept.tune} & {*concept.report}
    assert restoration.in_french(" Le chien est dans la maison.\nEnglish: The dog is in the house of the man.")
    assert not restoration.in_french(" The dog is in the house.\nFrench: Le chien est dans la maison de la ville.")
    splits = [{line for prompts in texts.translations(split) for line in prompts[0].split("\n")}
              for split in ("select", "tune", "report")]  # fmt: skip
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert splits[one] & splits[other] == {"French:"}


def short_translations(split):
    """For a model with one token a character."""
    return [(f"{word}. {split[0]}F:", f"{word}. {split[0]}E:") for word in ("ab", "cd", "ef", "gh", "ij")]


def test_the_whole_last_site_restores_the_asking_prompts_answers(monkeypatch):
    """At the last layer nothing else decides the logits; and sets of latents are restored as by hand."""
    model, config = tiny_model("llama"), RealConfig("m", prompts=4, new_tokens=4, draws=2)
    dictionary = random_dictionary(f"resid_post.{model.n_layers - 1}")
    monkeypatch.setattr(restoration, "LEAST", -2.0)
    monkeypatch.setattr(restoration, "translations", short_translations)
    restored = restoration.restoration(config, model, {dictionary.site: dictionary}, UNKEPT)
    assert {restoration.NEURONS, restoration.DIMENSIONS} <= restored.answers.keys()
    answers = {name: each.texts for name, each in restored.answers.items()}
    assert answers[restoration.WHOLE] == answers[restoration.ASKED] != answers[restoration.SUPPRESSED]
    assert len(answers[restoration.RANDOM]) == 2 * 4
    asking, suppressing = zip(*short_translations("report")[:4], strict=True)
    assert answers[restoration.SUPPRESSED] == tuple(model.generate(suppressing, 4))
    k = int(restored.most.split()[0])
    assert len(restored.latents) == k
    by_hand = sp.restore(model, dictionary, suppressing, sp.CleanPrompts(asking, 1), restored.latents, max_new_tokens=4)
    assert answers[restored.most] == tuple(by_hand)
    asked, told = zip(*short_translations("select")[:4], strict=True)
    ranked = sp.find_safety_latents(model, dictionary, told, sp.CleanPrompts(asked, 1), model.continue_ids(asked, 4))
    assert ranked.top(k)[dictionary.site] == restored.latents


def test_nothing_is_restored_where_the_prompts_make_no_difference(monkeypatch):
    model, dictionary = tiny_model("llama"), random_dictionary()
    monkeypatch.setattr(restoration, "translations", short_translations)
    config = RealConfig("m", prompts=2, new_tokens=2)
    assert "little to restore" in restoration.restoration(config, model, {dictionary.site: dictionary}, UNKEPT)


def test_latents_are_ranked_for_a_concept_and_success_is_compared_prompt_by_prompt():
    model, dictionary = tiny_model("llama"), random_dictionary()
    concept = replace(only_praise()[0], present=("ab", "ac"), absent=("xy", "zy"))
    ranked = steering.rank(RealConfig("m", draws=3), model, dictionary, concept)
    tokens = model.pad([model.encode(text) for text in (*concept.present, *concept.absent)])
    values = model.capture(tokens, [dictionary.site])[dictionary.site][:, 1:]
    assert ranked.unit == pytest.approx(float(values.norm(dim=-1).median()), rel=1e-4)
    scores = sp.contrast(model, dictionary, concept.present, concept.absent)
    statistics = sp.latent_statistics(model, dictionary, tokens)
    first = steering.first_alive(scores, statistics, min(24, int(statistics.alive.sum()) - 1))
    assert [latent for latent in first if latent in ranked.latents] == list(ranked.latents)
    assert not {*ranked.random} & {*first}
    points = {
        name: steering.Point(name, 1.0, ({"shown": shown},)) for name, shown in (("a", [1, 1, 0] * 4), ("b", [0] * 12))
    }
    steered = [steering.SteeredConcept("x", "s", (), points["b"], points, {})] * 2
    gap = steering.success_gap(steered, "a", "b")
    assert (gap.value, gap.n) == (pytest.approx(2 / 3), 24)


def test_other_directions_are_ranked_and_patched_like_latents():
    model, dictionary = tiny_model("llama"), random_dictionary()
    ranking = dictionaries.first_units(model, dictionary, PAIRS)
    kinds = dictionaries.other_directions(model, dictionary, ranking)
    measured = {kind: measure(PAIRS, PAIRS) for kind, measure in kinds.items()}
    by_hand = sp.patch_latents(model, dictionary, PAIRS, [ranking[:4]], controls=0)
    assert measured[dictionaries.LATENTS].at(4).value == pytest.approx(by_hand.of(0).value, abs=1e-5)
    assert measured["difference of means"].sizes == (1,)
    units = sp.units_of(model, dictionary.site)
    best = dictionaries.first_units(model, units, PAIRS)[:4]
    by_hand = sp.patch_latents(model, units, PAIRS, [best], controls=0)
    kind = measured[dictionaries.DIMENSIONS]
    assert kind.at(4).value == pytest.approx(by_hand.of(0).value, abs=1e-5)
    assert kind.beyond(kind, 4).value == 0


def test_candidates_are_given_up_when_none_fit():
    tried = []

    def candidates():
        for number in range(10_000):
            tried.append(number)
            yield tasks.FramedPair(PromptPair("a", "a b", "x", "y", str(number)), "never equal")

    with pytest.raises(sp.UserError, match="only 0 prompt pairs fit the tokenizer"):
        question.fitting(tiny_model("gpt2"), candidates(), 5)
    assert len(tried) < question.IN_VAIN + 5


def test_verdicts_of_another_run(tmp_path):
    kept = [
        {"claim": "A", "measured": f"{task}: m", "figure": [0.5, 0.4, 0.6], "verdict": verdict}
        for task, verdict in (("ioi", "shown"), ("facts", "not shown"))
    ]
    (tmp_path / "summary.json").write_text(json.dumps({"config": {"model": "organism"}, "claims": kept}))
    other = OtherRun.read(str(tmp_path / "summary.json"))
    claim = Claim("A", "facts: n", Interval(0, 0, 0, 9), "shown")
    assert other.verdict(claim) == "0.500 [0.400, 0.600], not shown"
    assert other.verdict(replace(claim, claim="B")) == "not measured"
    (tmp_path / "summary.json").write_text(json.dumps({"config": {"model": "m"}, "claims": [
        {"claim": "A", "measured": "facts: m", "figure": [0.5, None, None], "verdict": "not shown"}]}))  # fmt: skip
    assert OtherRun.read(str(tmp_path / "summary.json")).verdict(claim) == "0.500, not shown"
    for wrong in ([0.5, "a", "b"], [0.5], None, 3):
        text = json.dumps({"config": {"model": "m"}, "claims": [kept[0] | {"figure": wrong}]})
        (tmp_path / "summary.json").write_text(text)
        with pytest.raises(sp.UserError, match="cannot read verdicts"):
            OtherRun.read(str(tmp_path / "summary.json"))
    with pytest.raises(sp.UserError, match="give the summary.json of a run"):
        OtherRun.read(str(tmp_path))


def test_other_texts_to_train_on_are_another_run(tmp_path):
    model, files = tiny_model("llama"), [tmp_path / name for name in ("one.txt", "same.txt", "other.txt")]
    for file, text in zip(files, ("a text", "a text", "another")):
        file.write_text(text)
    decided = [study._deciding(RealConfig(model="tiny", data=str(file)), model) for file in files]
    assert decided[0] == decided[1] != decided[2]


def test_a_site_is_chosen_on_select_and_not_on_report():
    model, dictionary = tiny_model("llama"), random_dictionary()
    restored = dictionaries.effect_on_select(model, dictionary, FACTS)
    ranking = dictionaries.first_units(model, dictionary, FACTS[::2])
    expected = sp.patch_latents(model, dictionary, FACTS[1::2], [ranking], controls=0)
    assert restored == pytest.approx(float(expected.ratios()[0]), abs=1e-5)
    config, other = RealConfig("m", verify=4, sample=4), random_dictionary("resid_post.0")
    framed = [tasks.FramedPair(pair, "") for pair in PAIRS]
    task = tasks.TaskPairs("facts", dict.fromkeys(tasks.SPLITS, framed), {})
    by_site = {each.site: each for each in (dictionary, other)}
    of = dictionaries.task_latents(config, model, by_site, task, UNKEPT)
    assert of.on_select == {str(s): dictionaries.effect_on_select(model, d, PAIRS) for s, d in by_site.items()}
    assert of.on_select[of.site] == max(of.on_select.values())
    assert of.attribution.sites == (Site.parse(of.site),)
