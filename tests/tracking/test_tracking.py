"""The local log always works; W&B beside it never stops a run."""

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from saepatch.errors import UserError
from saepatch.tracking import open as tracking
from saepatch.tracking import sender
from saepatch.tracking import wandb as wandb_backend
from saepatch.tracking.open import RunDescription, open_tracker

pytestmark = pytest.mark.whole


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """A machine on which W&B knows nobody and reaches nothing."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DATA_DIR", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text(encoding="utf-8").splitlines()]


def leet(folder: Path, *flags: str) -> str:
    """What W&B's own reader finds in an offline run."""
    wandb = Path(sys.executable).with_name("wandb")
    done = subprocess.run(
        [wandb, "leet", "inspect", "--json", *flags, folder], capture_output=True, text=True, check=True
    )
    return done.stdout


def history(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in leet(folder).splitlines()]
    return [row["history"] for row in rows if row["type"] == "history"]


class Visitor:
    """A backend that records its calls."""

    sync_command = None

    def __init__(self):
        self.told, self.exit_code, self.abandoned = [], None, 0

    def log(self, values, step):
        self.told.append((step, dict(values)))

    def histogram(self, name, counts, edges, step):
        self.told.append((step, name, counts, edges))

    def summarise(self, values):
        self.told.append(("summary", dict(values)))

    def table(self, name, columns, rows, step):
        self.told.append((step, name, columns, rows))

    def artifact(self, name, folder, about, upload):
        self.told.append((name, folder, about["files"], upload))

    def curve(self, name, x, points):
        self.told.append((name, x, points))

    def figure(self, name, chart, step):
        self.told.append((step, name, chart))

    def page(self, name, path, step):
        self.told.append((step, name, path))

    def configure(self, settings):
        self.told.append(dict(settings))

    def finish(self, exit_code):
        self.exit_code = exit_code

    def abandon(self):
        self.abandoned += 1


def receive(monkeypatch, visitor: Visitor) -> Visitor:
    """Have W&B be this visitor."""
    monkeypatch.setattr(wandb_backend, "WandbRun", lambda *args: visitor)
    return visitor


