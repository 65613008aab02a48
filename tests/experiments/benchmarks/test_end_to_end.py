"""The benchmark of whole training runs on a tiny model. Times are never asserted."""

import json

import pytest
from tiny import save_model_and_sae

from experiments.benchmarks import end_to_end
from experiments.benchmarks.common.peers import missing
from saepatch.cli.parser import run_config


def run(*arguments):
    return run_config(end_to_end.EndToEndConfig, end_to_end.run, "end_to_end", arguments)


@pytest.mark.slow
@pytest.mark.parametrize("sites", [["resid_post.1"], ["resid_post.0", "resid_post.1"]])
def test_both_sides_train_the_sites_on_the_texts(tmp_path, capsys, sites):
    if why := missing("transformer_lens"):
        pytest.skip(why)
    save_model_and_sae(tmp_path)
    (tmp_path / "texts.txt").write_text("".join(f"a text of some words, and the number {n}\n" for n in range(200)))
    arguments = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "texts.txt"), "--out", str(tmp_path)]
    arguments += ["--tokens", "512", "--batch_size", "64", "--buffer", "256", "--context", "16", "--k", "4"]
    assert run(*arguments, "--sites", json.dumps(sites)) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["ratios"]) == {"processor", "wall", "peak_mb"}
    for side in ("saepatch", "sae_lens"):
        assert list(summary["fvu"][side]) == sites
        assert all(fvu > 0 for fvu in summary["fvu"][side].values())
        (trained,) = summary["runs"][side]
        assert trained["peak_mb"] >= trained["loaded_mb"] > 0
        assert min(trained["processor"], trained["wall"]) > 0
    assert "tokens per s" in capsys.readouterr().out


def test_bad_input(tmp_path, capsys):
    assert run() == 2
    assert "give a model and texts" in capsys.readouterr().err
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    assert run("--model", "m", "--data", str(tmp_path / "texts.txt")) == 2
    assert "give more than 32, which are held out" in capsys.readouterr().err
    assert run("--model", "m", "--data", "t", "--sites", '["mlp_out.1"]') == 2
    assert "use sites in the residual stream" in capsys.readouterr().err
