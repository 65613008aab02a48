"""The generation benchmark on tiny models: variants write the tokens of their edits by hand. Times are not asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.benchmarks import generation
from experiments.benchmarks.common import peers
from saepatch.cli.parser import run_config

pytestmark = pytest.mark.whole

TINY = {"layers": "2", "width": "24", "heads": "6", "vocabulary": "120", "latents": "96", "k": "6", "rounds": "1"}
TINY |= {"tokens": "9", "new_tokens": "6"}
OURS = {"no_edit", "add_one", "clamp_one", "full_clamp_topk", "full_splice"}


def arguments(out, chosen, **changes):
    settings = TINY | {"peers": json.dumps(chosen), "out": str(out)} | changes
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


def run(out, chosen, **changes):
    given = arguments(out, chosen, **changes)
    return run_config(generation.GenerationConfig, generation.run, "generation", given)


def check(out, chosen):
    summary = json.loads((out / "summary.json").read_text())
    overhead = summary["overhead"]
    assert set(overhead) == {"one_latent", *OURS, *chosen}
    assert overhead["one_latent"] == max(overhead["add_one"], overhead["clamp_one"])
    assert set(summary["ms_per_token"]) == {"bare", *OURS, *chosen}
    assert all(value > -1 for value in overhead.values())
    assert all(value > 0 for value in summary["ms_per_token"].values())
    assert {"saepatch", "torch", "sae-lens", "transformer-lens", "nnsight"} <= set(summary["versions"])
    return summary


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_the_bridge_writes_our_tokens(tmp_path, capsys, shape):
    if why := peers.missing("transformer_lens"):
        pytest.skip(why)
    assert run(tmp_path, ["sae_lens_bridge"], shape=shape) == 0
    assert check(tmp_path, ["sae_lens_bridge"])["left_out"] == {}
    printed = capsys.readouterr().out
    for word in ("bare", "full_splice", "sae_lens_bridge", "over bare"):
        assert word in printed


@pytest.mark.slow
def test_nnsight_writes_our_tokens(tmp_path):
    if why := peers.missing("nnsight"):
        pytest.skip(why)
    command = [sys.executable, "-m", "experiments.benchmarks.generation", *arguments(tmp_path, ["nnsight"])]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True)  # it patches torch
    assert done.returncode == 0, done.stderr
    check(tmp_path, ["nnsight"])


@pytest.mark.slow
def test_what_is_not_installed_is_left_out_with_the_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert run(tmp_path, ["nnsight"]) == 0
    assert check(tmp_path, [])["left_out"] == {"nnsight": "nnsight is not installed"}
    assert "skipped: nnsight (nnsight is not installed)" in capsys.readouterr().out


def test_a_variant_that_writes_other_tokens_is_found():
    given = {name: int(value) for name, value in TINY.items()}
    task = generation.make_task(generation.GenerationConfig(**given))
    variants = generation.ours(task)
    generation.check(task, variants)
    with pytest.raises(AssertionError, match="clamp_one writes other tokens"):
        generation.check(task, variants | {"clamp_one": variants["no_edit"]})


@pytest.mark.slow
def test_the_overhead_is_over_the_bare_runs_on_either_side():
    seconds = iter([1.0, 1.2, 1.0, 3.0, 2.0])  # bare, a, bare, b, bare
    now = [0.0]

    def take():
        now[0] += next(seconds)

    config = generation.GenerationConfig(rounds=1)
    found = generation.GenerationResults(config)
    generation.measure(found, take, {"a": take, "b": take}, lambda: now[0])
    assert found.overhead("a") == pytest.approx(0.2)
    assert found.overhead("b") == pytest.approx(1.0)
    assert torch.tensor(found.seconds["bare"]).tolist() == pytest.approx([1.0, 2.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": "0"}, "rounds = 0"),
        ({"layers": "1"}, "layers = 1"),
        ({"latents": "7"}, "use more than 7"),
        ({"peers": '["pyvene"]'}, "unknown peer 'pyvene'"),
        ({"shape": "opt"}, "unknown shape 'opt'"),
        ({"device": "tpu"}, "use cpu or cuda"),
    ],
)
def test_bad_input(tmp_path, capsys, changes, message):
    assert run(tmp_path, [], **changes) == 2
    assert message in capsys.readouterr().err