def warnings(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def test_local_log_is_on_disk_at_every_line(tmp_path):
    tracker = open_tracker("none", RunDescription(tmp_path / "run", "r", {}))
    tracker.log({"loss": torch.tensor(0.5), "n": 3, "acc": np.float32(0.25)}, step=0)
    tracker.log({"loss": float("nan"), "gap": float("-inf")}, step=10)
    first, second = read_lines(tmp_path / "run" / "metrics.jsonl")  # before finish: a kill loses nothing
    assert (first["step"], first["loss"], first["n"], first["acc"]) == (0, 0.5, 3, 0.25)
    assert second["time"] >= first["time"] > 0
    assert np.isnan(float(second["loss"]))
    assert float(second["gap"]) == -np.inf
    tracker.finish()
    tracker.finish()


def test_resume_appends_and_a_new_run_starts_afresh(tmp_path):
    for resume, steps in ((False, [0]), (True, [0, 1]), (False, [2])):
        with open_tracker("none", RunDescription(tmp_path, "r", {}), resume=resume) as tracker:
            tracker.log({"x": 1.0}, step=steps[-1])
        assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == steps


def test_summary_and_tables_have_local_twins(tmp_path):
    with open_tracker("none", RunDescription(tmp_path, "r", {})) as tracker:
        tracker.summarise({"best": 0.1})
        tracker.summarise({"best": 0.2, "worst": float("inf")})
        tracker.table("steered/before", ["text", "score"], [["über\n", 1], ["b", float("nan")]])
    assert json.loads((tmp_path / "metrics.summary.json").read_text()) == {"best": 0.2, "worst": "Infinity"}
    assert read_lines(tmp_path / "tables" / "steered_before.jsonl") == [
        {"text": "über\n", "score": 1},
        {"text": "b", "score": "NaN"},
    ]


def test_wrong_calls_are_errors(tmp_path):
    with open_tracker("none", RunDescription(tmp_path, "r", {})) as tracker:
        with pytest.raises(ValueError, match="1 cells for 2 columns"):
            tracker.table("t", ["a", "b"], [["x"]])
        with pytest.raises(ValueError, match="'step'"):
            tracker.log({"step": 1.0}, step=0)
        with pytest.raises((TypeError, ValueError)):
            tracker.log({"loss": "much"}, step=0)


@pytest.mark.parametrize("spec", ["", "tensorboard", "wandb:cloud", "wandb:"])
def test_unknown_spec(spec, tmp_path):
    with pytest.raises(UserError, match="use one of none, wandb") as caught:
        open_tracker(spec, RunDescription(tmp_path / "run", "r", {}))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another --out"):
        open_tracker("none", RunDescription(tmp_path / "file" / "run", "r", {}))


def test_full_disk_warns_once_and_the_run_goes_on(tmp_path, caplog):
    tracker = open_tracker("none", RunDescription(tmp_path, "r", {}))
    tracker._lines.close()
    tracker._lines = open("/dev/full", "w")  # noqa: SIM115  the tracker closes it
    for step in range(3):
        tracker.log({"x": 1.0}, step=step)
    tracker.finish()
    assert [record.message for record in caplog.records if "lines are being lost" in record.message] == [
        f"cannot write {tmp_path / 'metrics.jsonl'} ([Errno 28] No space left on device): lines are being lost"
    ]


@pytest.mark.parametrize(
    "spec",
    [
        "wandb:online",
        pytest.param("wandb", marks=pytest.mark.slow),
        pytest.param("wandb:offline", marks=pytest.mark.slow),
    ],
)
def test_without_a_key_wandb_runs_offline(spec, tmp_path, caplog):
    out = tmp_path / "a run"  # the blank must survive the shell
    with (
        caplog.at_level(logging.INFO),
        open_tracker(spec, RunDescription(out, "first", {"k": {"path": out}})) as tracker,
    ):
        tracker.table("early", ["a"], [["before the first step"]])
        tracker.log({"loss": 1.0}, step=0)
        tracker.log({"loss": 0.5}, step=100)
        tracker.table("texts", ["text", "score"], [["x", 1], ["y", None]])
        tracker.log({"accuracy": 0.75}, step=100)
        tracker.log({"loss": 9.0}, step=50)
        tracker.summarise({"best": 0.5})
        command = tracker.sync_command
    (folder,) = (out / "wandb").glob("offline-run-*")
    assert command == f"wandb sync '{folder}'"
    assert any(command in record.message for record in caplog.records)
    assert any("no key" in record.message for record in caplog.records) == (spec != "wandb:offline")
    assert any("step 50 comes after step 100" in record.message for record in caplog.records)
    assert len(read_lines(out / "metrics.jsonl")) == 4

    summary = json.loads(leet(folder, "--summary"))
    assert (summary["project"], summary["name"], summary["exit_code"]) == ("saepatch", "first", 0)
    assert summary["config"]["k"]["path"] == str(out)
    assert (summary["summary"]["loss"], summary["summary"]["accuracy"], summary["summary"]["best"]) == (0.5, 0.75, 0.5)
    assert summary["summary"]["texts"]["nrows"] == 2
    rows = [
        record["history"] for line in leet(folder).splitlines() if (record := json.loads(line))["type"] == "history"
    ]
    assert [(row["step"]["num"], row["item"]["loss"]) for row in rows] == [(0, 1), (100, 0.5)]
    assert not (tmp_path / "home" / ".local" / "share" / "wandb").exists()  # everything of the run lies under --out


def test_an_exception_leaves_both_logs_complete(tmp_path):
    with pytest.raises(KeyError), open_tracker("wandb:offline", RunDescription(tmp_path, "r", {})) as tracker:
        tracker.log({"loss": 1.0}, step=0)
        raise KeyError("training went wrong")
    assert tracker._lines.closed
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    summary = json.loads(leet(folder, "--summary"))
    assert summary["summary"]["loss"] == 1.0
    assert summary["exit_code"] == 1


def test_a_server_that_does_not_answer(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb_backend, "INIT_TIMEOUT", 1.0)
    with open_tracker("wandb:online", RunDescription(tmp_path, "r", {})) as tracker:
        tracker.log({"loss": 1.0}, step=0)
    assert len([record for record in caplog.records if "W&B could not start" in record.message]) == 1
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1


def test_without_a_network_a_run_ends_within_half_a_minute(tmp_path, monkeypatch):
    """W&B gets less than the time after which it is abandoned, and what is abandoned is not waited for at exit."""
    given, left = {}, []
    monkeypatch.setattr(wandb_backend, "leave_service", lambda: left.append(1))

    def init(**options):
        given.update(options)
        raise OSError("no network")

    monkeypatch.setattr("wandb.init", init)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with open_tracker("wandb:online", RunDescription(tmp_path, "r", {})) as tracker:
        tracker.log({"loss": 1.0}, step=0)
    assert given["settings"].init_timeout == wandb_backend.INIT_TIMEOUT < sender.START_TIMEOUT < 30
    assert left == [1]


def test_a_backend_that_never_starts_is_given_up(tmp_path, monkeypatch, caplog):
    release, given_up = threading.Event(), []
    monkeypatch.setattr(wandb_backend, "WandbRun", lambda *_: release.wait() and Visitor())
    monkeypatch.setattr(wandb_backend, "leave_service", lambda: given_up.append(1))
    monkeypatch.setattr(sender, "START_TIMEOUT", 0.05)
    try:
        with open_tracker("wandb", RunDescription(tmp_path, "r", {})) as tracker:
            tracker.log({"x": 0.0}, step=0)
        assert given_up == [1]
    finally:
        release.set()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds W&B's service in /proc")
def test_the_interpreter_exits_though_a_server_never_answers(tmp_path, monkeypatch):
    """W&B's service still waits for the server then, and Python would wait for the service."""
    code = """
import os, pathlib, signal, sys, threading
from saepatch.tracking import sender, wandb
from saepatch.tracking.open import RunDescription, open_tracker
sender.START_TIMEOUT = 0.5
started = threading.Event()
class Hanging:
    def __init__(self, *_):
        import wandb
        wandb.setup().ensure_service()
        tasks = pathlib.Path(f"/proc/{os.getpid()}/task").glob("*/children")
        for pid in {int(pid) for task in tasks for pid in task.read_text().split()}:
            print(pid, flush=True)
            os.kill(pid, signal.SIGSTOP)
        started.set()
        threading.Event().wait()
wandb.WandbRun = Hanging
tracker = open_tracker("wandb:offline", RunDescription(pathlib.Path(sys.argv[1]), "r", {}))
assert started.wait(60)
tracker.finish()
"""
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # that of the other tests
    out, err = tmp_path / "out.txt", tmp_path / "err.txt"
    with out.open("w") as stdout, err.open("w") as stderr:
        command = [sys.executable, "-c", code, str(tmp_path)]
        done = subprocess.run(command, stdout=stdout, stderr=stderr, timeout=120, check=False)
    services = out.read_text().split()
    for pid in services:
        os.kill(int(pid), signal.SIGKILL)
    assert done.returncode == 0, err.read_text()
    assert services
    assert "did not start within" in err.read_text()


@pytest.mark.parametrize("broken", ["log", "summarise", "table", "finish"])
def test_an_exploding_wandb_does_not_stop_the_run(broken, tmp_path, monkeypatch, caplog):
    calls = []

    def explode(*args):
        calls.append(broken)
        raise RuntimeError("boom\nand a long trace")

    monkeypatch.setattr(wandb_backend.WandbRun, broken, explode)
    with open_tracker("wandb:offline", RunDescription(tmp_path, "r", {})) as tracker:
        for step in range(3):
            tracker.log({"loss": 1.0}, step=step)
            tracker.summarise({"best": 1.0})
            tracker.table("t", ["a"], [["x"]])
    assert calls == [broken]
    (warning,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning.startswith("W&B ")
    assert "(boom)" in warning
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 3


def test_wandb_that_cannot_be_imported(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with open_tracker("wandb", RunDescription(tmp_path, "r", {})) as tracker:
        tracker.log({"loss": 1.0}, step=0)
    assert "W&B could not start" in caplog.text


def test_wandb_stays_unimported_until_asked_for():
    code = "import sys, saepatch.tracking.open; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_backend_is_told_everything_in_order(tmp_path, monkeypatch):
    visitor = receive(monkeypatch, Visitor())
    rows = [["x", 1]]
    with open_tracker("wandb", RunDescription(tmp_path, "r", {})) as tracker:
        for step in range(3000):
            tracker.log({"loss": step / 2}, step=step)
        tracker.table("t", ["a", "b"], rows)
        rows[0][1] = 2  # the caller's to change: what was given counts
        tracker.histogram("h", [1, 2], [0.0, 0.5, 1.0], step=3000)
        tracker.artifact("made", tmp_path)
        tracker.summarise({"best": 1.0})
    assert visitor.told[:3000] == [(step, {"loss": step / 2}) for step in range(3000)]
    table, histogram, (name, folder, _, upload), summary = visitor.told[3000:]
    assert table == (2999, "t", ["a", "b"], [["x", 1]])
    assert histogram == (3000, "h", [1, 2], [0.0, 0.5, 1.0])
    assert (name, folder, upload) == ("made", tmp_path, False)
    assert summary == ("summary", {"best": 1.0})
    assert (visitor.exit_code, visitor.abandoned) == (0, 0)


def test_a_backend_that_hangs_is_abandoned(tmp_path, monkeypatch, caplog):
    """A run of thousands of lines goes on beside a call that never returns, and closes."""
    release, entered = threading.Event(), threading.Event()

    class Hanging(Visitor):
        def log(self, values, step):
            entered.set()
            release.wait()

    visitor = receive(monkeypatch, Hanging())
    try:
        with open_tracker("wandb", RunDescription(tmp_path, "r", {})) as tracker:
            tracker.log({"x": 0.0}, step=0)
            assert entered.wait(30)
            monkeypatch.setattr(sender, "CALL_TIMEOUT", 0.0)
            for step in range(1, 2000):
                tracker.log({"x": 0.0}, step=step)
        assert visitor.abandoned == 1
        assert warnings(caplog) == [
            f"W&B has not answered for 0 seconds; the local log in {tmp_path} goes on",
        ]
        assert len(read_lines(tmp_path / "metrics.jsonl")) == 2000
    finally:
        release.set()


@pytest.mark.parametrize("hangs", ["start", "log", "finish"])
def test_finishing_waits_no_longer_than_it_may(hangs, tmp_path, monkeypatch, caplog):
    release = threading.Event()

    class Hanging(Visitor):
        def log(self, values, step):
            if hangs == "log":
                release.wait()

        def finish(self, exit_code):
            if hangs == "finish":
                release.wait()

    visitor = Hanging()

    def start(*args):
        if hangs == "start":
            release.wait()
        return visitor

    monkeypatch.setattr(wandb_backend, "WandbRun", start)
    monkeypatch.setattr(sender, "FINISH_TIMEOUT", 0.05)
    monkeypatch.setattr(sender, "START_TIMEOUT", 0.05)
    try:
        with open_tracker("wandb", RunDescription(tmp_path, "r", {})) as tracker:
            tracker.log({"x": 0.0}, step=0)
        what = "start" if hangs == "start" else "finish"
        assert warnings(caplog) == [f"W&B did not {what} within 0 seconds; the local log in {tmp_path} goes on"]
        assert visitor.abandoned == (hangs != "start")
    finally:
        release.set()


def test_a_backend_that_falls_behind_is_abandoned(tmp_path, monkeypatch, caplog):
    release, entered = threading.Event(), threading.Event()

    class Slow(Visitor):
        def log(self, values, step):
            entered.set()
            release.wait()

    visitor = receive(monkeypatch, Slow())
    monkeypatch.setattr(sender, "QUEUE_SIZE", 10)
    tracker = open_tracker("wandb", RunDescription(tmp_path, "r", {}))
    tracker.log({"x": 0.0}, step=0)
    assert entered.wait(30)
    for step in range(1, 100):
        tracker.log({"x": 0.0}, step=step)
    assert warnings(caplog) == [f"W&B is 10 messages behind; the local log in {tmp_path} goes on"]
    release.set()
    tracker.finish()
    assert visitor.abandoned == 1
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 100


def test_a_slow_backend_gets_everything(tmp_path, monkeypatch, caplog):
    class Slow(Visitor):
        def log(self, values, step):
            threading.Event().wait(0.005)
            super().log(values, step)

    visitor = receive(monkeypatch, Slow())
    with open_tracker("wandb", RunDescription(tmp_path, "r", {})) as tracker:
        for step in range(50):
            tracker.log({"x": 0.0}, step=step)
    assert [step for step, _ in visitor.told] == list(range(50))
    assert not warnings(caplog)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds W&B's service in /proc")
def test_the_interpreter_exits_though_wandbs_service_hangs(tmp_path, monkeypatch):
    """W&B's service is a process of its own: stopped, it answers nothing, and W&B would wait for it at exit."""
    code = """
import os, pathlib, signal, sys
from saepatch.tracking import sender
from saepatch.tracking.open import RunDescription, open_tracker
sender.FINISH_TIMEOUT = 0.5
with open_tracker("wandb:offline", RunDescription(pathlib.Path(sys.argv[1]), "r", {})) as tracker:
    assert tracker.sync_command
    tasks = pathlib.Path(f"/proc/{os.getpid()}/task").glob("*/children")
    children = {int(pid) for task in tasks for pid in task.read_text().split()}
    for pid in children:
        print(pid, flush=True)
        os.kill(pid, signal.SIGSTOP)
    tracker.log({"loss": 1.0}, step=0)
"""
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # that of the other tests
    out, err = tmp_path / "out.txt", tmp_path / "err.txt"  # the service has a pipe's end too, and would keep it open
    with out.open("w") as stdout, err.open("w") as stderr:
        command = [sys.executable, "-c", code, str(tmp_path)]
        done = subprocess.run(command, stdout=stdout, stderr=stderr, timeout=120, check=False)
    services = out.read_text().split()
    for pid in services:
        os.kill(int(pid), signal.SIGKILL)
    assert done.returncode == 0, err.read_text()
    assert services
    assert "did not finish within" in err.read_text()
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1


def test_histograms(tmp_path):
    with open_tracker("wandb:offline", RunDescription(tmp_path, "r", {})) as tracker:
        tracker.log({"loss": 1.0}, step=0)
        tracker.histogram("site/density", np.array([3, 0, 1]), torch.tensor([-2.0, -1.0, -0.5, 0.0]), step=100)
        tracker.log({"loss": 0.5}, step=100)
        with pytest.raises(ValueError, match="3 edges for 3 counts"):
            tracker.histogram("h", [1, 2, 3], [0.0, 1.0, 2.0], step=100)
        with pytest.raises(ValueError, match="not finite"):
            tracker.histogram("h", [1], [0.0, float("inf")], step=100)
        with pytest.raises(ValueError, match="'time'"):
            tracker.histogram("time", [1], [0.0, 1.0], step=100)
    row = read_lines(tmp_path / "metrics.jsonl")[1]
    assert row["step"] == 100
    assert row["site/density"] == {"counts": [3, 0, 1], "edges": [-2, -1, -0.5, 0]}
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (_, last) = history(folder)
    assert last["step"]["num"] == 100
    assert last["item"]["site/density._type"] == "histogram"
    assert last["item"]["site/density.values"] == [3, 0, 1]
    assert last["item"]["site/density.bins"] == [-2, -1, -0.5, 0]
    assert last["item"]["loss"] == 0.5


def test_versions_and_commit_go_along(tmp_path, monkeypatch):
    repository = tmp_path / "code"
    repository.mkdir()
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *command], cwd=repository, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, check=True, capture_output=True, text=True)
    monkeypatch.chdir(repository)
    with open_tracker("wandb:offline", RunDescription(tmp_path / "out", "r", {"lr": 0.1})) as tracker:
        tracker.log({"loss": 1.0}, step=0)
    (folder,) = (tmp_path / "out" / "wandb").glob("offline-run-*")
    config = json.loads(leet(folder, "--summary"))["config"]
    assert config["git_commit"] == head.stdout.strip()
    assert config["versions"]["torch"] == torch.__version__
    assert config["lr"] == 0.1


@pytest.mark.parametrize("broken", ["no repository", "no git"])
def test_no_commit_is_no_trouble(broken, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    if broken == "no git":
        monkeypatch.setenv("PATH", str(tmp_path))
    assert tracking._surroundings(tmp_path)["git_commit"] is None


@pytest.mark.parametrize("upload", [False, True])
def test_artifacts(upload, tmp_path, caplog):
    made = tmp_path / "sae"
    (made / "deep").mkdir(parents=True)
    (made / "cfg.json").write_text("{}")
    (made / "deep" / "weights").write_bytes(b"1234")
    with open_tracker("wandb:offline", RunDescription(tmp_path / "out", "r", {})) as tracker:
        tracker.log({"loss": 1.0}, step=7)
        tracker.artifact("sae/é", made, upload=upload)
        with pytest.raises(UserError, match="no folder"):
            tracker.artifact("sae", tmp_path / "nowhere")
    assert not warnings(caplog)
    (row,) = read_lines(tmp_path / "out" / "artifacts.jsonl")
    digest = hashlib.sha256(b"cfg.json 2\n{}deep/weights 4\n1234").hexdigest()
    about = {"step": 7, "name": "sae/é", "path": str(made), "files": 2, "bytes": 6, "sha256": digest}
    assert {name: row[name] for name in about} == about
    (folder,) = (tmp_path / "out" / "wandb").glob("offline-run-*")
    assert digest in leet(folder)
    kept = [path.read_bytes() for path in (tmp_path / "out" / "wandb").rglob("*") if path.is_file()]
    assert (b"1234" in kept) == upload


def test_resuming_cuts_what_came_after_the_checkpoint(tmp_path):
    """A run that was killed after its checkpoint at step 2, in the middle of a line, ends as one that never was."""

    def steps(tracker, numbers):
        for step in numbers:
            tracker.log({"x": step * 0.5}, step=step)
            tracker.histogram("h", [step], [0.0, 1.0], step=step)

    with open_tracker("none", RunDescription(tmp_path / "whole", "r", {})) as tracker:
        steps(tracker, range(6))
    killed = open_tracker("none", RunDescription(tmp_path / "killed", "r", {}))
    steps(killed, range(4))
    killed.artifact("early", tmp_path / "whole")
    killed._lines.close()
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 4, "ti')
    with open_tracker("none", RunDescription(tmp_path / "killed", "r", {}), resume_from=2) as tracker:
        steps(tracker, range(3, 6))
    whole, resumed = (
        [{name: value for name, value in row.items() if name != "time"} for row in read_lines(path / "metrics.jsonl")]
        for path in (tmp_path / "whole", tmp_path / "killed")
    )
    assert resumed == whole
    assert read_lines(tmp_path / "killed" / "artifacts.jsonl") == []  # it was noted at step 3


def test_a_line_cut_short_is_taken_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "x": 1}\nnull\n{"step": 1, "x": 2}\n{"step": 2, "x"')
    with open_tracker("none", RunDescription(tmp_path, "r", {}), resume=True) as tracker:
        tracker.log({"x": 3}, step=2)
    assert [row["x"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_resumed_run_keeps_its_summary_and_a_new_one_does_not(tmp_path):
    for resume, expected in ((False, {"a": 1}), (True, {"a": 1, "b": 2}), (False, {"b": 2})):
        with open_tracker("none", RunDescription(tmp_path, "r", {}), resume=resume) as tracker:
            tracker.summarise({list(expected)[-1]: list(expected.values())[-1]})
        assert json.loads((tmp_path / "metrics.summary.json").read_text()) == expected


def test_a_wandb_run_goes_on_under_its_id(tmp_path, caplog):
    with open_tracker("wandb:offline", RunDescription(tmp_path, "r", {})) as tracker:
        tracker.log({"loss": 1.0}, step=100)
        run_id = tracker.run_id
    assert run_id
    with open_tracker("wandb:offline", RunDescription(tmp_path, "r", {}, run_id=run_id), resume_from=100) as tracker:
        assert tracker.run_id == run_id
        tracker.log({"loss": 0.5}, step=200)
        command = tracker.sync_command
    first, second = folders = sorted((tmp_path / "wandb").glob(f"offline-run-*-{run_id}*"))
    assert command == f"wandb sync {first} {second}"
    assert [[(row["step"]["num"], row["item"]["loss"]) for row in history(f)] for f in folders] == [
        [(100, 1)],
        [(200, 0.5)],
    ]
    assert not warnings(caplog)
    with open_tracker("none", RunDescription(tmp_path, "r", {}, run_id=run_id)) as tracker:
        assert tracker.run_id == run_id  # kept for a later run that has W&B again
    with open_tracker("none", RunDescription(tmp_path, "r", {})) as tracker:
        assert tracker.run_id is None


def test_a_resumed_online_run_never_goes_back(tmp_path, monkeypatch):
    import wandb

    class Resumed:
        """Stands in for a run that W&B has 7 rows of: what is below its own step, W&B drops."""

        step, offline, disabled, dir = 7, False, False, str(tmp_path / "wandb" / "x" / "files")

        def __init__(self):
            self.rows, self.config, self.summary = [], {}, {}

        def define_metric(self, *args, **kwargs):
            pass

        def log(self, values, step=None):
            self.rows.append((step, list(values)))

        def finish(self, *args, **kwargs):
            pass

    run = Resumed()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb, "init", lambda **options: run)
    with open_tracker("wandb:online", RunDescription(tmp_path, "r", {}, run_id="x"), resume_from=0) as tracker:
        tracker.table("t", ["a"], [[1]])
        tracker.curve("c", "k", [1, 2], {"y": [0.1, 0.2]})
        tracker.log({"loss": 0.5}, step=30)
    steps = [step for step, _ in run.rows]
    assert len(steps) == 4
    assert steps == sorted(steps)
    assert steps[0] >= 7
    assert steps[-1] == 30
