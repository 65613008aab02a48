"""The benchmark of training on tiny shapes: both sides train the same thing. Times are never asserted."""

import json

import pytest
import torch

from experiments.benchmarks import training
from experiments.benchmarks.trainers import OURS, SAE_LENS, SIDES, Planted, Task, settled_weights, start_weights
from saepatch.cli.parser import run_config
from training.steps.learner import DESIGNS

pytestmark = pytest.mark.whole

TINY = {"d_in": 16, "d_sae": 64, "k": 4, "batch": 32}


def run(*arguments):
    return run_config(training.TrainingBenchmark, training.run, "training", list(arguments))


def test_what_it_prints_and_writes(tmp_path, capsys):
    variants = ["topk_fp32", "topk_dead_fp32", "jumprelu_fp32", "jumprelu_settled_fp32"]
    code = run("--quick=true", "--memory=false", f"--variants={json.dumps(variants)}", f"--out={tmp_path}")
    assert code == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["ratios"]) == set(variants)
    assert all(value > 0 for value in summary["ratios"].values())
    for what in ("fvu", "l0", "mmcs"):
        assert set(summary[what]) == {"topk_fp32", "jumprelu_fp32"}  # quality is of those from their own start
        assert set(summary[what]["topk_fp32"]) == {OURS, SAE_LENS}
    assert set(summary["auxiliary"]) == {OURS, SAE_LENS}
    printed = capsys.readouterr().out
    assert all(name in printed for name in variants)


@pytest.mark.slow
def test_memory_is_that_of_a_fresh_process(tmp_path):
    options = ["--memory=true", '--variants=["topk_fp32"]', "--quality_rates=[]", "--rounds=1", "--steps=1"]
    assert run(*options, "--d_sae=4096", "--d_in=256", "--batch=512", f"--out={tmp_path}") == 0
    peaks = json.loads((tmp_path / "summary.json").read_text())["peak_mb"]["topk_fp32"]
    state = 4 * 2 * 4 * 4096 * 256 / 2**20  # W_enc and W_dec with gradients and Adam's two moments
    assert state < peaks[OURS] < peaks[SAE_LENS]


@pytest.mark.parametrize("architecture", sorted(DESIGNS))
@pytest.mark.parametrize("state", ["start", "settled"])
def test_both_sides_have_the_same_dictionary(architecture, state):
    """From the same weights, the same error; of settled ones, about k latents are active."""
    task = Task(architecture, **TINY)
    planted = Planted.of(task.d_in, task.k, 0)
    x = planted.rows(256, 0)
    weights = (settled_weights if state == "settled" else lambda task, x: start_weights(task))(task, x)
    losses = {}
    for name, side in SIDES.items():
        made = side(task, x)
        made.start(weights)
        losses[name] = made.loss(x)
    assert losses[OURS] == pytest.approx(losses[SAE_LENS], rel=1e-5)
    if state == "settled" and architecture in training.PENALISED:
        active = (x @ weights["W_enc"].T > weights.get("threshold", -weights.get("b_enc", 0))).sum(-1)
        if architecture != "gated":
            assert float(active.float().mean()) == pytest.approx(task.k, abs=0.1)


def test_rows_sum_up_planted_directions():
    planted = Planted.of(16, 3, seed=0)
    rows = planted.rows(500, seed=1)
    assert float(rows.norm(dim=-1).mean()) == pytest.approx(4, rel=0.15)
    assert torch.equal(rows, planted.rows(500, seed=1))
    assert not torch.equal(rows, planted.rows(500, seed=2))


def test_the_penalty_is_set_for_as_many_active_latents():
    tried = []

    def figures(penalty):
        tried.append(penalty)
        return {"l0": 40 * penalty**-0.9, "fvu": 0.1 * penalty}

    found = training.at_l0(25.0, figures)
    assert found["l0"] == pytest.approx(25, rel=0.02)
    assert len(tried) <= 4


def test_out_of_reach_the_nearest_is_taken():
    found = training.at_l0(1.0, lambda penalty: {"l0": 10 / (1 + 1e-9 * penalty), "fvu": 0.5})
    assert found["l0"] <= 10


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (['--variants=["topk_fp16"]'], "unknown variant 'topk_fp16'"),
        (["--variants=[]"], "no variants"),
        (["--rounds=0"], "rounds = 0"),
    ],
)
def test_what_it_refuses(arguments, said, capsys):
    assert run(*arguments) == 2
    assert said in capsys.readouterr().err
