"""The benchmark's code on tiny models: every variant gives our numbers. Times are never asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_model_and_sae

from experiments.benchmarks import patching
from experiments.benchmarks.common import cases, peers
from saepatch.cli.parser import run_config
from saepatch.data.pairs import PromptPair
from saepatch.model.loading.load import load_model

pytestmark = pytest.mark.whole

NNSIGHT = ("nnsight", "nnsight_batched")
TINY = {"layers": "3", "width": "24", "heads": "6", "vocabulary": "120", "latents": "96", "k": "6", "rounds": "2"}
TINY |= {"lengths": "[8,12]", "edits": "20", "peer_edits": "3", "batch_tokens": "48", "curve_tokens": "[8]"}
TINY |= {
    "curve_layers": "[1,2]",
    "differ": "0.2",
    "curve_differ": "[0.1,0.9]",
    "curve_edits": "[1,4]",
    "curve_sweep": "4",
}


def arguments(out, chosen, **changes):
    settings = TINY | {"peers": json.dumps(chosen), "out": str(out)} | changes
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


def run(out, chosen, **changes):
    given = arguments(out, chosen, **changes)
    return run_config(patching.PatchingConfig, patching.run, "patching", given)


def check(out, chosen, shapes=("gpt2", "llama"), lengths=(8, 12)):
    summary = json.loads((out / "summary.json").read_text())
    cases = {f"{shape}_{length}" for shape in shapes for length in lengths}
    assert set(summary["ratios"]) == {f"{case}_{peer}" for case in cases for peer in chosen}
    assert set(summary["ms_per_edit"]) == {f"{case}_{peer}" for case in cases for peer in (*chosen, "saepatch")}
    for key in ("floor_ratio", "attribution", "largest_effect"):
        assert set(summary[key]) == cases
    for times in ("ratios", "ms_per_edit", "floor_ratio", "attribution"):
        assert all(value > 0 for value in summary[times].values())
    assert 0 <= summary["max_abs_diff"] < 1e-4
    assert min(summary["largest_effect"].values()) > 100 * summary["max_abs_diff"]  # or agreeing would say little
    assert [point[0] for point in summary["curves"]["tokens"]] == [8]
    assert [point[0] for point in summary["curves"]["layers"]] == [1, 2]
    assert [point[0] for point in summary["curves"]["edits"]] == [1, 4]
    assert {"saepatch", "torch", "sae-lens", "transformer-lens", "nnsight"} <= set(summary["versions"])
    return summary


@pytest.mark.slow
def test_peers_give_our_numbers(tmp_path, capsys):
    chosen = [peer for peer in peers.PEERS if peer not in NNSIGHT]  # it patches torch for the whole process
    if reasons := [why for peer in chosen if (why := peers.missing(peer))]:
        pytest.skip("; ".join(reasons))
    assert run(tmp_path, chosen) == 0
    summary = check(tmp_path, chosen)
    assert summary["left_out"] == {}
    printed = capsys.readouterr().out
    for word in ("sae_lens", "transformer_lens", "hooks", "gpt2_8", "llama_12", "floor", "attribution"):
        assert word in printed


@pytest.mark.slow  # `make bench` checks it too
def test_nnsight_gives_our_numbers(tmp_path):
    if why := peers.missing("nnsight"):
        pytest.skip(why)
    command = [sys.executable, "-m", "experiments.benchmarks.patching", *arguments(tmp_path, NNSIGHT, lengths="[8]")]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check(tmp_path, NNSIGHT, lengths=(8,))


def test_a_model_from_a_folder_stands_beside_the_shapes(tmp_path, capsys, monkeypatch):
    save_model_and_sae(tmp_path)
    pair = PromptPair("Mary and John met, John", "Mary and John met, Mary", "x", "y")  # short, since tokens are bytes
    monkeypatch.setattr(cases, "PAIR", pair)
    monkeypatch.setattr(patching, "GEMM_FLOPS", 1e6)
    model = load_model(str(tmp_path / "model"))
    tokens = len(model.encode(pair.clean))
    assert run(tmp_path, ["hooks"], shapes="[]", model=str(tmp_path / "model")) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["ratios"]) == {f"llama_{tokens}_hooks"}
    assert 0 <= summary["max_abs_diff"] < 1e-4 < summary["largest_effect"][f"llama_{tokens}"]
    assert summary["busy"] is (summary["spread"][f"llama_{tokens}"] > patching.BUSY)
    assert ("busy machine" in capsys.readouterr().out) is summary["busy"]


@pytest.mark.slow
def test_what_is_not_installed_is_left_out_with_the_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert run(tmp_path, ["nnsight", "hooks"], shapes='["gpt2"]', lengths="[8]") == 0
    summary = check(tmp_path, ["hooks"], shapes=("gpt2",), lengths=(8,))
    assert summary["left_out"] == {"nnsight": "nnsight is not installed"}
    assert "skipped: nnsight (nnsight is not installed)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": "0"}, "rounds = 0"),
        ({"peers": '["pyvene"]'}, "unknown peer 'pyvene'"),
        ({"shapes": '["opt"]'}, "unknown shape 'opt'"),
        ({"lengths": "[2]"}, "no length below 4"),
        ({"curve_layers": "[3]"}, "use numbers below layers"),
        ({"device": "tpu"}, "use cpu or cuda"),
    ],
)
def test_bad_input(tmp_path, capsys, changes, message):
    assert run(tmp_path, ["hooks"], **changes) == 2
    assert message in capsys.readouterr().err
