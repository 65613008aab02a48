"""Several processes train as one: the same batches, the same selection, the same dictionaries."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs_of_training import documents, small
from safetensors.torch import load_file
from tiny import tiny_model

from saepatch.errors import UserError
from saepatch.model.sites import Site
from training.config import SAEConfig
from training.loop.checks import check_model
from training.loop.trainer import train_saes
from training.ranks import ALONE, Ranks, joined

pytestmark = [pytest.mark.whole, pytest.mark.slow]

TESTS = Path(__file__).parents[1]
WORKER = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from runs_of_training import documents, small
from test_ranks import CONFIGS
from tiny import tiny_model
from training.ranks import joined
from training.loop.trainer import Run, train_saes

with joined(torch.device("cpu")) as ranks:
    real = Run._stop_requested
    def asked(run):
        # One process alone is asked; all of them stop.
        run.stop_request.stop = run.step == stop_at and ranks.rank == 1
        return real(run)
    Run._stop_requested = asked
    for stop_at, out in ((-1, Path(sys.argv[1])), (12, Path(sys.argv[2]))):
        for name, config in CONFIGS.items():
            train_saes(tiny_model(), documents(), config, out / name, ranks)
"""
CONFIGS = {
    architecture: small(
        tokens=30 * 256,
        sites=["resid_post.1"],
        resume=True,
        sae=SAEConfig(
            architecture=architecture,
            k=4,
            d_sae=48,
            dead_after=1000,
            levels=[0.5, 1],
            p_end=0.5,
            aux_share=0.05,  # 13 rows of 256: one process has more of them than the other
        ),
    )
    for architecture in ("topk", "batchtopk", "matryoshka", "jumprelu", "standard")
}
CONFIGS |= {  # each process has half of the latents
    f"{name}, latents divided": replace(CONFIGS[name], shard_latents=True, clip=0.5, ema=0.9, eval_every=5120)
    for name in ("topk", "batchtopk", "matryoshka")
}


def two_processes(whole, stopped):
    """Runs of two processes that are left alone, and others that are stopped after 12 steps."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = whole.parent / "worker.py"
    script.write_text(WORKER)
    done = subprocess.run(
        [*command, str(script), str(whole), str(stopped)],
        env=os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}/common:{TESTS}/training", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One process; two; and two that were stopped, with one that went on from there."""
    root = tmp_path_factory.mktemp("ranks")
    one, two, both = (root / name for name in ("one", "two", "both"))
    two_processes(two, both)
    for name, config in CONFIGS.items():
        train_saes(tiny_model(), documents(), config, one / name)
        assert not (both / name / "resid_post.1").exists()
        train_saes(tiny_model(), documents(), config, both / name)
    return one, two, both


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("which", ["two", "stopped and resumed by one"])
def test_two_processes_equal_one(runs, architecture, which):
    one, two, both = runs
    other = (two if which == "two" else both) / architecture
    ours, theirs = (load_file(out / "resid_post.1/sae_weights.safetensors") for out in (other, one / architecture))
    for name, value in theirs.items():
        away = (ours[name] - value).abs() / value.abs().max().clamp(min=1e-3)
        if architecture in ("jumprelu", "standard"):
            # Where rounding puts a value on the other side of a band's edge, its latent feels it.
            assert float(away.max()) < 1e-3, name
            away = away.flatten().quantile(0.95)
        assert float(away.max()) < 1e-5, name
    log, expected = (
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (other, one / architecture)
    )
    assert [row["step"] for row in log] == [row["step"] for row in expected]
    for row, wanted in zip(log[:-1], expected[:-1]):  # the last is a histogram
        for name in ("loss", "l0", "dead") if "resid_post.1/loss" in wanted else ():  # others are evaluations
            assert row[f"resid_post.1/{name}"] == pytest.approx(wanted[f"resid_post.1/{name}"], rel=1e-4, abs=1e-6)


def test_one_process_saves(runs):
    _, two, _ = runs
    assert {path.name for path in (two / "topk").iterdir() if not path.name.startswith(".")} == {
        "config.yaml", "metrics.jsonl", "metrics.summary.json", "summary.json", "artifacts.jsonl", "resid_post.1",
    }  # fmt: skip


def test_settings_under_which_latents_cannot_be_divided():
    config = small(sites=["resid_post.1"], shard_latents=True)

    def refused(match, **changes):
        with pytest.raises(UserError, match=match):
            check_model(tiny_model(), [Site(1)], replace(config, **changes), Ranks(0, 2))

    refused("is for topk, batchtopk, matryoshka, not for standard", sae=SAEConfig(architecture="standard", d_sae=48))
    refused("47 latents cannot be divided among 2", sae=SAEConfig(d_sae=47, k=4))
    refused("needs whole dictionaries", finetune_tokens=256)


def test_alone_nothing_is_exchanged():
    x = torch.arange(4.0)
    assert ALONE.first
    assert ALONE.gathered(x) is x
    ALONE.mean_([x])
    assert x.tolist() == [0, 1, 2, 3]
    with joined(torch.device("cpu")) as ranks:
        assert ranks == ALONE


def test_a_batch_is_divided_evenly():
    with pytest.raises(
        UserError, match="batch_size 256 cannot be divided among 3 processes: use a multiple, as in 258"
    ):
        check_model(tiny_model(), [], small(), Ranks(0, 3))
