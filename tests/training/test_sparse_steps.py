"""The sparse training steps against sae_lens' own forward pass and autograd."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import Barrier

import pytest
import torch
from torch import Tensor

from training.config import SAEConfig
from training.ranks import ALONE, Ranks
from training.steps import selection, sparse
from training.steps.step import Moment, Step, StepFunction, Weights, bfloat16_works

D_IN, D_SAE, BATCH, K = 24, 96, 64, 5
LEVELS = [0.125, 0.375, 0.75, 1.0]
STEPS: dict[str, StepFunction] = {
    "topk": sparse.topk,
    "batchtopk": sparse.batchtopk,
    "matryoshka": sparse.matryoshka,
}
DEAD = {"none": [], "some": list(range(3, 60, 8)), "many": list(range(1, 96, 2)), "all but one": list(range(95))}


def settings(architecture: str, k: int = K, **changes: object) -> SAEConfig:
    config = SAEConfig(architecture=architecture, k=k, levels=LEVELS, aux_share=1.0, aux_coefficient=0.7)
    return replace(config, **changes)


def setting(d_in: int = D_IN, d_sae: int = D_SAE, batch: int = BATCH, seed: int = 0, bias: float = 0.0):
    g = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=g), dim=-1)
    weights = {
        "W_enc": rows + 0.1 * torch.randn(d_sae, d_in, generator=g),
        "W_dec": rows,
        "b_enc": bias + 0.3 * torch.randn(d_sae, generator=g),
        "b_dec": torch.randn(d_in, generator=g),
    }
    return weights, 2 * torch.randn(batch, d_in, generator=g)


def moment(dead: str, d_sae: int = D_SAE) -> Moment:
    if not DEAD[dead]:
        return Moment()
    mask = torch.zeros(d_sae, dtype=torch.bool)
    mask[DEAD[dead]] = True
    return Moment(dead=mask)


def reference(weights: Weights, x: Tensor, config: SAEConfig, now: Moment) -> Step:
    """sae_lens' losses, and what autograd makes of them."""
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    d_sae, d_in = weights["W_dec"].shape
    common = {
        "d_in": d_in,
        "d_sae": d_sae,
        "k": config.k,
        "aux_loss_coefficient": config.aux_coefficient,
        "rescale_acts_by_decoder_norm": False,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
    }
    widths = [round(level * d_sae) for level in config.levels]
    if config.architecture == "topk":
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**common))
    elif config.architecture == "batchtopk":
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**common))
    else:
        own = MatryoshkaBatchTopKTrainingSAEConfig(**common, matryoshka_widths=widths)
        sae = MatryoshkaBatchTopKTrainingSAE(own)
    sae.load_state_dict({**weights, "W_enc": weights["W_enc"].T.contiguous()}, strict=False)
    output = sae.training_forward_pass(
        TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=now.dead, n_training_steps=0, is_logging_step=False)
    )
    output.loss.backward()
    named = {"mse_loss": "mse", "auxiliary_reconstruction_loss": "auxiliary"}
    named |= {f"inner_mse_loss_{width}": f"mse_{width}" for width in widths}
    losses = {named[name]: value.detach() for name, value in output.losses.items()}
    if now.dead is None:
        assert losses.pop("auxiliary") == 0
    gradients = {name: getattr(sae, name).grad for name in weights}
    gradients["W_enc"] = gradients["W_enc"].T
    acts = output.feature_acts.detach()
    smallest = acts[acts > 0].min() if bool((acts > 0).any()) else torch.tensor(0.0)
    return Step(
        losses,
        gradients,
        (acts > 0).any(0),
        (acts > 0).sum() / len(x),
        None if config.architecture == "topk" else smallest,
    )


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))


def assert_same(found: Step, wanted: Step, tolerance: float = 1e-5) -> None:
    assert found.losses.keys() == wanted.losses.keys()
    for name, value in wanted.losses.items():
        assert error(found.losses[name], value) < tolerance, name
    assert found.gradients.keys() == wanted.gradients.keys()
    for name, value in wanted.gradients.items():
        assert found.gradients[name].shape == value.shape
        assert error(found.gradients[name], value) < tolerance, name
    assert torch.equal(found.fired, wanted.fired)
    assert error(found.l0, wanted.l0) < 1e-6
    assert (found.smallest is None) == (wanted.smallest is None)
    if wanted.smallest is not None:
        assert error(found.smallest, wanted.smallest) < tolerance


@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("architecture", STEPS)
def test_a_step_is_sae_lens_own(architecture: str, dead: str) -> None:
    weights, x = setting()
    before = {name: value.clone() for name, value in weights.items()}
    config, now, given = settings(architecture), moment(dead), x.clone()
    found = STEPS[architecture](weights, x, config, now, ALONE)
    assert_same(found, reference(weights, x, config, now))
    assert torch.equal(x, given)
    assert all(torch.equal(weights[name], before[name]) for name in weights)


