"""A dictionary in training: what it starts from, a step, what is saved of it, what a checkpoint holds of it."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import tiny_model

import saepatch as sp
from saepatch.dictionaries.loading import load_sae
from saepatch.errors import UserError
from saepatch.model.hooks import capture, edit_sites
from saepatch.model.sites import Site
from training.config import SAEConfig, TrainingConfig
from training.steps.learner import DESIGNS, Learner, geometric_median, reconstruction, schedule

pytestmark = pytest.mark.whole

ARCHITECTURES = sorted(DESIGNS)
D_IN, D_SAE = 16, 48


def settings(architecture="topk", **changes):
    sae = {
        "architecture": architecture,
        "k": 4,
        "d_sae": D_SAE,
        "dead_after": 2000,
        "sparsity": 0.3,
        "levels": [0.25, 1],
    }
    run = {name: changes.pop(name) for name in list(changes) if name in TrainingConfig.__dataclass_fields__}
    return TrainingConfig(**({"tokens": 64 * 60, "batch_size": 64} | run), sae=SAEConfig(**(sae | changes)))


def sparse_sums(n=3000, d_in=D_IN, features=32, active=3, seed=0):
    """Sums of a few of some random directions, off centre; and the directions."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.nn.functional.normalize(torch.randn(features, d_in, generator=generator), dim=-1)
    chosen = torch.rand(n, features, generator=generator).argsort(-1)[:, :active]
    values = torch.zeros(n, features).scatter_(-1, chosen, 1 + torch.rand(n, active, generator=generator))
    return 7 * (values @ truth + 0.3), truth


def train(run, x, steps=60, rate=5e-3, learner=None, first=0):
    learner = learner or Learner.new(x, run, seed=0)
    for step in range(first, steps):
        start = step * run.batch_size % (len(x) - run.batch_size)
        learner.step(x[start : start + run.batch_size], rate * schedule(step, steps, 0.05, 0.3))
    return learner


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_is_what_was_trained(architecture, tmp_path):
    """Our weights, sae_lens' loader and our splice say the same of an activation."""
    from sae_lens import SAE

    model = tiny_model()
    tokens = model.pad([model.encode(text) for text in ("a cat sat here", "two dogs")])
    x = capture(model.hf, model.layout, [Site(1)], model.inputs(tokens))[Site(1)]
    seen = x.flatten(0, 1)[torch.arange(640) % x[..., 0].numel()]
    learner = train(
        settings(architecture), seen + 0.1 * torch.randn(seen.shape, generator=torch.Generator().manual_seed(0))
    )
    if architecture == "gated":
        learner.weights["r_mag"].normal_(0, 0.2)
    with torch.no_grad():
        ours = reconstruction(learner.weights, learner.scale, learner.threshold, learner.config)(x)
    learner.finish().save_model(tmp_path)
    (cfg := json.loads((tmp_path / "cfg.json").read_text()))["metadata"]["hook_name"] = Site(1).hook_name
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    assert cfg["architecture"] == DESIGNS[architecture].saved_as
    assert cfg["metadata"]["training_architecture"] == architecture

    theirs, dictionary = SAE.load_from_disk(tmp_path), load_sae(str(tmp_path))
    assert theirs.cfg.normalize_activations == "none"
    assert theirs.encode(x).gt(0).any()
    torch.testing.assert_close(theirs.decode(theirs.encode(x)), ours, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dictionary.encode(x).reconstruction, ours, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs.W_dec.norm(dim=-1), torch.ones(D_SAE))
    with sp.splice(model, dictionary, error="drop"):
        spliced = model.logits(tokens)
    with edit_sites(model.layout, {Site(1): lambda value: torch.where(tokens.ordinary[..., None], ours, value)}):
        written = model.logits(tokens)
    torch.testing.assert_close(spliced[tokens.ordinary], written[tokens.ordinary], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_learns(architecture):
    x, _ = sparse_sums()
    run = settings(architecture, sparsity=0.05)
    learner = Learner.new(x, run, seed=0)
    before = learner.figures(x, learner.step(x, 0.0))
    train(run, x, 250, learner=learner)
    after = learner.figures(x, learner.step(x, 0.0))
    assert after["fvu"] < 0.5 * before["fvu"]
    torch.testing.assert_close(learner.weights["W_dec"].norm(dim=-1), torch.ones(D_SAE))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_restored_learner_goes_on_bit_for_bit(architecture):
    x, _ = sparse_sums()
    run = settings(architecture, ema=0.9)
    whole = train(run, x)
    half = train_part(run, x, 30)
    tensors = {name: value.clone() for name, value in half.tensors().items()}
    numbers = json.loads(json.dumps(half.numbers()))
    resumed = train(run, x, learner=Learner.restored(tensors, numbers, run), first=30)
    assert resumed.numbers() == whole.numbers()
    for name, value in whole.tensors().items():
        assert torch.equal(resumed.tensors()[name], value), name


def train_part(run, x, until):
    learner = Learner.new(x, run, seed=0)
    for step in range(until):
        start = step * run.batch_size % (len(x) - run.batch_size)
        learner.step(x[start : start + run.batch_size], 5e-3 * schedule(step, 60, 0.05, 0.3))
    return learner


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka"])
def test_planted_features_are_found(architecture):
    x, truth = sparse_sums(10_240, 24, 32)
    run = settings(architecture, k=3, d_sae=64, dead_after=5000, tokens=128 * 400, batch_size=128)
    found = train(run, x, 400).finish()
    cosine = (truth @ found.W_dec.T).amax(-1)
    assert cosine.mean() > 0.95, f"mean max cosine {cosine.mean():.3f}"


def test_batchtopk_keeps_about_k_when_saved():
    x, _ = sparse_sums()
    sae = train(settings("batchtopk"), x, 400).finish()
    assert float((sae.encode(x) > 0).sum(-1).float().mean()) == pytest.approx(4, rel=0.25)


def test_the_scale_makes_one_learning_rate_serve_all():
    x, _ = sparse_sums()
    small, large = train(settings(), x), train(settings(), x * 1000)
    torch.testing.assert_close(small.weights["W_dec"], large.weights["W_dec"], atol=1e-4, rtol=1e-3)
    assert small.scale == pytest.approx(1000 * large.scale)


@pytest.mark.parametrize(("bias", "centre"), [("mean", 1.0), ("median", 0.0), ("zero", 0.0)])
def test_where_the_decoder_bias_starts(bias, centre):
    """A few far outliers move the mean, and hardly the geometric median."""
    x = torch.randn(1000, D_IN, generator=torch.Generator().manual_seed(0)) * 0.01
    x[:10] += 100
    learner = Learner.new(x, settings(bias=bias), seed=0)
    torch.testing.assert_close(learner.weights["b_dec"] / learner.scale, torch.full((D_IN,), centre), atol=0.05, rtol=0)


def test_geometric_median_is_nearest_to_all():
    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(1)).exp()
    median = geometric_median(x)
    summed = (x - median).norm(dim=-1).sum()
    for step in (1e-2 * torch.eye(3)).repeat(2, 1) * torch.tensor([1.0, 1, 1, -1, -1, -1])[:, None]:
        assert (x - median - step).norm(dim=-1).sum() >= summed


