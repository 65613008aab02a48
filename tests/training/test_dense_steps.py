"""Steps of standard, gated and JumpReLU dictionaries, against sae_lens' losses and autograd."""

import logging

import pytest
import torch
from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLU, JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import Step as Jump
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig

from training.config import SAEConfig, TrainingConfig
from training.ranks import ALONE
from training.steps import dense, selection
from training.steps.learner import Learner
from training.steps.step import Moment, bfloat16_works

D_IN, D_SAE, BATCH = 24, 96, 64
STEPS = {"standard": dense.standard, "gated": dense.gated, "jumprelu": dense.jumprelu}
PATHS = ["dense", "chunked", "sparse"]


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Each way through the step, the choice made before the data is seen; blocks are of three rows."""
    share = 1.0 if request.param == "sparse" else -1.0
    monkeypatch.setattr(dense, "_SPARSE_UP_TO", {torch.float32: share, torch.bfloat16: share})
    monkeypatch.setattr(dense, "_BLOCK", 3 * D_SAE * 4)
    if request.param != "dense":
        monkeypatch.setattr(dense, "_CHUNK", 20 * D_SAE * 4)
    return request.param


def weights(kind, shift=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    rows = torch.nn.functional.normalize(normal(D_SAE, D_IN), dim=-1)
    found = {"W_enc": 0.7 * rows + 0.05 * normal(D_SAE, D_IN), "W_dec": rows, "b_dec": 0.3 * normal(D_IN)}
    if kind == "gated":
        names = {"b_gate": shift, "b_mag": 0.1, "r_mag": 0.0}
    else:
        names = {"b_enc": shift}
    found |= {name: mean + 0.2 * normal(D_SAE) for name, mean in names.items()}
    if kind == "jumprelu":
        found["threshold"] = 0.3 + 0.2 * torch.rand(D_SAE, generator=generator)
        found["threshold"][:5] = 0.0
    return found


def batch(seed=1, n=BATCH):
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed)) + 0.5


def config(kind, **changes):
    return SAEConfig(architecture=kind, **({"d_sae": D_SAE, "k": 8, "bandwidth": 0.4} | changes))


def theirs(kind, w, x, config, sparsity):
    """sae_lens' own forward pass on the same weights."""
    shape = {"d_in": D_IN, "d_sae": D_SAE, "apply_b_dec_to_input": True, "normalize_activations": "none"}
    if kind == "standard":
        sae = StandardTrainingSAE(StandardTrainingSAEConfig(**shape))
    elif kind == "gated":
        sae = GatedTrainingSAE(GatedTrainingSAEConfig(**shape))
    else:
        options = {
            "jumprelu_bandwidth": config.bandwidth,
            "jumprelu_sparsity_loss_mode": config.penalty,
            "jumprelu_tanh_scale": config.tanh_scale,
            "jumprelu_ste_to_input": config.estimate_inputs,
            "target_l0": config.k,
        }
        sae = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**shape, **options))
    sae.load_state_dict({**w, "W_enc": w["W_enc"].T.contiguous()})
    output = sae.training_forward_pass(
        TrainStepInput(
            sae_in=x,
            coefficients={"l1": sparsity, "l0": sparsity},
            dead_neuron_mask=None,
            n_training_steps=0,
            is_logging_step=False,
        )
    )
    return sae, output


def their_losses(output):
    names = {
        "mse_loss": "mse",
        "l1_loss": "sparsity",
        "l0_loss": "sparsity",
        "auxiliary_reconstruction_loss": "auxiliary",
    }
    return {names[name]: value.detach() for name, value in output.losses.items()}


