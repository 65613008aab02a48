"""One driver for every long run: a lock on the folder, shards of every kind, folders of earlier versions."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from restoring_runs import arguments, make

from saepatch.cli.main import main
from saepatch.errors import UserError
from saepatch.records.rows import read_rows
from saepatch.runs.driver import LOCK, locked

pytestmark = pytest.mark.whole

FOLDERS = Path(__file__).parent / "folders"  # written before modules moved into rooms


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make(tmp_path_factory.mktemp("tiny"))


def test_one_process_at_a_time_works_in_a_folder(tmp_path):
    folder = tmp_path / "run" / "parts"
    with locked(folder):
        holder = json.loads((folder / LOCK).read_text())
        assert holder == {"pid": os.getpid(), "host": socket.gethostname()}
        with pytest.raises(UserError, match=f"process {os.getpid()} on .* is working in .*parts'") as refusal:
            with locked(folder):
                pass
        assert "\n" not in str(refusal.value)
        assert (folder / LOCK).exists()  # a refused one takes nothing away
    assert not (tmp_path / "run").exists()
    with locked(folder):
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]


@pytest.mark.parametrize("left", ['{"pid": 1, "host": "another"}', "", "{", '{"pid": 999999999, "host": "here"}'])
def test_a_lock_whose_holder_is_gone_is_in_nobodys_way(tmp_path, left):
    (tmp_path / LOCK).write_text(left)
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


def test_without_locks_of_the_file_system_the_holder_decides(tmp_path, monkeypatch):
    def none(*_):
        raise OSError("Function not implemented")

    monkeypatch.setattr("fcntl.flock", none)
    mine, here = os.getpid(), socket.gethostname()
    for holder, free in (((mine, here), False), ((999999999, here), True), ((999999999, "another"), False)):
        (tmp_path / LOCK).write_text(json.dumps(dict(zip(("pid", "host"), holder, strict=True))))
        if free:
            with locked(tmp_path):
                pass
        else:
            with (
                pytest.raises(UserError, match=f"if it is certainly gone, remove {tmp_path / LOCK}"),
                locked(tmp_path),
            ):
                pass


def test_a_second_process_on_a_shard_is_refused_with_one_line(place, tmp_path, capsys):
    flags = arguments(place, tmp_path, latents="resid_post.1: 1,7")
    with locked(tmp_path / "answers" / "shard-0-of-2"):
        assert main(["restore", *flags, "--shard", "0/2"]) == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1
        assert "is working in" in errors[0]


def outcomes(out):
    rows = read_rows(out / "results.parquet")
    return {(r["example"], r["condition"], r["draw"]): (r["answer"], r["outcome"], round(r["score"], 4)) for r in rows}


@pytest.mark.slow
def test_a_restoration_by_two_processes_under_torchrun_is_the_whole(place, tmp_path):
    given = {"latents": "resid_post.1: 1,7", "controls": 1}
    assert main(["restore", *arguments(place, tmp_path / "whole", **given)]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]
    command = [*launch, "saepatch", "restore", *arguments(place, tmp_path / "cut", **given), "--quiet"]
    done = subprocess.run([*command, "--shard", "auto"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert main(["merge", str(tmp_path / "cut")]) == 0
    assert outcomes(tmp_path / "whole") == outcomes(tmp_path / "cut")


def test_shards_of_a_restoration_are_the_whole(place, tmp_path, capsys):
    """Rows, intervals and reports; the sets that are restored are the first shard's."""
    given = {"latents": "resid_post.1: 1,7", "controls": 1}
    assert main(["restore", *arguments(place, tmp_path / "whole", **given)]) == 0
    flags = [*arguments(place, tmp_path / "cut", **given), "--quiet"]
    assert main(["restore", *flags, "--shard", "1/2"]) == 0
    said = capsys.readouterr().out
    assert "shard 1 of 2 is finished (1 parts, 10 answers)" in said
    assert main(["merge", str(tmp_path / "cut")]) == 2
    told = capsys.readouterr().err
    assert "shard 0 was never started" in told
    config = tmp_path / "cut/answers/shard-1-of-2/config.yaml"
    assert f"To finish: saepatch restore --config {config} --shard 0/2" in told
    assert main(["restore", "--config", str(config), "--shard", "0/2"]) == 0
    assert main(["merge", str(tmp_path / "cut")]) == 0
    assert outcomes(tmp_path / "whole") == outcomes(tmp_path / "cut")
    whole, cut = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "cut"))
    for one, other in zip(whole.pop("conditions"), cut.pop("conditions"), strict=True):
        for name in ("refusal_score", "refuse", "comply", "degenerate"):  # other batches: other roundings
            assert one.pop(name) == pytest.approx(other.pop(name), abs=1e-4)
        assert one == other
    assert whole == cut
    assert f"saepatch report {tmp_path / 'cut'} --read" in (tmp_path / "cut/report.html").read_text()
    assert main(["report", str(tmp_path / "cut"), "--read"]) == 0
    pages = [json.loads((tmp_path / name / "page.json").read_text())["sections"] for name in ("whole", "cut")]
    assert pages[0][-1] == pages[1][-1]  # cards
    assert [section["title"] for section in pages[0]] == [section["title"] for section in pages[1]]
    assert "they need the model" not in (tmp_path / "cut/report.html").read_text()
    summary = json.loads((tmp_path / "cut/summary.json").read_text())
    summary["conditions"][0]["refuse"][0] = 0.123  # as of another judge
    (tmp_path / "cut/summary.json").write_text(json.dumps(summary))
    assert main(["merge", str(tmp_path / "cut")]) == 0
    assert not (tmp_path / "cut/page.json").exists()  # its figures may be others
    assert main(["compare", str(tmp_path / "whole"), str(tmp_path / "cut")]) == 0
    assert "restored, harmful: refused" in capsys.readouterr().out
    assert main(["restore", *flags]) == 2
    assert "shards (2 there, 1 now)" in capsys.readouterr().err


