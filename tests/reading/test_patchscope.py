"""Reading a latent by writing it into an explanation prompt."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import random_dictionary, tiny_model

from experiments import patchscope as experiment
from experiments.common.kept import KeptResults
from saepatch.cli.main import main
from saepatch.cli.parser import run_config
from saepatch.dictionaries.loading import load_sae
from saepatch.engine.components import Directions
from saepatch.errors import UserError
from saepatch.model.hooks import edit_sites
from saepatch.model.loading.load import load_model
from saepatch.model.positions import At
from saepatch.model.sites import Site
from saepatch.reading import patchscope
from saepatch.reading.patchscope import Reading, best_reading, read_by_patchscope
from saepatch.records.statistics import Interval
from saepatch.runs.measurements import measurements
from saepatch.steering.generate import direction_dictionary

pytestmark = pytest.mark.whole


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("site", [None, "resid_post.0"])
def test_what_is_written_and_measured(family, site, monkeypatch):
    model, dictionary = tiny_model(family), random_dictionary()
    monkeypatch.setattr(patchscope, "BATCH", 3)
    found = read_by_patchscope(model, dictionary, [7, 3], "what is X? it", At("X"), (1.0, 4.0), site, 5)
    assert [[(r.latent, r.scale) for r in row] for row in found] == [[(7, 1.0), (7, 4.0)], [(3, 1.0), (3, 4.0)]]
    ids = model.encode("what is X? it")
    place = ids.index(model.encode("X")[-1])
    at, last = Site.parse(site or "resid_post.1"), model.layout.blocks[2]
    for reading in (found[0][1], found[1][0]):
        direction = dictionary.rows[reading.latent] / dictionary.rows[reading.latent].norm()

        def write(x, direction=direction, scale=reading.scale):
            x = x.clone()
            x[:, place] = scale * x[:, place].norm() * direction
            return x

        new, held = [], {}

        def keep(_module, _args, out, held=held):
            held.setdefault(0, out if torch.is_tensor(out) else out[0])

        handle = last.register_forward_hook(keep)
        with edit_sites(model.layout, {at: write}), torch.no_grad():
            for _ in range(5):  # one token after the other, nothing cached
                logits = model.hf(input_ids=torch.tensor([[*ids, *new]]), use_cache=False).logits[0, -1]
                new.append(int(logits.argmax()))
                if len(new) == 1:
                    p = logits.softmax(-1)
        handle.remove()
        cut = new[: new.index(1)] if 1 in new else new
        assert reading.text == model.tokenizer.decode(cut, skip_special_tokens=True)
        assert reading.entropy == pytest.approx(float(-(p * p.log()).sum()), rel=1e-3)
        similar = torch.nn.functional.cosine_similarity(held[0][0, -1], direction, dim=-1)
        assert reading.self_similarity == pytest.approx(float(similar), abs=1e-4)


def test_heads_values_are_read_at_the_stream():
    model, dictionary = tiny_model(), random_dictionary("z.1")
    weight = model.layout.blocks[1].self_attn.o_proj.weight
    row = dictionary.rows[[7]] @ weight.detach().T
    written = direction_dictionary(Directions(Site(1), row / row.norm(), "by hand"))
    for site in (None, "resid_post.0"):
        found = read_by_patchscope(model, dictionary, [7], "what is X? it", At("X"), (1.0, 4.0), site, 5)[0]
        expected = read_by_patchscope(model, written, [0], "what is X? it", At("X"), (1.0, 4.0), site, 5)[0]
        for one, other in zip(found, expected, strict=True):
            assert one.text == other.text
            assert one.self_similarity == pytest.approx(other.self_similarity, abs=1e-5)
    with pytest.raises(UserError, match=r"z\.0 does not have the width of the residual stream"):
        read_by_patchscope(model, random_dictionary(), [7], "what is X? it", At("X"), site="z.0")


def test_the_scale_is_that_of_likeness_and_certainty():
    rows = [Reading(1, s, "", similar, e) for s, similar, e in ((1, 0.1, 3.0), (2, 0.8, 1.0), (4, 0.9, 5.0))]
    assert best_reading(rows).scale == 2
    assert best_reading(rows[:1]).scale == 1
    with pytest.raises(UserError, match="no readings"):
        best_reading([])


def test_mistakes():
    model, dictionary = tiny_model(), random_dictionary()
    for given, said in (
        (([3], "no such", At("X")), "contains 'X' as whole tokens 0 times"),
        (([99], "an X", At("X")), "out of range"),
        (([3], "an X", At("X"), (0.0,)), "above 0"),
        (([3], "an X", "generated"), "selects no token"),
    ):
        with pytest.raises(UserError, match=said):
            read_by_patchscope(model, dictionary, *given)


def test_the_verdict_sets_shares_at_the_same_scale_side_by_side():
    low, high, other = (Interval(value, value - 0.1, value + 0.1, 10) for value in (0.2, 0.9, 0.3))
    one = experiment.NamedShares("resid_post.1", "resid_post.1", "refusal", low, high, low, other)
    said = experiment.verdict([one], (low, high))
    assert "named in 20% of readings at the chosen scale (90% at any scale)" in said
    assert "but not at the chosen scale" in said
    assert "20% of readings, random 20%; at any scale 90% and 30%" in said
    assert "so the prompts work." in experiment.verdict([one], (high, high))
    assert "Even a word's own embedding" in experiment.verdict([one], (low, low))


@pytest.mark.slow
def test_the_organism_reads_words_and_not_its_latents(tmp_path):
    model = load_model("organism")
    site = Site.parse("resid_post.1")
    config = experiment.PatchscopeConfig(latents=1, random=2)
    with measurements(tmp_path, "patchscope", {}) as kept:
        found, words = experiment.measure(config, model, {site: load_sae("organism", site)}, KeptResults(kept, {}))
    assert [(one.written_at, one.concept) for one in found] == [
        (at, concept) for at in ("resid_pre.0", "resid_post.1") for concept in ("refusal", "positive sentiment")
    ]
    assert all((one.own.n, one.random.n) == (7, 14) for one in found)
    assert all(one.own.value <= one.own_any.value for one in found)
    assert words[1].value >= 0.9  # the control: in these prompts, a word's embedding is read as the word
    share = Interval(0.9, 0.8, 1.0, 7)
    known = [replace(one, own=share) for one in found if one.concept == "refusal"]
    conclusion = experiment.verdict(known, words)
    assert "Refusal: named significantly more often than by random latents (resid_post.1 written at" in conclusion
    nothing = [replace(one, own=one.random) for one in found]
    assert "Refusal: at no site named more often" in experiment.verdict(nothing, words)


@pytest.mark.slow
def test_a_stopped_experiment_continues_from_its_readings(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "PROMPTS", experiment.PROMPTS[:1])
    monkeypatch.setattr(experiment, "QUESTIONS", ())
    words = experiment.WordShares(Interval(0.5, 0.4, 0.6, 9), Interval.withheld(1.0, 9, "all"))
    monkeypatch.setattr(experiment, "words_named", lambda model: words)
    sae = load_sae("organism", "resid_post.3")
    monkeypatch.setattr(experiment, "load_saes", lambda *_: {sae.site: sae})
    named, read_at = experiment.named, []

    def counted(model, dictionary, latents, at, lexicons):
        read_at.append(str(at))
        if len(read_at) == stop_at:
            raise KeyboardInterrupt
        return named(model, dictionary, latents, at, lexicons)

    monkeypatch.setattr(experiment, "named", counted)

    def started(folder, *more):
        read_at.clear()
        given = ["--latents", "1", "--random", "1", "--out", str(tmp_path / folder), *more]
        return run_config(experiment.PatchscopeConfig, experiment.main, "patchscope", given)

    stop_at = 0
    assert started("whole") == 0
    assert read_at == ["resid_pre.0"] * 3 + ["resid_post.3"] * 3
    stop_at = 5
    assert started("stopped") == 130
    stop_at = 0
    assert started("stopped", "--seed", "1") == 2
    assert "holds a run that differs in seed (0 there, 1 now)" in capsys.readouterr().err
    assert started("stopped") == 0
    assert read_at == ["resid_post.3"] * 3
    whole, stopped = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "stopped"))
    assert whole == stopped
    assert main(["compare", str(tmp_path / "whole"), str(tmp_path / "stopped")]) == 0
    assert "resid_post.3 at resid_pre.0/refusal/own" in capsys.readouterr().out
