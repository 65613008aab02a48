"""Every kind of run is listed under its name, with a headline, and two of a kind stand side by side."""

import json
from pathlib import Path

import pytest

from saepatch.cli.main import main
from saepatch.runs.catalogue import find_runs, read_run
from saepatch.runs.comparison import compare_runs
from saepatch.runs.kinds import KINDS, flat, kind_of, numbers

FOLDERS = Path(__file__).parent / "folders"
SITE = {"fvu": 0.125, "l0": 12.0}
EXPERIMENTS = {
    "ioi": ({"task": "ioi", "layer_position": [], "verdicts": {"denoise": ["By one."]}, "pairs": 4}, "By one."),
    "safety": ({"setting_b": {"bare": [0.1, 0.0, 0.2], "verdict": "Few."}, "seconds": {"load": 3.0}}, "Few."),
    "steering": ({"concepts": {"French": {"unit": 1.5}}, "verdicts": {"French": "One does."}}, "One does."),
    "patchscope": ({"readings": [], "words": [[0.5, 0.4, 0.6]], "verdict": "No."}, "No."),
    "real": ({"claims": [], "accuracy": {"ioi": {"report": [1.0, 0.9, 1.0]}}, "verdict": "Two."}, "Two."),
    "circuit": (
        {"faithfulness": {"nodes": [0.91, 0.9, 0.92]}, "completeness": [0.1, 0.0, 0.2], "random": [[0.25, 0.2, 0.3]],
         "pairs": 4, "nodes": 9, "candidates": 99, "edges": 7, "whole": 2.0, "empty": 0.0, "selected": {}},
        "9 of 99 nodes: faithfulness 0.910 [0.900, 0.920], random at most 0.250",
    ),
    "edit": (
        {"kinds": {"efficacy": {"success": [0.9, 0.8, 1.0], "magnitude": [0.5, 0.4, 0.6], "accuracy": [1.0, 0.9, 1.0],
                                "questions": 9, "questions_asked": 9}},
         "pairs": 9, "score": [None, None, None], "relative_norms": {"1": 0.1}},
        "efficacy 90% [80%, 100%]",
    ),
    "facts": ({"single_edits": {}, "correlations": {"last": 0.5}, "verdict": "All."}, "All."),
    "cross-lingual": ({"shared": {}, "depth": {"a": {"concept": {"0": [1.0, 0.9, 1.0]}}}, "verdict": "All."}, "All."),
    "jailbreak": ({"halves": {}, "refused": {"jailbroken": {"both": [1.0, 0.9, 1.0]}}, "verdict": "Both."}, "Both."),
    "letters": ({"letters": {"A": 0.25}, "carried": {}, "right": [0.3, 0.2, 0.4], "verdict": "No."}, "No."),
    "two-hop": ({"moves": {"same": {"share": [0.1, 0.0, 0.3]}}, "lens": {}, "verdict": "Too late."}, "Too late."),
    "audit": ({"audit": {"gap before": [3.0, 2.5, 3.5]}, "parts": {}, "verdict": "No gap."}, "No gap."),
    "circuits": ({"circuits": {"resid_post.4": {"size": 52}}, "verdict": "52 nodes."}, "52 nodes."),
    "self-repair": ({"repaired": {"mean": {"MLP": [0.5, 0.4, 0.6]}}, "nodes": [], "verdict": "Half."}, "Half."),
    "benchmark:circuits": ({"ratios": {"loop_over_edges": 40.0}, "downstream_latents": 9}, "loop_over_edges 40.00"),
    "benchmark:patching": ({"ratios": {"gpt2_ours": 2.0}, "ms_per_edit": {}, "max_abs_diff": 0.0}, "gpt2_ours 2.00"),
    "benchmark:generation": ({"overhead": {"one_latent": 0.05}, "ms_per_token": {"bare": 2.0}}, "one_latent 0.05"),
    "benchmark:training": ({"ratios": {"topk": 1.5}, "quality_by_rate": {}}, "topk 1.50"),
    "training": ({"sites": {"resid_post.1": SITE}, "identity": {}}, "resid_post.1: FVU 0.125 L0 12.000"),
    "training-sweep": ({"runs": [{"name": "a", "values": {}, "sites": {"resid_post.1": SITE}}]}, "1 runs finished"),
    "demo": (
        {"restoration": {"refused_restored": 0.9}, "patching": {"denoise_top": [[16, 0.75]]}},
        "16 latents restore 0.750; 0.900 refused once restored",
    ),
}  # fmt: skip


