"""The experiments: their prompts for any tokenizer, small runs of them, and the words that follow from numbers."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import byte_tokenizer, random_dictionary, random_sae, tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from experiments import agreement, ioi, pronouns
from experiments.pairs import stages, study
from experiments.pairs.findings import against_dense, unsure, verdict
from experiments.pairs.question import Question, embedded, fitting
from experiments.pairs.stages import DirectionKind, RankedSite
from saepatch import organism
from saepatch.cli.main import main
from saepatch.cli.parser import run_config
from saepatch.data.batches import batch_pairs
from saepatch.data.forms import largest_group
from saepatch.data.pairs import PromptPair
from saepatch.engine.components import Edit
from saepatch.errors import UserError
from saepatch.measure.results.effects import Effects
from saepatch.model.loading.load import load_model
from saepatch.model.sites import Site
from saepatch.records.rows import read_rows
from saepatch.records.statistics import bootstrap_mean

pytestmark = pytest.mark.whole

BUILDERS = {"ioi": ioi.ioi_pairs, "agreement": agreement.agreement_pairs, "pronoun": pronouns.story_pairs}
FILLERS = {
    "ioi": {*ioi.NAMES, *ioi.PLACES, *ioi.OBJECTS},
    "agreement": {*agreement.NOUNS, *map(agreement.plural, agreement.NOUNS)},
    "pronoun": {*pronouns.GIRLS, *pronouns.BOYS},
}
SMALL = ["--pairs", "10", "--sizes", "[1,4,16]", "--verify", "20", "--sample", "20"]


def word_tokenizer(every: bool = True) -> PreTrainedTokenizerFast:
    """One token a word with its space, as a large vocabulary has it; without `every`, names are split into letters."""
    words = re.compile(r" ?[A-Za-z]+|[^\w\s]")
    texts = [text for task in (ioi, agreement, pronouns) for split in task.TEMPLATES for text in task.TEMPLATES[split]]
    nouns = [*agreement.NOUNS, *map(agreement.plural, agreement.NOUNS), *ioi.PLACES, *ioi.OBJECTS, "girl", "boy"]
    names = [*ioi.NAMES, *pronouns.GIRLS, *pronouns.BOYS] if every else []
    found = {token for text in texts for token in words.findall(re.sub(r"\{\w\}", "it", text))}
    found |= {space + word for word in (*nouns, *names) for space in ("", " ")}
    found |= {" is", " are", " She", " He", "<bos>", "<unk>"}
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(sorted(found))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(words.pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>")


@pytest.fixture(scope="module")
def worded():
    """A model whose tokenizer has every word."""
    return replace(tiny_model("gpt2"), tokenizer=word_tokenizer())


@pytest.mark.parametrize("task", BUILDERS)
def test_prompts_for_another_model(worded, task):
    seen = {}
    for split in ("select", "report"):
        framed = fitting(worded, BUILDERS[task](split, 0), 200)
        pairs = [one.pair for one in framed]
        assert len(pairs) == len({(pair.clean, pair.corrupted) for pair in pairs}) > 60
        batch = batch_pairs(worded, pairs)  # raises where lengths or answers do not fit
        assert bool((batch.clean.lengths == batch.corrupted.lengths).all())
        assert len({pair.example for pair in pairs}) == len(pairs)
        assert framed == fitting(worded, BUILDERS[task](split, 0), 200)  # the seed decides
        assert framed != fitting(worded, BUILDERS[task](split, 1), 200)
        sides = [sum(pair.answer == answer for pair in pairs) / len(pairs) for answer in {p.answer for p in pairs}]
        assert max(sides) < 0.7
        words = {word for pair in pairs for word in re.findall(r"[A-Za-z]+", pair.clean + pair.corrupted)}
        seen[split] = ({one.frame for one in framed}, words & FILLERS[task])
    for select, report in zip(*seen.values(), strict=True):
        assert select
        assert not select & report, "the splits share a template, a name, a place or an object"


def test_indirect_objects_are_the_one_named_once(worded):
    for one in fitting(worded, ioi.ioi_pairs("report", 0), 100):
        for text, answer, other in (
            (one.pair.clean, one.pair.answer, one.pair.counter),
            (one.pair.corrupted, one.pair.counter, one.pair.answer),
        ):
            assert len(re.findall(rf"\b{answer.strip()}\b", text)) == 1
            assert len(re.findall(rf"\b{other.strip()}\b", text)) == 2


def test_verbs_agree_with_the_first_noun(worded):
    kinds = set()
    for one in fitting(worded, agreement.agreement_pairs("select", 0), 100):
        for text, answer in ((one.pair.clean, one.pair.answer), (one.pair.corrupted, one.pair.counter)):
            nouns = [w for w in text.split() if w.removesuffix("s") in agreement.NOUNS or w == "boxes"]
            subject, distractor = (noun.endswith("s") for noun in nouns)
            assert subject == (answer == " are")
            kinds.add((subject, distractor))
    assert len(kinds) == 4


def test_a_tokenizer_that_splits_the_names(worded):
    model = replace(worded, tokenizer=byte_tokenizer())
    with pytest.raises(UserError, match=r"only 0 prompt pairs fit the tokenizer of tiny-gpt2"):
        fitting(model, ioi.ioi_pairs("select", 0), 5)


def test_positions_of_a_group_mean_the_same():
    model = load_model("organism")
    for question in (ioi.QUESTION, agreement.QUESTION, pronouns.QUESTION):
        framed = embedded(question, "report", 60, 0)
        group = largest_group(model, [one.pair for one in framed], [one.frame for one in framed])
        frames = {one.frame for one in framed if one.pair in group}
        assert len(frames) == 1
        assert len(group) >= 60 / len({one.frame for one in framed}) / 2
        labels = study.position_labels(model, group)
        (template,) = {frame.removesuffix(" ABBA").removesuffix(" BABA") for frame in frames}
        shown = " ".join(label.split(" ", 1)[1] for label in labels[1:]).replace("␣", "").replace(" ,", ",")
        pattern = re.sub(r"\\\{\w+\\\}", r"\\[?[\\w/ ]+\\]?", re.escape(template))
        assert re.fullmatch(pattern, shown), (template, shown)
        assert "[" in shown


def test_a_longer_name_moves_a_pair_into_another_group(worded):
    pairs = [
        PromptPair(f"The {a} near the {b}", f"The {a} near the {c}", " is", " are")
        for a, b, c in (("key", "car", "box"), ("dog", "car", "cat"), ("key by the box", "cat", "dog"))
    ]
    group = largest_group(worded, pairs, ["f" for _ in pairs])
    assert group == pairs[:2]
    assert study.position_labels(worded, group) == ["0 The", "1 [␣key]", "2 ␣near", "3 ␣the", "4 [␣car/␣box]"]


def run(module, config, out, *arguments):
    return run_config(config, module.main, "study", ["--out", str(out), *SMALL, *arguments])


def check(out: Path, question: Question, pairs: int, heads: bool) -> dict:
    """The files of a run, and what has to be in each; returns the summary."""
    found = json.loads((out / "summary.json").read_text())
    assert found["pairs"] == pairs
    assert found["site"] in found["ce_recovered"]
    for key in [f"{d}_{line}" for d in ("denoise", "noise") for line in ("top", "random", "matched")]:
        for _, value, low, high in found[key]:
            assert (low is None and high is None) or low <= value <= high  # withheld where few pairs moved
    kinds = ["latents", "residual dimensions", "principal components", "difference of means"]
    assert list(found["directions"]) == kinds
    assert found["attribution"][0]["method"] == "first order"
    maps = ["layer_position", "latent_position"] + ["layer_head"] * heads
    figures = {f"{name}_{d}" for name in maps for d in ("denoise", "noise")}
    figures |= {"denoise", "noise", "attribution", "baselines"}
    assert {path.stem for path in out.glob("*.svg")} == figures
    report = (out / "report.html").read_text()
    assert question.title in report
    assert all(word in report for word in ("Attribution against exact", "Latents against other directions"))
    assert ("No map of attention heads" in report) is not heads
    for words in found["verdicts"].values():
        assert all(word.split(":")[0] in report for word in words)
    rows = read_rows(out / "results.parquet")
    components = {"stream", "latent", "dimension", "principal component", "mean difference"}
    assert {row["component"] for row in rows} - {"error"} == components | ({"head"} if heads else set())
    assert {row["method"] for row in rows} > {"exact", "first order"}
    assert {row["task"] for row in rows} == {question.task}
    assert (out / "config.yaml").stat().st_size > 0
    return found


@pytest.mark.slow
def test_indirect_objects_on_the_shipped_model(tmp_path, capsys, few_texts):
    two = ",".join(str(organism.path("saes") / f"resid_post.{layer}") for layer in (0, 3))
    assert run(ioi, ioi.IoiConfig, tmp_path, "--sae", two) == 0
    found = check(tmp_path, ioi.QUESTION, 10, heads=True)
    assert found["clean"] > 0 > found["corrupted"]
    assert found["clean_right"] == 1
    # the last layer's output at the last position is all there is to the answer, and the other name's place decides it
    assert {cell["site"] for cell in found["layer_position"]} >= {"resid_post.0", "resid_post.5"}
    assert found["layer_position"][0]["denoise"][0] == pytest.approx(1, abs=0.1)
    assert found["attribution"][0]["Pearson"] > 0.8
    printed = capsys.readouterr().out
    assert found["site"] in printed
    assert all(
        word in printed
        for word in ("layer × position", "attention heads", "principal components", *found["verdicts"]["denoise"])
    )


@pytest.mark.slow
def test_agreement_on_a_family_that_offers_no_heads(tmp_path, monkeypatch, capsys):
    def without_heads(*arguments, **options):
        model = load_model(*arguments, **options)
        return replace(model, layout=model.layout.without(model.layout.of_stream("z")))

    monkeypatch.setattr(study, "load_model", without_heads)
    two = ",".join(str(organism.path("saes") / f"resid_post.{layer}") for layer in (1, 4))
    assert run(agreement, agreement.AgreementConfig, tmp_path, "--sae", two) == 0
    found = check(tmp_path, agreement.QUESTION, 10, heads=False)
    assert found["heads"] is None
    assert "No map of attention heads: the family of organism" in capsys.readouterr().out
    # one dense direction does more than one latent here: the number of the subject is one direction
    assert found["directions"]["difference of means"]["denoise"]["1"][0] > 0.4
    assert found["verdicts"]["denoise"][0].startswith("With one direction, the difference of means restored most")
    assert {k: v for k, v, *_ in found["denoise_top"]}[16] > 0.7
    assert all(value < 0.1 for _, value, *_ in found["denoise_random"])
    latents = found["latents"]
    assert [one["denoise"][0] for one in latents] == sorted((one["denoise"][0] for one in latents), reverse=True)


@pytest.fixture(scope="module")
def in_folders(tmp_path_factory):
    """A random model and two dictionaries on the disk, as arguments."""
    place = tmp_path_factory.mktemp("folders")
    tokenizer = word_tokenizer()
    model = tiny_model("gpt2", vocab_size=len(tokenizer), seed=3)
    model.hf.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    folders = []
    for layer in (1, 2):
        sae = random_sae("jumprelu", seed=layer)
        sae.cfg.metadata.hook_name = f"blocks.{layer}.hook_resid_pre"
        sae.cfg.metadata.prepend_bos = True
        folders.append(str(place / f"sae{layer}"))
        sae.save_model(folders[-1])
    return ["--model", str(place / "model"), "--sae", ",".join(folders)]


@pytest.mark.slow
def test_a_hugging_face_folder_with_several_dictionaries(tmp_path, capsys, in_folders):
    assert run(agreement, agreement.AgreementConfig, tmp_path / "out", *in_folders) == 0
    summary = check(tmp_path / "out", agreement.QUESTION, 10, heads=True)
    assert set(summary["ce_recovered"]) == {"resid_pre.1", "resid_pre.2"}
    assert "prepend_bos: true" in (tmp_path / "out" / "config.yaml").read_text()  # as the dictionaries were trained
    assert "does not distinguish clean from corrupted prompts" in capsys.readouterr().out  # the model is random
    *given, folders = in_folders
    first = folders.split(",")[0]
    assert run(agreement, agreement.AgreementConfig, tmp_path / "x", *given, f"{first},{first}") == 2
    assert "two dictionaries for resid_pre.1" in capsys.readouterr().err


@pytest.mark.slow  # test_kept_results.py and test_patchscope.py have the mechanism
def test_a_stopped_experiment_continues_from_its_stages(tmp_path, monkeypatch, capsys, in_folders):
    computed = []
    for name in ("patch_streams", "patch_heads", "patch_latents", "effect_curve", "attribute", "patch_components"):
        original = getattr(stages, name)

        def counted(*given, name=name, original=original, **options):
            computed.append(name)
            return original(*given, **options)

        monkeypatch.setattr(stages, name, counted)

    def started(folder, *more):
        computed.clear()
        given = [*in_folders, "--pairs", "4", "--sizes", "[1,4]", *more]
        return run(agreement, agreement.AgreementConfig, tmp_path / folder, *given)

    assert started("whole") == 0
    every = len(computed)
    with monkeypatch.context() as patched:
        patched.setattr(stages, "mean_difference", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert started("stopped") == 130
    assert "measurements are stored; the same command resumes from them" in capsys.readouterr().err
    assert (
        main(
            ["patch", "--pairs", "ioi", "--out", str(tmp_path / "stopped"), "--site", "resid_post.3", "--latents", "1"]
        )
        == 2
    )
    assert "holds results of another command" in capsys.readouterr().err
    assert main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("whole" in line and "agreement" in line and "do not differ significantly" in line for line in lines)
    assert any("stopped" in line and "agreement" in line and "not finished" in line for line in lines)
    assert started("stopped", "--seed", "1") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "holds a run that differs in seed (0 there, 1 now)" in line
    assert started("stopped") == 0
    assert set(computed) == {"patch_components"}  # the one kind of directions that was missing
    assert 0 < len(computed) < every / 4
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "stopped")]
    assert summaries[0] == summaries[1]
    tables = [repr(read_rows(tmp_path / name / "results.parquet")) for name in ("whole", "stopped")]
    assert tables[0] == tables[1]
    assert started("stopped") == 0
    assert not computed
    assert main(["compare", str(tmp_path / "whole"), str(tmp_path / "stopped")]) == 0
    assert "denoise/top/4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "1"], "too few for an interval"),
        (["--sizes", "[4,1]"], "give increasing numbers"),
        (["--sizes", "[0]"], "give increasing numbers"),
        (["--verify", "0"], "use at least 2"),
        (["--sae", "nowhere"], "unknown dictionary 'nowhere'"),
        (["--model", "no/such/model"], "'no/such/model' is neither a folder nor"),
        (["--device", "moon"], "cannot be used here"),
    ],
)
def test_bad_settings(tmp_path, capsys, arguments, message):
    assert run(ioi, ioi.IoiConfig, tmp_path / "out", *arguments) == 2
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if line.startswith("error:")]
    assert message in line
    assert not (tmp_path / "out").exists()


def kinds(**values: list[float]) -> list[DirectionKind]:
    """Kinds whose only size is 1, with these changes of pairs that differ by 1."""
    found = []
    for name, changes in values.items():
        n = len(changes)
        effects = Effects(
            "denoise",
            "logit_difference",
            "all",
            (Edit(Site(0, "resid_post"), (0,)),),
            tuple(map(str, range(n))),
            np.ones(n),
            np.zeros(n),
            np.array(changes)[:, None],
            np.ones((n, 1), dtype=bool),
        )
        found.append(DirectionKind(name.replace("_", " "), (1,), {"denoise": effects}))
    return found


def test_the_words_follow_from_the_numbers():
    high, low = [0.8, 0.9, 0.7, 0.75, 0.85, 0.8], [0.2, 0.3, 0.1, 0.15, 0.25, 0.2]
    wide = [1.6, 0.0, 1.7, 0.1, 1.5, 0.2]
    shown = {value: str(bootstrap_mean(np.array(values))) for value, values in ((0.8, high), (0.2, low))}
    assert verdict(kinds(latents=high, residual_dimensions=low, principal_components=low), 1).startswith(
        f"With one direction, latents restored most: {shown[0.8]}, against {shown[0.2]} for "
        "residual dimensions, the best of the others (difference 0.600"
    )
    assert verdict(kinds(latents=low, residual_dimensions=low, difference_of_means=high), 1).startswith(
        f"With one direction, the difference of means restored most: {shown[0.8]}, against {shown[0.2]}"
    )
    assert "latents and residual dimensions do not differ significantly" in verdict(
        kinds(latents=wide, residual_dimensions=high), 1
    )
    assert "no other directions to compare" in verdict(kinds(latents=low), 1)
    assert "it takes" not in against_dense(kinds(latents=high, difference_of_means=low))
    assert "one latent restores as much" in against_dense(kinds(latents=high, difference_of_means=low))
    assert "no number of latents tried" in against_dense(kinds(latents=low, difference_of_means=high))
    assert against_dense(kinds(latents=low)) == ""


def test_paired_differences_see_more_than_intervals_side_by_side():
    base = np.linspace(0, 2, 12)
    ahead, behind = kinds(a=(base + 0.1).tolist(), b=base.tolist())
    gap = ahead.beyond(behind, 1)
    assert gap.low == pytest.approx(0.1)
    assert gap.high == pytest.approx(0.1)
    assert ahead.at(1).low < behind.at(1).high


def test_a_model_that_cannot_do_the_task_is_said():
    (kind,) = kinds(latents=[0.0, 1.0] * 6)
    clear = replace(kind.effects["denoise"], clean=np.array([1.0, 1.2, 0.9, 1.1, 1.3, 0.8] * 2))
    assert unsure(clear, "m") == ""
    mixed = np.array([1.0, -1.0, 0.9, -0.9, 0.8, -0.8] * 2)
    assert "m does not distinguish" in unsure(replace(clear, clean=mixed), "m")
    (pair,) = kinds(latents=[0.0, 1.0])
    few = replace(pair.effects["denoise"], clean=np.array([1.5, 1.2]))
    assert "These pairs do not show whether m" in unsure(few, "m")


def test_a_site_where_nothing_has_happened_yet_has_no_dense_direction():
    model = load_model("organism")
    pairs = [one.pair for one in embedded(agreement.QUESTION, "select", 6, 0)]
    same = [replace(pair, corrupted=pair.clean) for pair in pairs]
    assert stages.mean_difference(model, Site(2, "resid_post"), same, pairs, None) is None
    found = stages.mean_difference(model, Site(2, "resid_post"), pairs, pairs, agreement.QUESTION.first)
    assert found.units == 1


def test_a_site_is_chosen_on_pairs_that_nothing_was_ranked_on(monkeypatch):
    """On the prompts that latents are ranked on, noise fits itself: 0.100 there was 0.002 on report."""
    model, dictionary = tiny_model("gpt2"), random_dictionary("resid_post.1")
    pairs = [PromptPair(f"the {a} sat", f"the {b} sat", "x", "y", f"pair {a}{b}") for a, b in zip("abcdef", "ghijkl")]
    select, report = pairs[:4], pairs[4:]
    single, together = stages.patch_latents, stages.patch_components
    used = {"ranked": [], "chosen": []}

    def ranking(model, dictionary, pairs, **more):
        used["ranked"].append([pair.example for pair in pairs])
        return single(model, dictionary, pairs, **more)

    def choosing(model, component, pairs, *given, **more):
        used["chosen"].append([pair.example for pair in pairs])
        return together(model, component, pairs, *given, **more)

    monkeypatch.setattr(stages, "patch_latents", ranking)
    monkeypatch.setattr(stages, "patch_components", choosing)
    ranked = RankedSite(dictionary, stages.rank_site(model, dictionary, select, report, 4, 0))
    names = [pair.example for pair in select]
    assert used["ranked"] == [names[:2]]
    assert names[2:] in used["chosen"]
    assert not any(set(some) & set(names[:2]) for some in used["chosen"])
    used["chosen"].clear()
    compared = stages.DirectionComparison(model, ranked, select, report, (1,), None)
    assert [kind for kind in compared.kinds if compared.measure(kind).sizes] == list(compared.kinds)
    assert names[:2] in used["chosen"]  # single dimensions and components are ranked where latents are
    assert not any(set(some) == set(names) for some in used["chosen"])