@pytest.mark.parametrize("bias", [-4.0, -9.0, 3.0])
@pytest.mark.parametrize("architecture", STEPS)
def test_few_or_many_positive_values(architecture: str, bias: float) -> None:
    weights, x = setting(bias=bias)
    config = settings(architecture)
    found = STEPS[architecture](weights, x, config, Moment(), ALONE)
    assert_same(found, reference(weights, x, config, Moment()))
    assert (float(found.l0) < K - 0.5) == (bias < 0)


@pytest.mark.parametrize("architecture", STEPS)
def test_nothing_is_active(architecture: str) -> None:
    weights, x = setting(bias=-99.0)
    config = settings(architecture)
    found = STEPS[architecture](weights, x, config, moment("some"), ALONE)
    assert_same(found, reference(weights, x, config, moment("some")))
    assert not found.fired.any()
    assert found.l0 == 0
    assert found.smallest is None or found.smallest == 0


@pytest.mark.parametrize("d_sae", [40, 97, 160])
@pytest.mark.parametrize("architecture", STEPS)
def test_other_widths(architecture: str, d_sae: int) -> None:
    """Groups of other sizes, and none."""
    weights, x = setting(d_sae=d_sae)
    now = moment("some", d_sae) if d_sae > 60 else Moment()
    config = settings(architecture, k=2)
    assert_same(STEPS[architecture](weights, x, config, now, ALONE), reference(weights, x, config, now))


@pytest.mark.parametrize("architecture", STEPS)
def test_more_latents_than_16_bits_hold(architecture: str) -> None:
    weights, x = setting(d_in=4, d_sae=70_000, batch=40)
    config = settings(architecture)
    dead = torch.zeros(70_000, dtype=torch.bool)
    dead[66_000:66_100] = True
    now = Moment(dead=dead)
    found = STEPS[architecture](weights, x, config, now, ALONE)
    assert found.fired[65_536:].any()
    assert_same(found, reference(weights, x, config, now))


