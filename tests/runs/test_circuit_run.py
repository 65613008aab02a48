"""`saepatch circuit`: parts, shards, files of the circuit, page."""

import json
import shutil
import subprocess
import sys

import pytest
from graph_schema import check_graph
from tiny import random_sae, save_model_and_sae

from saepatch.circuits.circuit import Circuit
from saepatch.circuits.node_runs import NodeRuns
from saepatch.cli.main import main
from saepatch.records.rows import read_rows

pytestmark = pytest.mark.whole

PAIRS = [("cat", "dot"), ("rat", "bit"), ("mat", "cot"), ("hat", "sit"), ("pat", "lot"), ("bat", "fit"), ("fat", "pot")]


def write(path, pairs):
    rows = [{"clean": a, "corrupted": b, "answer": "x", "counter": "y", "example": a} for a, b in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_model_and_sae(folder)
    sae = random_sae(seed=3)
    sae.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    sae.save_model(folder / "saes" / "resid_post.0")
    write(folder / "report.jsonl", PAIRS[:7])
    write(folder / "select.jsonl", [("vat", "dig"), ("sat", "rot"), ("tap", "pin")])
    return folder


def arguments(place, out):
    given = {"model": place / "model", "sae": place / "saes", "pairs": place / "report.jsonl"}
    given |= {"select": place / "select.jsonl", "each_position": "true", "nodes": 12, "edges": 20, "steps": 2}
    given |= {"verify": 4, "sample": 4, "minimal": 3, "part": 4, "out": out}
    return ["circuit", *(f"--{name}={value}" for name, value in given.items()), "--quiet"]


@pytest.fixture(scope="module")
def whole(place):
    out = place / "whole"
    assert main(arguments(place, out)) == 0
    return out


def values(out):
    rows = read_rows(out / "results.parquet")
    names = ("example", "variant", "errors", "draw", "node")
    return {tuple(row[name] for name in names): row["value"] for row in rows}


def test_a_run_writes_a_circuit_that_loads(whole, capsys):
    summary = json.loads((whole / "summary.json").read_text())
    circuits = [Circuit.read(whole / f"circuit.{kind}") for kind in ("json", "graphml")]
    assert circuits[0] == circuits[1]
    assert (len(circuits[0].nodes), len(circuits[0].edges)) == (13, 20)
    assert summary["faithfulness"].keys() == {"nodes", "kept", "dropped", "edges"}
    assert len(summary["minimality"]) == 3
    assert len(summary["random"]) == 5
    graph = json.loads((whole / "neuronpedia.json").read_text())
    check_graph(graph)
    assert len(graph["links"]) == 20
    assert graph["metadata"]["prompt_tokens"][1:] == ["c", "a", "t"]
    page = (whole / "report.html").read_text()
    assert 'data-name="resid_post.0' in page
    assert main(["runs", str(whole)]) == 0
    assert "12 of" in capsys.readouterr().out
    assert main(["compare", str(whole), str(whole)]) == 0
    assert "faithfulness/kept" in capsys.readouterr().out


@pytest.mark.slow
def test_a_circuit_of_heads_and_mlps(place):
    out = place / "heads"
    assert main([*arguments(place, out), "--component=head", "--nodes=5", "--each_position=false", "--edges=8"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["faithfulness"].keys() == {"nodes", "edges"}
    assert summary["dictionaries"] == {}
    circuit = Circuit.read(out / "circuit.json")
    assert {node.kind for node in circuit.nodes} <= {"head", "stream", "logits"}
    assert (len(circuit.nodes), len(circuit.edges)) == (6, 8)
    assert "exact patching" in (out / "report.html").read_text()
    assert not (out / "neuronpedia.json").exists()


def test_the_shares_are_those_of_the_rows(whole):
    rows = [row for row in read_rows(whole / "results.parquet") if row["variant"] == "circuit"]
    rows = [row for row in rows if row["errors"] == "nodes"]
    assert len(rows) == len(PAIRS)
    share = sum(row["value"] - row["empty"] for row in rows) / sum(row["whole"] - row["empty"] for row in rows)
    assert json.loads((whole / "summary.json").read_text())["faithfulness"]["nodes"][0] == pytest.approx(share)
    random = [row for row in read_rows(whole / "results.parquet") if row["variant"] == "random"]
    assert {row["size"] for row in random} == {12}


def test_a_stopped_run_continues_and_finds_nothing_again(place, whole, tmp_path, monkeypatch):
    out = tmp_path / "again"
    shutil.copytree(whole / "parts", out / "parts")
    (out / "parts" / "shard-0-of-1" / "part-00001.parquet").unlink()

    def refuse(*_):
        raise AssertionError("the circuit is found again")

    monkeypatch.setattr("saepatch.runs.commands.circuits.find_circuit", refuse)
    assert main(arguments(place, out)) == 0
    assert values(out) == pytest.approx(values(whole), abs=1e-5)


def test_a_stopped_search_continues(place, tmp_path, monkeypatch, capsys):
    """Stopped while it prunes, a search runs nothing again that it ran before, and ends with the same circuit."""
    run, calls = NodeRuns.run, []

    def counted(runs, act, others_act=False):
        calls.append(len(act))
        if len(calls) == stop:
            raise KeyboardInterrupt
        return run(runs, act, others_act)

    monkeypatch.setattr(NodeRuns, "run", counted)
    given = [*arguments(place, tmp_path / "whole"), "--prune=0.002"]
    stop = 0
    assert main(given) == 0
    total, stop = len(calls), 15
    calls.clear()
    stopped = [*arguments(place, tmp_path / "stopped"), "--prune=0.002"]
    assert main(stopped) == 130
    assert "the same command" in capsys.readouterr().err
    calls.clear()
    stop = 0
    assert main([*stopped, "--steps=3"]) == 2
    assert "steps (2 there, 3 now)" in capsys.readouterr().err
    assert calls == []
    monkeypatch.setattr("saepatch.circuits.find.node_effects", None)  # nor are nodes ranked again
    assert main(stopped) == 0
    ends = 2 * 2  # of all nodes, and of those to be pruned: the run in which all act and the one in which none does
    assert len(calls) == total - (15 - 1 - ends)
    circuits = [Circuit.read(tmp_path / name / "circuit.json") for name in ("whole", "stopped")]
    assert circuits[0] == circuits[1]
    assert list((tmp_path / "stopped").rglob("measurements.jsonl")) == []


def test_a_search_that_fails_is_not_in_the_way_of_corrected_settings(place, tmp_path, capsys):
    given = [*arguments(place, tmp_path / "run"), "--minimal=1"]
    assert main([*given, "--nodes=100000"]) == 2
    assert "ask for fewer" in capsys.readouterr().err
    assert main(given) == 0


def test_shards_are_the_whole(place, whole, tmp_path, capsys):
    out = tmp_path / "cut"
    assert main([*arguments(place, out), "--shard=0/2"]) == 0
    assert "runs)" in capsys.readouterr().out
    assert main([*arguments(place, out), "--shard=1/2"]) == 0
    assert main(["merge", str(out)]) == 0
    assert values(out) == pytest.approx(values(whole), abs=1e-4)
    assert Circuit.read(out / "circuit.json").nodes == Circuit.read(whole / "circuit.json").nodes
    assert "they need the model" in (out / "report.html").read_text()
    assert main(["report", str(out), "--read"]) == 0
    assert "they need the model" not in (out / "report.html").read_text()


@pytest.mark.slow
def test_two_processes_under_torchrun_are_the_whole(place, whole, tmp_path):
    """Both start at once, and one of them finds the circuit that both measure."""
    out = tmp_path / "cut"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]
    command = [*launch, "saepatch", *arguments(place, out), "--shard=auto"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert main(["merge", str(out)]) == 0
    assert values(out) == pytest.approx(values(whole), abs=1e-4)
    assert Circuit.read(out / "circuit.json").nodes == Circuit.read(whole / "circuit.json").nodes


def test_pairs_for_both_purposes_are_refused(place, tmp_path, capsys):
    flags = [flag for flag in arguments(place, tmp_path / "same") if not flag.startswith("--select")]
    assert main(flags) == 2
    assert "7 of the 7 pairs of select" in capsys.readouterr().err
    assert not (tmp_path / "same").exists()