@pytest.fixture
def folders(tmp_path):
    shutil.copytree(FOLDERS, tmp_path / "runs")
    return tmp_path / "runs"


def without_versions(path):
    return {name: value for name, value in json.loads(path.read_text()).items() if name != "versions"}


def estimates(value):
    """A summary without what later versions take in another way or add: bounds of intervals, q, marks of rounding."""
    if isinstance(value, dict):
        later = ("low", "high", "reason", "q", "rounding", "within_rounding")
        kept = {name: estimates(item) for name, item in value.items() if name not in later}
        return kept | {name: value[name][0] for name in ("refusal_score",) if name in value}
    return [estimates(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", ["patch", "attribute", "restore"])
def test_runs_of_an_earlier_version_merge_and_report(folders, name, capsys):
    out = folders / name
    before, rows = without_versions(out / "summary.json"), read_rows(out / "results.parquet")
    assert main(["report", str(out)]) == 0
    assert main(["merge", str(out)]) == 0
    assert estimates(without_versions(out / "summary.json")) == estimates(before)
    drop = {"command", "precision"} if name == "restore" else set()
    both = [
        [{k: v for k, v in row.items() if k not in drop} for row in some]
        for some in (read_rows(out / "results.parquet"), rows)
    ]
    assert both[0] == both[1]
    assert (out / "report.html").exists()
    assert main(["compare", str(out), str(FOLDERS / name)]) == 0
    assert main(["runs", str(folders)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(str(out)))
    assert line.split()[1] == name


def test_a_run_of_an_earlier_version_that_was_stopped_goes_on(folders, capsys):
    """Its parts are kept, and the rows are those of the whole run of that version."""
    out = folders / "stopped"
    assert main(["runs", str(folders)]) == 0
    assert "not finished" in capsys.readouterr().out
    kept = {path: path.stat().st_mtime_ns for path in out.glob("parts/*/*.parquet")}
    assert len(kept) == 2
    config = str(out / "parts/shard-0-of-1/config.yaml")
    assert main(["patch", "--config", config, "--out", str(out), "--seed", "1"]) == 2
    assert "seed (0 there, 1 now)" in capsys.readouterr().err
    assert main(["patch", "--config", config, "--out", str(out)]) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    key = ("example", "site", "latent", "role", "direction")
    one, other = (
        {tuple(row[k] for k in key): row["patched"] for row in read_rows(folders / name / "results.parquet")}
        for name in ("stopped", "patch")
    )
    assert one == pytest.approx(other, abs=1e-4)
    two, three = (json.loads((folders / name / "summary.json").read_text())["top"] for name in ("stopped", "patch"))
    for direction, lines in two.items():
        for line, same in zip(lines, three[direction], strict=True):
            assert line["effect"]["value"] == pytest.approx(same["effect"]["value"], abs=1e-5)


def test_a_restoration_of_an_earlier_version_goes_on(folders):
    out = folders / "restore"
    rows = read_rows(out / "results.parquet")
    (out / "answers/part-00001.parquet").unlink()
    assert main(["restore", "--config", str(out / "answers/config.yaml"), "--out", str(out), "--quiet"]) == 0
    again = read_rows(out / "results.parquet")
    for name in ("example", "condition", "draw", "answer", "outcome"):
        assert [row[name] for row in again] == [row[name] for row in rows]