@pytest.mark.parametrize("architecture", STEPS)
def test_chunks_of_rows_change_nothing(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, x = setting()
    config, now = settings(architecture, aux_share=0.6), moment("many")
    whole = STEPS[architecture](weights, x, config, now, ALONE)
    monkeypatch.setattr(selection, "FEWEST_ROWS", 7)
    monkeypatch.setattr(selection, "CHUNK_BYTES", {"cpu": 1})
    assert_same(STEPS[architecture](weights, x, config, now, ALONE), whole, 2e-6)


@pytest.mark.parametrize(("first", "rest"), [(50.0, 0.1), (0.1, 50.0)])
@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
def test_a_first_chunk_unlike_the_rest(
    architecture: str, first: float, rest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guess made from it fails, or holds back little."""
    weights, x = setting(batch=400, d_sae=1024)
    x = (x - weights["b_dec"]) * torch.where(torch.arange(400) < 100, first, rest).unsqueeze(1) + weights["b_dec"]
    monkeypatch.setattr(selection, "FEWEST_ROWS", 100)
    monkeypatch.setattr(selection, "CHUNK_BYTES", {"cpu": 1})
    walks = []
    chunks = selection.Encoder.chunks
    monkeypatch.setattr(selection.Encoder, "chunks", lambda encoder: walks.append(1) or chunks(encoder))
    config, now = settings(architecture, k=2), moment("some", 1024)
    assert_same(STEPS[architecture](weights, x, config, now, ALONE), reference(weights, x, config, now))
    assert len(walks) == (2 if first > rest else 1)


@pytest.mark.parametrize("architecture", STEPS)
def test_auxiliary_loss_over_a_share_is_that_of_its_positions(architecture: str) -> None:
    weights, x = setting()
    now = moment("many")
    found = STEPS[architecture](weights, x, settings(architecture, aux_share=0.25), now, ALONE)
    without = STEPS[architecture](weights, x, settings(architecture, aux_coefficient=0.0), now, ALONE)
    assert "auxiliary" not in without.losses
    # Autograd of the auxiliary loss alone, of the first quarter, with what the whole dictionary leaves over of it.
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    pre = (x[:16] - leaves["b_dec"]) @ leaves["W_enc"].T + leaves["b_enc"]
    everywhere = (x - weights["b_dec"]) @ weights["W_enc"].T + weights["b_enc"]
    bar = everywhere.relu().flatten().topk(K * BATCH).values[-1]
    bar = everywhere.topk(K).values[:, -1:] if architecture == "topk" else bar
    acts = torch.where(everywhere >= bar, everywhere.relu(), 0.0)
    residual = (x - weights["b_dec"] - acts @ weights["W_dec"])[:16]
    assert now.dead is not None
    kept = torch.where(now.dead, pre, -torch.inf).topk(D_IN // 2)
    decoded = torch.zeros_like(pre).scatter(1, kept.indices, kept.values) @ leaves["W_dec"]
    loss = 0.7 * (decoded - residual).pow(2).sum(-1).mean()
    loss.backward()
    assert error(found.losses["auxiliary"], loss.detach()) < 1e-5
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert error(found.gradients[name] - without.gradients[name], leaf.grad) < 1e-5, name


@pytest.mark.parametrize("architecture", STEPS)
def test_bfloat16_is_near(architecture: str) -> None:
    weights, x = setting()
    fine = STEPS[architecture](weights, x, settings(architecture), moment("some"), ALONE)
    config = settings(architecture, precision="bfloat16")
    coarse = STEPS[architecture](weights, x, config, moment("some"), ALONE)
    assert coarse.gradients["W_enc"].dtype == torch.float32
    for name, value in fine.losses.items():
        assert error(coarse.losses[name], value) < 0.02, name
    for name, value in fine.gradients.items():
        assert error(coarse.gradients[name], value) < 0.15, name
    same = torch.equal(coarse.gradients["W_dec"], fine.gradients["W_dec"])
    assert same != bfloat16_works(x.device)


@dataclass(frozen=True)
class Meeting(Ranks):
    """One of several processes, played by threads."""

    barrier: Barrier = field(default_factory=lambda: Barrier(1))
    table: dict[int, Tensor] = field(default_factory=dict)

    def gathered(self, values: Tensor) -> Tensor:
        self.table[self.rank] = values
        self.barrier.wait(10)
        parts = [self.table[rank] for rank in range(self.size)]
        self.barrier.wait(10)
        assert len({len(part) for part in parts}) == 1, "each process gives as many"
        return torch.cat(parts)


def in_ranks(step: StepFunction, weights: Weights, shares: list[Tensor], config: SAEConfig, now: Moment) -> list[Step]:
    barrier, table = Barrier(len(shares)), {}
    with ThreadPoolExecutor(len(shares)) as pool:
        everyone = [Meeting(rank, len(shares), None, barrier, table) for rank in range(len(shares))]
        return list(pool.map(lambda x, ranks: step(weights, x, config, now, ranks), shares, everyone))


@pytest.mark.parametrize("scale", [1.0, 6.0])
@pytest.mark.parametrize("architecture", STEPS)
def test_two_processes_are_one(architecture: str, scale: float) -> None:
    weights, x = setting(seed=3)
    x = torch.cat([x[:32] * scale, x[32:]])  # at 6, nearly all active values are in the first process
    config, now = settings(architecture), moment("some")
    whole = STEPS[architecture](weights, x, config, now, ALONE)
    halves = in_ranks(STEPS[architecture], weights, [x[:32], x[32:]], config, now)
    for name, value in whole.gradients.items():
        assert error((halves[0].gradients[name] + halves[1].gradients[name]) / 2, value) < 1e-5, name
    for name, value in whole.losses.items():
        assert error((halves[0].losses[name] + halves[1].losses[name]) / 2, value) < 1e-5, name
    assert torch.equal(halves[0].fired | halves[1].fired, whole.fired)
    assert float(halves[0].l0 + halves[1].l0) / 2 == pytest.approx(float(whole.l0))
    if architecture != "topk":
        assert scale == 1 or halves[0].l0 > 2 * halves[1].l0
        assert halves[0].smallest == halves[1].smallest == whole.smallest


@pytest.mark.parametrize("architecture", STEPS)
def test_of_equal_values_no_more_are_taken_than_wanted(architecture: str) -> None:
    weights, x = setting()
    weights |= {"W_enc": torch.zeros(D_SAE, D_IN), "b_enc": torch.ones(D_SAE)}
    found = STEPS[architecture](weights, x, settings(architecture), Moment(), ALONE)
    assert found.l0 == K
    if architecture != "topk":
        assert found.smallest == 1
    halves = in_ranks(STEPS[architecture], weights, [x[:32], x[32:]], settings(architecture), Moment())
    assert float(halves[0].l0 + halves[1].l0) == 2 * K


def test_largest_finds_the_largest_of_every_row() -> None:
    for n, k in [(4096, 32), (4096, 1), (512, 40), (96, 96), (97, 3), (1024, 8)]:
        values = torch.randn(20, n, generator=torch.Generator().manual_seed(n + k))
        found = values.gather(1, selection.largest(values, k)).sort().values
        assert torch.equal(found, values.topk(k).values.flip(1)), (n, k)


def test_more_latents_wanted_than_there_are() -> None:
    weights, x = setting()
    config = settings("batchtopk", k=D_SAE)
    assert_same(sparse.batchtopk(weights, x, config, Moment(), ALONE), reference(weights, x, config, Moment()))