def write(folder, name, summary):
    folder.mkdir(parents=True)
    (folder / ("sweep.json" if name == "training-sweep" else "summary.json")).write_text(json.dumps(summary))
    return folder


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_run_is_listed_under_its_name(name, tmp_path, capsys):
    summary, headline = EXPERIMENTS[name]
    out = write(tmp_path / "one", name, summary)
    assert kind_of(summary).name == name
    assert main(["runs", str(tmp_path)]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split()[:2] == [str(out), name]
    assert headline in line


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_two_experiments_of_one_kind_stand_side_by_side(name, tmp_path, capsys):
    summary, _ = EXPERIMENTS[name]
    one, other = write(tmp_path / "one", name, summary), write(tmp_path / "other", name, summary)
    (other / "config.yaml").write_text("seed: 1\nout: elsewhere\n")
    found = compare_runs(read_run(one), read_run(other))
    assert found.settings == (("seed", "–", "1"),)
    assert found.figures
    assert all(a == b for _, a, b in found.figures)
    assert main(["compare", str(one), str(other), "--html", str(tmp_path / "page.html")]) == 0
    assert "settings that differ" in capsys.readouterr().out
    assert "Settings that differ" in (tmp_path / "page.html").read_text()


def test_every_kind_is_known_by_a_summary():
    shown = {kind_of(summary).name for summary, _ in EXPERIMENTS.values()} | {run.work for run in find_runs(FOLDERS)}
    assert {kind.name for kind in KINDS} - {"pairs"} <= shown  # whose names are their tasks


def test_runs_of_two_kinds_or_of_none_are_not_compared(tmp_path, capsys):
    one = write(tmp_path / "one", "safety", EXPERIMENTS["safety"][0])
    other = write(tmp_path / "other", "steering", EXPERIMENTS["steering"][0])
    assert main(["compare", str(one), str(other)]) == 2
    assert "is a run of safety, " in capsys.readouterr().err
    unknown = write(tmp_path / "unknown", "", {"anything": 1})
    assert main(["compare", str(unknown), str(unknown)]) == 2
    assert "holds no run of a known command or experiment" in capsys.readouterr().err


def test_figures_of_any_depth():
    values = {"a": {"b": 1.5, "c": [0.2, 0.1, 0.4], "d": [3, 2, 1], "e": "text", "f": True}, "g": None}
    assert dict(numbers(values)) == {"a/b": 1.5, "a/c": [0.2, 0.1, 0.4]}
    assert flat(dict(numbers(values))) == {"a/b": 1.5, "a/c": 0.2, "a/c_low": 0.1, "a/c_high": 0.4}


def test_figures_of_runs_are_those_of_their_summaries():
    for name in ("patch", "attribute", "restore"):
        run = read_run(FOLDERS / name)
        figures = flat(run.kind.figures(run.summary))
        if name == "patch":
            effect = run.summary["top"]["noise"][0]["effect"]
            assert [figures[f"noise/largest_effect{end}"] for end in ("", "_low", "_high")] == [
                effect[end] for end in ("value", "low", "high")
            ]
        elif name == "attribute":
            assert figures["denoise/pearson"] == run.summary["screens"]["denoise"]["pearson"]
        else:
            row = next(r for r in run.summary["conditions"] if (r["condition"], r["harmful"]) == ("restored", True))
            assert figures["harmful/restored/refuse_low"] == row["refuse"][1]