def plain(kind, w, x, config, now):
    """The loss written plainly, for autograd; decoder norms are the constant 1 in it. Latents and gradients."""
    w = {name: value.double().requires_grad_() for name, value in w.items()}
    x = x.double()
    h = (x - w["b_dec"]) @ w["W_enc"].T

    def error(acts):
        return (acts @ w["W_dec"] + w["b_dec"] - x).square().sum(-1).mean()

    if kind == "standard":
        acts = torch.relu(h + w["b_enc"])
        if now.p == 1:
            penalty = acts.sum(-1).mean()
        else:
            # A slope of p f^(p-1), bounded near 0, times the factor that makes the values of both penalties alike.
            slope = (now.p * acts.clamp(min=0.01) ** (now.p - 1)).detach()
            factor = (acts.sum() / (acts**now.p).sum()).detach()
            penalty = factor * (slope * acts).sum(-1).mean()
        loss = error(acts) + now.sparsity * penalty
    elif kind == "gated":
        gate = torch.relu(h + w["b_gate"])
        acts = (gate > 0) * torch.relu(h * w["r_mag"].exp() + w["b_mag"])
        loss = error(acts) + error(gate) + now.sparsity * gate.sum(-1).mean()
    else:
        pre = h + w["b_enc"]
        jump = (w["threshold"], config.bandwidth, config.estimate_inputs)
        acts = JumpReLU.apply(pre, *jump)
        l0 = Jump.apply(pre, *jump).sum(-1)
        penalty = {
            "step": l0,
            "quadratic": 2 / config.k * (l0 - config.k) ** 2,
            "tanh": torch.tanh(config.tanh_scale * acts).sum(-1),
        }[config.penalty]
        loss = error(acts) + now.sparsity * penalty.mean()
    loss.backward()
    return acts.detach(), {name: value.grad.float() for name, value in w.items()}


def difference(got, want):
    return float((got.float() - want.float()).norm() / want.float().norm().clamp(min=1e-12))


CASES = [
    ("standard", {}, 1.0),
    ("standard", {}, 0.6),
    ("gated", {}, 1.0),
    *[
        ("jumprelu", {"penalty": penalty, "estimate_inputs": inputs}, 1.0)
        for penalty in ("step", "tanh", "quadratic")
        for inputs in (False, True)
    ],
]


@pytest.mark.parametrize("shift", [0.0, -1.5], ids=["many", "few"])
@pytest.mark.parametrize(("kind", "changes", "p"), CASES)
def test_every_gradient_is_autograds_of_the_same_loss(kind, changes, p, shift, path):
    w, x, settings, now = weights(kind, shift), batch(), config(kind, **changes), Moment(sparsity=0.7, p=p)
    before = {name: value.clone() for name, value in w.items()}
    found = STEPS[kind](w, x, settings, now, ALONE)
    acts, gradients = plain(kind, w, x, settings, now)
    assert found.gradients.keys() == w.keys()
    for name, gradient in gradients.items():
        assert gradient.norm() > 0, name
        assert found.gradients[name].shape == w[name].shape
        assert difference(found.gradients[name], gradient) < 1e-5, name
    assert torch.equal(found.fired, acts.gt(0).any(0))
    assert float(found.l0) == pytest.approx(float(acts.gt(0).sum(-1).double().mean()), rel=1e-6)
    assert all(torch.equal(w[name], before[name]) for name in w)


@pytest.mark.parametrize("shift", [0.0, -1.5], ids=["many", "few"])
@pytest.mark.parametrize(("kind", "changes", "p"), CASES)
def test_losses_and_latents_are_those_of_sae_lens(kind, changes, p, shift, path):
    w, x, settings = weights(kind, shift), batch(), config(kind, **changes)
    found = STEPS[kind](w, x, settings, Moment(sparsity=0.7, p=p), ALONE)
    _, output = theirs(kind, w, x, settings, 0.7)
    # The annealed penalty is rescaled to the value of L1, so it holds for p < 1, too.
    want = their_losses(output)
    assert found.losses.keys() == want.keys()
    for name, value in want.items():
        assert difference(found.losses[name], value) < 1e-5, name
    assert torch.equal(found.fired, output.feature_acts.bool().any(0))
    assert float(found.l0) == pytest.approx(float(output.feature_acts.bool().float().sum(-1).mean()), rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "changes"), [case[:2] for case in CASES if case[2] == 1 and case[1].get("penalty") != "tanh"]
)
def test_gradients_are_those_of_sae_lens(kind, changes, path):
    w, x, settings = weights(kind), batch(), config(kind, **changes)
    found = STEPS[kind](w, x, settings, Moment(sparsity=0.7), ALONE)
    Learner.of(w, 1.0, TrainingConfig(sae=settings)).add_gains(found.gradients)  # sae_lens' penalty has norms in it
    sae, output = theirs(kind, w, x, settings, 0.7)
    output.loss.backward()
    for name, value in sae.named_parameters():
        gradient = value.grad.T if name == "W_enc" else value.grad
        assert difference(found.gradients[name], gradient) < 1e-5, name


@pytest.mark.parametrize("kind", STEPS)
def test_a_dictionary_with_nothing_active_still_learns_its_bias(kind, path):
    w, x = weights(kind, shift=-100.0), batch()
    found = STEPS[kind](w, x, config(kind, penalty="step"), Moment(sparsity=0.7), ALONE)
    assert float(found.l0) == 0
    assert not found.fired.any()
    torch.testing.assert_close(found.gradients["b_dec"], 2 * (w["b_dec"] - x).mean(0) * (2 if kind == "gated" else 1))
    assert not any(gradient.any() for name, gradient in found.gradients.items() if name != "b_dec")


