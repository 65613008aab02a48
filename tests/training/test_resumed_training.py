"""Runs that are stopped: what a checkpoint holds, and that going on from it ends where an uninterrupted run does."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs_of_training import documents, small
from safetensors.torch import load_file
from tiny import random_dictionary, tiny_model

import saepatch as sp
from saepatch.errors import UserError
from saepatch.model.sites import Site
from training.config import SAEConfig
from training.data.activations import ActivationStream
from training.loop import checkpoints, trainer
from training.loop.checkpoints import Checkpoint
from training.loop.trainer import train_saes
from training.steps.initial import begun, initial_dictionaries

pytestmark = pytest.mark.whole

TESTS = Path(__file__).parents[1]
TIMES = {"time", "tokens_per_second"}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "saes"
    train_saes(model, documents(), small(), out)
    return out


def weights(out):
    return {file.parent.name: load_file(file) for file in out.glob("*/sae_weights.safetensors")}


def log_of(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def assert_same_run(out, whole):
    """Bit for bit the same dictionaries, and the same figures in the log."""
    ours, theirs = weights(out), weights(whole)
    assert ours.keys() == theirs.keys() != set()
    for site, tensors in theirs.items():
        assert all(torch.equal(ours[site][name], value) for name, value in tensors.items()), site
    assert log_of(out) == log_of(whole)


def stop_after(monkeypatch, steps):
    """Have the run asked to stop after so many steps, as by a signal."""
    taken = []

    def asked(run):
        taken.append(1)
        return len(taken) == steps

    monkeypatch.setattr(trainer.Run, "_stop_requested", asked)


def stopped_run(monkeypatch, model, out, steps, config=None, **changes):
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        outcome = train_saes(model, documents(), config or small(**changes), out)
    assert outcome.stopped
    assert outcome.figures == {}
    assert outcome.tokens == steps * 256
    return outcome


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(tmp_path):
    kills = 20
    done = subprocess.run(
        [sys.executable, str(TESTS / "common" / "interrupted.py"), str(tmp_path), str(kills), "0"],
        env=os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}/common", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert len(said["killed"]) == kills, said
    assert set(said["killed"]) == {"SIGTERM", "SIGINT", "SIGKILL"}
    assert said["codes"][-1] == 0, (said, done.stderr[-3000:])
    assert 3 in said["codes"]
    assert -signal.SIGKILL in said["codes"]
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert not (tmp_path / "run" / checkpoints.FOLDER).exists()


def test_what_a_process_left_that_was_killed_at_its_very_end_is_removed(model, whole, tmp_path):
    """Its summary was in place already: the same command only tidies up."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / ".part-77" / "resid_post.0").mkdir(parents=True)
    (out / checkpoints.FOLDER / ".part-77").mkdir(parents=True)
    outcome = train_saes(model, documents(), small(resume=True), out)
    assert outcome.figures
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.parametrize("steps", [8, 9, 12])
def test_no_activations_are_computed_that_no_step_needs(monkeypatch, model, tmp_path, steps):
    """Rounds have four batches here: the run ends with one, or in its midst."""
    rounds, real = [], ActivationStream._filled

    def filled(self, ids, number, stopping):
        rounds.append(number)
        return real(self, ids, number, stopping)

    monkeypatch.setattr(ActivationStream, "_filled", filled)
    tokens = {"tokens": steps * 256, "prefetch": True}
    train_saes(model, documents(), small(**tokens), tmp_path / "whole")
    assert rounds == list(range(-(-steps // 4)))
    stopped_run(monkeypatch, model, tmp_path / "run", 5, **tokens)
    rounds.clear()
    train_saes(model, documents(), small(resume=True, **tokens), tmp_path / "run")
    assert rounds == list(range(1, -(-steps // 4)))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("steps", [1, 7, 31])
def test_resumed_anywhere(monkeypatch, model, whole, tmp_path, steps):
    out = tmp_path / "run"
    stopped_run(monkeypatch, model, out, steps)
    assert {path.name for path in out.iterdir()} == {"metrics.jsonl", checkpoints.FOLDER}
    outcome = train_saes(model, documents(), small(resume=True), out)
    assert not outcome.stopped
    assert_same_run(out, whole)
    again = train_saes(model, documents(), small(resume=True), out)
    assert again.figures == outcome.figures


@pytest.mark.parametrize(
    "changes",
    [
        {"sae": SAEConfig(architecture="batchtopk", k=4, d_sae=48)},
        {"sae": SAEConfig(architecture="jumprelu", k=4, d_sae=48)},
        {"ema": 0.9, "pack": True, "prefetch": False},
        {"finetune_tokens": 1024},
    ],
    ids=["batchtopk", "jumprelu", "ema", "finetune"],
)
def test_resumed_with_other_settings(monkeypatch, model, tmp_path, changes):
    config = small(sites=["resid_post.1"], tokens=4096, **changes)
    train_saes(model, documents(), config, tmp_path / "whole")
    stopped_run(monkeypatch, model, tmp_path / "run", 9, config)
    train_saes(model, documents(), replace(config, resume=True), tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_the_newest_checkpoints_are_kept(monkeypatch, model, tmp_path):
    stopped_run(monkeypatch, model, tmp_path, 9, checkpoint_every=512, keep_checkpoints=3)
    assert sorted(int(path.name) for path in (tmp_path / checkpoints.FOLDER).iterdir()) == [1536, 2048, 2304]


@pytest.mark.parametrize("damage", ["cut", "state", "missing"])
def test_a_damaged_checkpoint_is_passed_over(monkeypatch, model, whole, tmp_path, damage, caplog):
    out = tmp_path / "run"
    stopped_run(monkeypatch, model, out, 9, checkpoint_every=512)
    last = out / checkpoints.FOLDER / f"{9 * 256:015d}"
    weights_file = last / "resid_post.1.safetensors"
    if damage == "cut":
        weights_file.write_bytes(weights_file.read_bytes()[:-100])
    elif damage == "missing":
        weights_file.unlink()
    else:
        (last / "state.json").write_text('{"tokens": 23')
    train_saes(model, documents(), small(resume=True), out)
    assert "is damaged" in caplog.text
    assert_same_run(out, whole)


def test_nothing_that_is_half_written_counts(tmp_path):
    tensors = {Site(0): {"weights/W": torch.arange(3.0)}}
    checkpoints.save(tmp_path, Checkpoint(100, tensors, {"step": 1}), keep=2)
    shutil.copytree(tmp_path / "checkpoints" / f"{100:015d}", tmp_path / "checkpoints" / ".part-77")
    found = checkpoints.newest(tmp_path)
    assert (found.tokens, found.state) == (100, {"step": 1})
    assert torch.equal(found.tensors[Site(0)]["weights/W"], torch.arange(3.0))


def test_a_full_disk_leaves_the_last_checkpoint(monkeypatch, model, whole, tmp_path):
    out, saved = tmp_path / "run", []
    real = checkpoints.save_file

    def full(tensors, file):
        saved.append(file)
        if len(saved) > 6:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, file)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", full)
        with pytest.raises(UserError, match=r"cannot write a checkpoint .*No space left.*--resume true"):
            train_saes(model, documents(), small(checkpoint_every=512), out)
    assert [path.name for path in sorted((out / checkpoints.FOLDER).iterdir())] == [f"{n:015d}" for n in (512, 1024)]
    train_saes(model, documents(), small(resume=True), out)
    assert_same_run(out, whole)


def test_weights_that_are_not_finite_are_never_checkpointed(monkeypatch, model, tmp_path):
    """Nor is anything lost of what was sound."""
    stopped_run(monkeypatch, model, tmp_path, 4)
    real = trainer.Run._train

    def poisoned(run, batch, rate, logged):
        figures = real(run, batch, rate, logged)
        if run.step == 6:
            run.learners[Site(1)].weights["W_enc"][0, 0] = float("nan")
        return figures

    monkeypatch.setattr(trainer.Run, "_train", poisoned)
    with pytest.raises(UserError, match="not finite at step 7"):
        train_saes(model, documents(), small(resume=True, checkpoint_every=256), tmp_path)
    assert max(int(path.name) for path in (tmp_path / checkpoints.FOLDER).iterdir()) == 6 * 256


def test_a_checkpoint_is_of_one_run_alone(monkeypatch, model, tmp_path):
    stopped_run(monkeypatch, model, tmp_path, 3)
    for changes, name in [({"lr": 1e-2}, "lr 0.003"), ({"sae": SAEConfig(k=5, d_sae=48)}, "sae.dead_after 4000")]:
        with pytest.raises(UserError, match=rf"holds a run with {name}"):
            train_saes(model, documents(), small(resume=True, **changes), tmp_path)
    with pytest.raises(UserError, match="another text"):
        train_saes(model, documents(seed=1), small(resume=True), tmp_path)
    with pytest.raises(UserError, match="another model"):
        train_saes(tiny_model(seed=1), documents(), small(resume=True), tmp_path)
    with pytest.raises(UserError, match="checkpoints of a stopped run: continue with --resume true"):
        train_saes(model, documents(), small(), tmp_path)


def test_overwrite_starts_anew(monkeypatch, model, whole, tmp_path):
    stopped_run(monkeypatch, model, tmp_path, 3)
    train_saes(model, documents(), small(overwrite=True), tmp_path)
    assert_same_run(tmp_path, whole)


def test_an_overwriting_run_that_is_stopped_is_gone_on_with(monkeypatch, model, tmp_path):
    """What is left of the run that it replaces is taken neither for it nor for its result."""
    first = train_saes(model, documents(), small(tokens=2048), tmp_path)
    other = small(tokens=2048, lr=1e-3, overwrite=True)
    stopped_run(monkeypatch, model, tmp_path, 3, other)
    resumed = train_saes(model, documents(), replace(other, resume=True, overwrite=False), tmp_path)
    assert resumed.figures != first.figures
    train_saes(model, documents(), replace(other, overwrite=False), tmp_path.parent / "alone")
    assert_same_run(tmp_path, tmp_path.parent / "alone")
    with pytest.raises(UserError, match="another text"):
        train_saes(model, documents(seed=1), replace(other, resume=True, overwrite=False), tmp_path)


def test_a_damaged_newest_checkpoint_does_not_cost_the_whole_ones(tmp_path):
    tensors = {Site(0): {"weights/W": torch.arange(3.0)}}
    for tokens in (100, 200):
        checkpoints.save(tmp_path, Checkpoint(tokens, tensors, {}), keep=2)
    (tmp_path / checkpoints.FOLDER / f"{200:015d}" / "state.json").write_text("{")
    checkpoints.save(tmp_path, Checkpoint(150, tensors, {}), keep=1)
    assert checkpoints.newest(tmp_path).tokens == 150


def test_stopped_in_fine_tuning(monkeypatch, model, tmp_path):
    """Sites that are done are kept; the one under way starts again, and ends alike."""
    config = small(tokens=2048, sites=["resid_post.0", "resid_post.1"], finetune_tokens=1024, log_every=1)
    train_saes(model, documents(), config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 8 + 6)
        assert train_saes(model, documents(), config, tmp_path / "run").stopped
    found = checkpoints.newest(tmp_path / "run")
    assert found.state["finetuned"] == 1
    train_saes(model, documents(), replace(config, resume=True), tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_full_disk_at_the_end(monkeypatch, model, whole, tmp_path):
    from sae_lens.saes.sae import SAE
    from safetensors import SafetensorError

    def full(*args, **kwargs):
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(SAE, "save_model", full)
        with pytest.raises(UserError, match=r"cannot write the dictionaries .*No space left.*--resume true"):
            train_saes(model, documents(), small(), tmp_path)
    train_saes(model, documents(), small(resume=True), tmp_path)
    assert weights(tmp_path).keys() == weights(whole).keys()
    assert all(torch.equal(weights(tmp_path)[s][n], v) for s, w in weights(whole).items() for n, v in w.items())


def test_a_model_in_training_mode_is_refused(tmp_path):
    model = tiny_model()
    model.hf.train()
    with pytest.raises(UserError, match="training mode"):
        train_saes(model, documents(), small(), tmp_path)


ARCHITECTURES = ["standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_initial_dictionary_computes_the_same(architecture, model, tmp_path):
    """A learner that begins with a saved dictionary gives it back, whatever the scale of activations."""
    config = small(tokens=1024, sites=["resid_post.1"], sae=SAEConfig(architecture, k=4, d_sae=48))
    train_saes(model, documents(), config, tmp_path)
    saved = sp.load_sae(str(tmp_path), site=Site(1))
    again = replace(config, initial=str(tmp_path))
    x = 3 * torch.randn(50, model.d_model, generator=torch.Generator().manual_seed(0))
    known = initial_dictionaries(model, [Site(1)], again)
    learner = begun(known[Site(1)], x, again)
    rebuilt = sp.Dictionary(learner.finish(), Site(1), "again")
    torch.testing.assert_close(rebuilt.encode(x[None]).acts, saved.encode(x[None]).acts, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rebuilt.sae(x), saved.sae(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk"])
@pytest.mark.parametrize("subtracts", [True, False])
def test_an_initial_dictionary_of_others_computes_the_same(architecture, subtracts, model):
    """Rows of any norm, and encoders that do or do not subtract the decoder's bias."""
    dictionary = random_dictionary("resid_post.1", architecture, d_sae=48)
    dictionary.sae.cfg.apply_b_dec_to_input = subtracts
    with torch.no_grad():
        if architecture == "topk":
            dictionary.sae.cfg.rescale_acts_by_decoder_norm = False
            dictionary.sae.W_dec.div_(dictionary.sae.W_dec.norm(dim=-1, keepdim=True))
        else:
            dictionary.sae.W_dec.mul_(1.7)
    config = small(sae=SAEConfig(architecture, k=4, d_sae=48))
    x = 3 * torch.randn(50, model.d_model, generator=torch.Generator().manual_seed(1))
    rebuilt = begun(dictionary, x, config).finish()
    if architecture == "topk":
        rebuilt.cfg.k = dictionary.sae.cfg.k
        rebuilt.activation_fn = dictionary.sae.activation_fn
    torch.testing.assert_close(rebuilt(x), dictionary.sae(x), rtol=1e-4, atol=1e-4)


def test_more_tokens_for_a_finished_run(monkeypatch, model, whole, tmp_path):
    """It begins where the first ended, resumes, and is another run once those dictionaries change."""
    config = small(initial=str(whole), seed=1)
    first = json.loads((whole / "summary.json").read_text())["sites"]
    stopped_run(monkeypatch, model, tmp_path / "run", 5, config)
    outcome = train_saes(model, documents(), replace(config, resume=True), tmp_path / "run")
    train_saes(model, documents(), config, tmp_path / "at once")
    assert_same_run(tmp_path / "run", tmp_path / "at once")
    assert all(row["fvu"] < first[str(site)]["fvu"] for site, row in outcome.figures.items())
    shutil.copytree(tmp_path / "at once", tmp_path / "other")
    (tmp_path / "again").mkdir()
    other = replace(config, initial=str(tmp_path / "other"), resume=True)
    with pytest.raises(UserError, match="holds a run of another initial dictionary"):
        train_saes(model, documents(), other, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sae": SAEConfig(k=4, d_sae=64)}, r"has 48 latents, not 64: set sae.d_sae to 48"),
        ({"sae": SAEConfig("gated", d_sae=48)}, r"is topk, not gated"),
        ({"sites": ["resid_pre.1"]}, r"has no dictionary of resid_pre.1"),
        ({"initial": "./nowhere"}, r"'./nowhere' is not a folder"),
    ],
)
def test_initial_dictionaries_that_do_not_fit(changes, message, model, whole, tmp_path):
    with pytest.raises(UserError, match=message):
        train_saes(model, documents(), small(**({"initial": str(whole)} | changes)), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_dictionaries_on_the_way(monkeypatch, architecture, model, tmp_path):
    """They are those of a run with as many tokens under the same schedule, and leave training as it is."""
    monkeypatch.setattr(trainer, "FIRST_TOKENS", 1024)
    config = small(sae=SAEConfig(architecture, k=4, d_sae=48), warmup=0, decay=0)
    train_saes(model, documents(), config, tmp_path / "plain")
    train_saes(model, documents(), replace(config, save_every=4096), tmp_path / "run")
    snapshots = tmp_path / "run" / "snapshots"
    assert [path.name for path in snapshots.iterdir()] == [f"{4096:015d}"]
    assert all(
        torch.equal(value, weights(tmp_path / "plain")[site][name])
        for site, tensors in weights(tmp_path / "run").items()
        for name, value in tensors.items()
    )
    train_saes(model, documents(), replace(config, tokens=4096), tmp_path / "short")
    ours, theirs = weights(snapshots / f"{4096:015d}"), weights(tmp_path / "short")
    assert all(torch.equal(ours[site][name], value) for site in theirs for name, value in theirs[site].items())
    about = sp.load_sae(str(snapshots / f"{4096:015d}"), site=Site(1)).cfg.metadata.to_dict()
    assert about["training_tokens"] == 4096


def test_dictionaries_on_the_way_are_not_fine_tuned_yet(model, tmp_path):
    config = small(tokens=2048, sites=["resid_post.1"], finetune_tokens=512, save_every=1024)
    train_saes(model, documents(), config, tmp_path)
    for folder, tuned in ((tmp_path / "snapshots" / f"{1024:015d}", 0), (tmp_path, 512)):
        assert sp.load_sae(str(folder), site=Site(1)).cfg.metadata.to_dict()["finetuning_tokens"] == tuned
