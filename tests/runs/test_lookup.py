"""Effects looked up in the rows of two runs, and their differences."""

import json

import numpy as np
import pytest
from tiny import save_model_and_sae

from saepatch.cli.main import main
from saepatch.records.statistics import Interval
from saepatch.runs.catalogue import read_run
from saepatch.runs.comparison import compare_runs
from saepatch.runs.lookup import _independent, read_merged

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs over the same pairs: each of 30 latents, of which 20 are on top, and two of the last."""
    folder = tmp_path_factory.mktemp("lookup")
    save_model_and_sae(folder)
    pairs = [{"clean": f"ab{c}", "corrupted": f"ad{c}", "answer": "x", "counter": "y"} for c in "cdefghij"]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    given = ["patch", "--model", folder / "model", "--sae", folder / "saes", "--pairs", folder / "pairs.jsonl"]
    given += ["--controls", 0, "--quiet", "--latents"]
    assert main([*map(str, given), "; ".join(map(str, range(30))), "--out", str(folder / "many")]) == 0
    bottom = {str(i) for i in range(30)} - {
        line["latent"] for line in json.loads((folder / "many/summary.json").read_text())["top"]["denoise"]
    }
    assert main([*map(str, given), "; ".join(sorted(bottom)[:2]), "--out", str(folder / "few")]) == 0
    return folder, sorted(bottom)[:2]


def test_edits_that_are_not_on_top_are_looked_up(runs, capsys):
    folder, bottom = runs
    compared = compare_runs(read_run(folder / "many"), read_run(folder / "few"))
    pairs, changes = read_merged(folder / "many", 0.01)
    for latent in bottom:
        name = f"denoise: resid_post.1 {latent} at all"
        (lines,) = [lines for edit, *lines in compared.edits if edit == name]
        assert lines[0] is None
        both = compared.looked_up[name]
        own = next((key for key in changes.keys if key.latent == latent), None)
        if own is None:  # it changed nothing anywhere
            assert both.first is None
            continue
        assert both.first.value == pytest.approx(changes.of(own).mean() / pairs.mean_gap)
        assert both.difference.value == pytest.approx(0, abs=1e-5)
    assert main(["compare", str(folder / "many"), str(folder / "few")]) == 0
    assert "B − A" in capsys.readouterr().out


def test_estimates_of_screens_are_looked_up(runs, tmp_path):
    folder, _ = runs
    given = ["attribute", "--model", folder / "model", "--sae", folder / "saes", "--pairs", folder / "pairs.jsonl"]
    outs = [tmp_path / "four", tmp_path / "all"]
    for out, n in zip(outs, ("4", "0")):
        assert main([*map(str, given), "--verify", "20", "--quiet", "--n", n, "--out", str(out)]) == 0
    compared = compare_runs(*map(read_run, outs))
    assert any(None in lines for _, *lines in compared.edits)
    for name, *lines in compared.edits:
        both = compared.looked_up[name]
        for line, interval in zip(lines, (both.first, both.second)):
            assert line is None or interval.value == pytest.approx(line["effect"], abs=1e-6)
        if None not in (both.first, both.second):
            assert both.difference.value == pytest.approx(both.second.value - both.first.value, abs=1e-6)
    assert "not on top" not in compared.table()


def test_differences_of_independent_runs():
    """For symmetric intervals, those of a difference of two means."""
    one, other = Interval(1.0, 0.7, 1.3, 20), Interval(2.0, 1.6, 2.4, 30)
    found = _independent(one, other)
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 0.5, 1.5))
    withheld = _independent(one, Interval.withheld(2.0, 3, "too few for an interval: n = 3"))
    assert withheld.reason
    assert np.isnan(withheld.low)