def test_p_below_one_weighs_small_activations_more(path):
    w, x, settings = weights("standard"), batch(), config("standard")
    sums = [dense.standard(w, x, settings, Moment(sparsity=50.0, p=p), ALONE).gradients["b_enc"] for p in (1.0, 0.5)]
    acts, _ = plain("standard", w, x, settings, Moment())
    smallest, largest = acts.mean(0).argsort()[[0, -1]]
    assert sums[1][smallest] / sums[0][smallest] > sums[1][largest] / sums[0][largest]


def test_values_that_are_not_finite_show_in_the_loss(path):
    x = batch()
    x[3, 4] = float("nan")
    for kind, step in STEPS.items():
        assert not torch.isfinite(step(weights(kind), x, config(kind), Moment(), ALONE).losses["mse"]), kind


@pytest.mark.parametrize(("kind", "shift", "sparse"), [("jumprelu", -4.0, True), ("jumprelu", 0.0, False)])
def test_the_path_follows_the_share_of_latents_at_work(kind, shift, sparse, monkeypatch):
    taken = []
    ways = {name: getattr(dense, name) for name in ("_dense", "_sparse")}
    for name, way in ways.items():
        monkeypatch.setattr(dense, name, lambda *args, name=name, way=way: taken.append(name) or way(*args))
    dense.jumprelu(weights(kind, shift), batch(), config(kind), Moment(), ALONE)
    assert taken == ["_sparse" if sparse else "_dense"]


@pytest.mark.skipif(not bfloat16_works(torch.device("cpu")), reason="no bfloat16 products on this CPU")
@pytest.mark.parametrize(("kind", "changes", "p"), CASES)
def test_bfloat16_is_close_and_returns_float32(kind, changes, p, path):
    w, x, now = weights(kind), batch(), Moment(sparsity=0.7, p=p)
    found = STEPS[kind](w, x, config(kind, precision="bfloat16", **changes), now, ALONE)
    exact = STEPS[kind](w, x, config(kind, **changes), now, ALONE)
    for name, value in exact.losses.items():
        assert difference(found.losses[name], value) < 0.02, name
    for name, gradient in exact.gradients.items():
        assert found.gradients[name].dtype == torch.float32
        got = found.gradients[name]
        assert float((got * gradient).sum() / (got.norm() * gradient.norm())) > 0.99, name


def test_bfloat16_falls_back_where_it_is_not_at_hand(monkeypatch):
    monkeypatch.setattr(selection, "bfloat16_works", lambda device: False)
    w, x = weights("jumprelu"), batch()
    a, b = (
        dense.jumprelu(w, x, config("jumprelu", precision=precision), Moment(), ALONE)
        for precision in ("bfloat16", "float32")
    )
    assert all(torch.equal(a.gradients[name], b.gradients[name]) for name in w)


def test_compiling_leaves_other_steps_alone():
    def step(weights, x, config, now, ranks):
        raise AssertionError

    assert dense.compiled(step) is step


def test_without_a_compiler_steps_run_as_they_are(monkeypatch, caplog):
    def broken(*args, **options):
        raise RuntimeError("no g++ here\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    dense._compiled_passes.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert dense.compiled(dense.jumprelu) is dense.jumprelu
            assert dense.compiled(dense.gated) is dense.gated
        assert [record.getMessage().count("no g++ here") for record in caplog.records] == [1]
    finally:
        dense._compiled_passes.cache_clear()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("kind", "changes", "p"), CASES)
def test_compiled_is_eager(kind, changes, p, monkeypatch):
    monkeypatch.setattr(dense, "_SPARSE_UP_TO", {torch.float32: -1.0, torch.bfloat16: -1.0})
    step = dense.compiled(STEPS[kind])
    assert step is not STEPS[kind]
    for precision in ("float32", "bfloat16"):
        for sparsity in (0.7, 0.3):
            args = (
                weights(kind),
                batch(),
                config(kind, precision=precision, **changes),
                Moment(None, sparsity, p),
                ALONE,
            )
            got, want = step(*args), STEPS[kind](*args)
            for name, gradient in want.gradients.items():
                assert difference(got.gradients[name], gradient) < (1e-5 if precision == "float32" else 1e-2), name
            assert torch.equal(got.fired, want.fired)
