"""Dictionaries that several models share: whose activations a round holds, what is saved, what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from runs_of_training import documents, small
from tiny import tiny_model

from saepatch.dictionaries.loading import load_saes
from saepatch.errors import UserError
from saepatch.model.hooks import capture
from saepatch.model.sites import Site
from training.__main__ import main
from training.data.activations import ActivationStream
from training.data.rows import rows
from training.loop.trainer import train_saes

pytestmark = pytest.mark.whole

SITES = [Site(0), Site(2)]


@pytest.fixture(scope="module")
def models():
    return tiny_model(), replace(tiny_model(seed=1), name="other")


def rows_of(model):
    """Activations by one forward a row, the special tokens left out, for each site."""
    found = []
    for row in rows(model, documents(), context=32):
        seen = capture(model.hf, model.layout, SITES, {"input_ids": torch.tensor([row])}, stop=False)
        found.append({site: x[0, torch.tensor(row) > 2] for site, x in seen.items()})
    return {site: torch.cat([row[site] for row in found]) for site in SITES}


def test_every_token_is_read_by_one_of_the_models_in_turn(models):
    model, other = models
    config = small(batch_size=128, buffer=256, forward_tokens=64, prefetch=False)
    stream = ActivationStream(model, documents(), SITES, config, epochs=1, also=[other])
    got = {site: torch.cat([batch[site] for batch in stream]) for site in SITES}
    want = rows_of(model), rows_of(other)
    whose = []
    for site in SITES:
        near = torch.stack([torch.cdist(got[site].double(), one[site].double()).amin(1) for one in want])
        assert float(near.amin(0).max()) < 1e-4  # each row is one of the two models'
        whose.append(near.argmin(0))
    assert torch.equal(*whose)  # and of the same one at every site
    assert len(got[SITES[0]]) == len(want[0][SITES[0]])
    assert 0.3 < float(whose[0].float().mean()) < 0.7


def test_the_second_models_activations_are_cached_apart(models, tmp_path):
    model, other = models
    config = small(batch_size=128, buffer=512, forward_tokens=64, prefetch=False, cache=str(tmp_path / "cache"))
    streams = [ActivationStream(model, documents(), SITES, config, epochs=1, also=also) for also in ([], [other])]
    for stream in streams:
        first, again = (torch.cat([batch[SITES[0]] for batch in stream]) for _ in range(2))
        assert torch.equal(first, again)
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory):
    model, other = models
    out = tmp_path_factory.mktemp("several") / "saes"
    config = small(sites=["resid_post.1"], also=["other"])
    return out, train_saes(model, documents(), config, out, also=[other])


def test_what_the_dictionaries_are_worth_in_each_model_is_saved(models, trained):
    model, other = models
    out, outcome = trained
    (site,) = outcome.figures
    assert list(outcome.also) == ["other"]
    dictionary = load_saes(str(out))[site]
    assert dictionary.metrics_on(model) == outcome.figures[site]
    assert dictionary.metrics_on(other) == outcome.also["other"][site] != outcome.figures[site]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["also"] == {"other": {str(site): outcome.also["other"][site]}}


def test_they_fit_the_second_model_better_than_those_of_the_first_alone(models, trained, tmp_path, caplog):
    model, other = models
    out, _ = trained
    site = Site(1)
    alone = train_saes(model, documents(), small(sites=["resid_post.1"]), tmp_path / "alone")
    assert not alone.also
    of_one = load_saes(str(tmp_path / "alone"))[site]
    assert of_one.metrics_on(other) == {}
    of_one.check(other)
    assert "was trained on another model" in caplog.text
    caplog.clear()
    load_saes(str(out))[site].check(other)
    assert "was trained on another model" not in caplog.text
    short = [text[:40] for text in documents()]
    x = capture(other.hf, other.layout, [site], other.inputs(other.tokenize(short)))[site]
    gaps = {}
    for name, dictionary in (("both", load_saes(str(out))[site]), ("one", of_one)):
        gaps[name] = float((dictionary.encode(x).reconstruction - x).pow(2).mean())
    assert gaps["both"] < 0.8 * gaps["one"]


def test_a_run_goes_on_only_with_the_same_models(models, trained, tmp_path):
    model, other = models
    out, outcome = trained
    config = small(sites=["resid_post.1"], also=["other"], resume=True)
    again = train_saes(model, documents(), config, out, also=[other])
    assert again.also == outcome.also
    third = replace(tiny_model(seed=2), name="other")
    with pytest.raises(UserError, match="another model"):
        train_saes(model, documents(), config, out, also=[third])


@pytest.mark.slow
def test_models_that_cannot_share(models, tmp_path, capsys):
    model, other = models
    with pytest.raises(UserError, match="is given twice"):
        train_saes(model, documents(), small(), tmp_path / "a", also=[model])
    wide = replace(tiny_model(hidden_size=32, head_dim=8), name="wide")
    with pytest.raises(UserError, match=r"has width \d+ in tiny-llama and 32 in wide"):
        train_saes(model, documents(), small(), tmp_path / "b", also=[wide])
    with pytest.raises(UserError, match="fine-tuning works with a single model"):
        train_saes(model, documents(), small(finetune_tokens=100), tmp_path / "c", also=[other])
    short = replace(tiny_model("gpt2", max_position_embeddings=16), name="short")
    with pytest.raises(UserError, match="context 32 is longer than the 16 positions of 'short'"):
        train_saes(model, documents(), small(sites=["resid_post.1"]), tmp_path / "d", also=[short])
    (tmp_path / "texts.txt").write_text("".join(f"A text, number {i}.\n" for i in range(50)))
    plain = ["--data", str(tmp_path / "texts.txt"), "--dry_run", "true"]
    assert main(["--also", "[organism]", *plain]) == 2
    assert "organism is given twice" in capsys.readouterr().err
    assert main(["--also", "[organism-base]", *plain]) == 0
    assert main(["--also", "[nosuch/model/folder]", "--data", "nosuch.txt", "--out", str(tmp_path / "c")]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_run_from_before_a_setting_was_there_goes_on(models, tmp_path):
    model, _ = models
    out, config = tmp_path / "run", small(sites=["resid_post.1"])
    found = train_saes(model, documents(), config, out).figures
    file = out / "summary.json"
    summary = json.loads(file.read_text())
    del summary["identity"]["config"]["also"]
    file.write_text(json.dumps(summary))
    assert train_saes(model, documents(), replace(config, resume=True), out).figures == found
    with pytest.raises(UserError, match=r"holds a run with also \[\], not \['x'\]"):
        train_saes(model, documents(), replace(config, resume=True, also=["x"]), out)
