"""The experiment on circuits, on a few pairs: what it writes can be read back, and continues where it was stopped."""

import json

import pytest

from experiments.circuits import CircuitsConfig, main
from saepatch.circuits.circuit import Circuit


@pytest.mark.slow
def test_circuits_are_found_written_and_kept(tmp_path, capsys):
    config = CircuitsConfig(str(tmp_path), sites=("resid_post.4",), select=40, tune=8, report=10)
    main(config)
    summary = json.loads((tmp_path / "summary.json").read_text())
    latents = summary["circuits"]["resid_post.4, integrated gradients"]
    assert latents["faithfulness"][0] > 0.8
    assert latents["random"] < latents["faithfulness"][0] / 2
    assert latents["size"] * 3 < latents["active"]
    assert len(Circuit.read(tmp_path / latents["circuit"]).nodes) == latents["size"]
    assert "held-out pairs" in capsys.readouterr().out
    before = (tmp_path / "summary.json").read_text()
    main(config)
    assert (tmp_path / "summary.json").read_text() == before