def test_averaged_weights_are_saved_in_their_place():
    x, _ = sparse_sums()
    learner = train(settings(ema=0.99), x, rate=2e-2)
    averaged, last = learner.finish(), replace_average(learner)
    assert not torch.allclose(averaged.W_dec, last.W_dec, atol=1e-3)
    torch.testing.assert_close(averaged.W_dec.norm(dim=-1), torch.ones(D_SAE))

    def error(sae):
        return (sae.decode(sae.encode(x)) - x).pow(2).mean()

    assert error(averaged) < 1.5 * error(last)


def replace_average(learner):
    average, learner.average = learner.average, None
    sae = learner.finish()
    learner.average = average
    return sae


def test_sparsity_rises_and_the_exponent_falls():
    run = settings("standard", sparsity=2.0, sparsity_warmup=0.5, p_end=0.5)
    learner = Learner.new(sparse_sums()[0], run, seed=0)
    seen = []
    for _ in range(run.steps):
        seen.append(learner.moment())
        learner.updates += 1
    assert seen[0].sparsity == pytest.approx(2 / 30)
    assert seen[29].sparsity == seen[-1].sparsity == 2.0
    assert (seen[0].p, seen[-1].p) == (1.0, 0.5)


def test_dead_latents_are_those_idle_for_long():
    run = settings(dead_after=128, aux_coefficient=0.0)
    x, _ = sparse_sums()
    learner = Learner.new(x, run, seed=0)
    learner.weights["b_enc"][:10] = -1e6
    assert learner.moment().dead is None
    train(run, x, 2, rate=0.0, learner=learner)
    assert learner.dead[:10].all()
    assert not learner.dead.all()
    assert torch.equal(learner.moment().dead, learner.dead)


@pytest.mark.parametrize("clip", [0.0, 1e-12])
def test_gradients_are_clipped(clip):
    """Adam hardly sees the size of a gradient, but for its own epsilon: a tiny one moves the weights less."""
    x, _ = sparse_sums()
    learner = Learner.new(x, settings(clip=clip), seed=0)
    before = learner.weights["W_enc"].clone()
    learner.step(x[:64], 1e-3)
    moved = (learner.weights["W_enc"] - before).abs().max()
    assert (moved > 5e-4) == (clip == 0)


def test_nothing_is_learnt_from_nothing():
    with pytest.raises(UserError, match="mean norm 0"):
        Learner.new(torch.zeros(10, D_IN), settings(), seed=0)
    with pytest.raises(UserError, match="64, but the dictionary has 48"):
        Learner.new(torch.ones(10, D_IN), replace(settings(), sae=SAEConfig(k=64, expansion=3)), seed=0)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
def test_the_threshold_is_estimated_anew_at_the_end(architecture):
    """The running one lags: after a few steps it leaves another number of latents active than k."""
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    sae = SAEConfig(architecture=architecture, k=4, d_sae=64, levels=[0.5, 1.0], threshold_rate=0.01)
    learner = Learner.new(x, TrainingConfig(sae=sae), 0)
    for _ in range(30):
        learner.step(x, 3e-3)
    before = float((learner.finish().encode(x) != 0).sum(-1).float().mean())
    learner.calibrate(x)
    after = float((learner.finish().encode(x) != 0).sum(-1).float().mean())
    assert after == pytest.approx(4, abs=0.01)
    assert abs(before - 4) > 0.1
    threshold = learner.threshold
    learner.calibrate(x[:0])  # no text: it stays
    assert learner.threshold == threshold
