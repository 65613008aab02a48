"""The experiments on circuits: what they find, write and keep; pooled self-repair of known repairs."""

import json

import numpy as np
import pytest

from experiments.circuits.settings import CircuitsConfig
from experiments.circuits.study import main
from experiments.self_repair import HALVES, RepairNode, SelfRepairConfig, pooled, verdict
from experiments.self_repair import main as repair_main
from saepatch.circuits.circuit import Circuit
from saepatch.circuits.residual.self_repair import SelfRepair
from saepatch.circuits.residual.stream_parts import StreamPart
from saepatch.errors import UserError
from saepatch.model.sites import Site


@pytest.mark.slow
def test_circuits_are_found_written_and_kept(tmp_path, capsys):
    sizes = {"select": 40, "tune": 8, "report": 10, "few": 6, "steps": 4}
    config = CircuitsConfig(tasks=("ioi",), sites=("resid_post.4",), out=str(tmp_path), **sizes)
    main(config)
    summary = json.loads((tmp_path / "summary.json").read_text())
    latents = summary["circuits"]["ioi, resid_post.4, integrated gradients"]
    assert latents["faithfulness"][0] > 0.8
    assert latents["random"] < latents["faithfulness"][0] / 2
    assert latents["size"] * 3 < latents["active"]
    assert len(Circuit.read(tmp_path / latents["circuit"]).nodes) == latents["size"]
    assert {"ioi, resid_post.4, exact patching", "ioi, resid_post.4, DBM"} < summary["circuits"].keys()
    assert summary["circuits"]["ioi, resid_post.4, DBM"]["accuracy"][0] > 0.5
    assert len(summary["edges"]) == 7  # by integrated gradients, those between latents alone
    for edges in summary["edges"].values():
        assert 0 < edges["size"] <= edges["possible"]
        assert edges["whole"][0] > 0.8
    assert "held-out pairs" in capsys.readouterr().out
    before = (tmp_path / "summary.json").read_text()
    main(config)
    assert (tmp_path / "summary.json").read_text() == before


def known(lost, repaired):
    """An ablation whose later MLP repairs some of what is lost, pair by pair."""
    lost, repaired = np.array(lost), np.array(repaired)
    part, zeros = StreamPart("mlp_out", 3), np.zeros(len(lost))
    return SelfRepair(
        "node", "resample", np.arange(len(lost)), repaired - lost, -lost, (part,), repaired[:, None], zeros
    )


def test_repair_by_depth_is_a_ratio_of_sums_over_nodes_and_pairs():
    how = "resample ablation"
    one, other, late = (RepairNode("MLP", Site(layer, "mlp_out"), 0) for layer in (0, 1, 3))
    lost = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    repairs = {
        (one, how): known(lost, 0.5 * lost),
        (other, how): known(2 * lost, 0 * lost),
        (late, how): known(lost, -1 * lost),
        (late, "mean ablation"): known(lost, 0.25 * lost),
    }
    shares = pooled(repairs, 4)
    # half of what the first loses, nothing of the other's twice as much; the last one's loss is doubled
    assert shares[how][f"MLP, {HALVES[0]}"].value == pytest.approx(0.5 / 3)
    assert shares[how][f"MLP, {HALVES[1]}"].value == pytest.approx(-1.0)
    assert shares["mean ablation"] == {f"MLP, {HALVES[1]}": shares["mean ablation"][f"MLP, {HALVES[1]}"]}
    assert shares["mean ablation"][f"MLP, {HALVES[1]}"].value == pytest.approx(0.25)
    assert "By mean ablation, MLP, second half 0.250" in verdict(shares)
    assert verdict({}).startswith("No node")


def test_a_single_pair_is_refused():
    with pytest.raises(UserError, match="pairs = 1 is too few"):
        SelfRepairConfig(pairs=1)


@pytest.mark.slow
def test_repair_is_measured_written_and_kept(tmp_path, capsys):
    config = SelfRepairConfig(out=str(tmp_path), pairs=8)
    repair_main(config)
    text = (tmp_path / "summary.json").read_text()
    summary = json.loads(text)
    assert summary["pairs"] == 8
    assert {line["kind"] for line in summary["nodes"]} == {"attention layer", "MLP", "head", "latent"}
    for line in summary["nodes"]:
        shares = [line["shares"][name][0] for name in ("heads", "MLPs", "final norm")]
        assert sum(shares) == pytest.approx(line["shares"]["total"][0])
    assert "of the lost direct effect is repaired" in capsys.readouterr().out
    repair_main(config)
    assert (tmp_path / "summary.json").read_text() == text
