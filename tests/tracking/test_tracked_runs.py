"""What commands show to trackers, read back by W&B's own reader and from trackio's dashboard in a browser."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import random_sae, tiny_model

from experiments.common.tracked import show
from experiments.patchscope import PatchscopeConfig
from saepatch.cli.main import main
from saepatch.errors import UserError
from saepatch.measure.quality import SpliceQuality
from saepatch.report import HeatMap, LineChart, Page, Section, Series, Table, write_page
from saepatch.runs import kinds as kinds_of_runs
from saepatch.tracking import open as tracking
from saepatch.tracking.open import RunDescription, open_tracker
from saepatch.tracking.plots import plotly_figure

pytestmark = pytest.mark.whole

EVIL = "</script><script>window.hit=1</script>"


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """A machine on which W&B knows nobody and reaches nothing, and trackio's runs lie apart."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DATA_DIR", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


@pytest.fixture
def place(tmp_path):
    model = tiny_model(vocab_size=261)
    model.tokenizer.add_tokens([EVIL, "<s>"])
    model.hf.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    sae = random_sae(seed=1)
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    sae.save_model(tmp_path / "saes" / "resid_post.1")
    pair = {"clean": f"a{EVIL}b c", "corrupted": "a<s>b c", "answer": "x", "counter": "y"}
    other = {"clean": f"a{EVIL}b d", "corrupted": "a<s>b d", "answer": "x", "counter": "y"}
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, (pair, other))))
    return tmp_path


def run(place, out, command, *more):
    given = ["--model", place / "model", "--sae", place / "saes", "--pairs", place / "pairs.jsonl", "--out", out]
    return main([command, *map(str, given), *more])


def leet(folder: Path, *flags: str) -> str:
    wandb = Path(sys.executable).with_name("wandb")
    given = [wandb, "leet", "inspect", "--json", *flags, folder]
    return subprocess.run(given, capture_output=True, text=True, check=True).stdout


def kept(folder: Path) -> dict[str, str]:
    """Files that W&B would upload, by their names."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("files/media/**/*.*")}


def test_wandb_is_shown_a_whole_run(place, caplog):
    out = place / "study" / "groups"
    flags = ["--latents", "3; 3,5; 3,5,7", "--track", "wandb:offline", "--quiet"]
    assert run(place, out, "patch", *flags) == 0
    assert not [record for record in caplog.records if record.levelname == "WARNING"], caplog.text
    (folder,) = (out / "wandb").glob("offline-run-*")
    summary = json.loads(leet(folder, "--summary"))
    assert summary["config"]["latents"] == "3; 3,5; 3,5,7"
    own = json.loads((out / "summary.json").read_text())
    assert summary["config"]["model_hashes"]["model"]["hash"] == own["model"]["hash"]
    assert summary["summary"]["denoise/largest_effect"] == pytest.approx(own["top"]["denoise"][0]["effect"]["value"])
    assert summary["summary"]["Edits"]["_type"] == "table-file"
    assert summary["summary"]["Edits"]["nrows"] == 3
    assert summary["summary"]["report"]["_type"] == "html-file"
    records = [json.loads(line) for line in leet(folder).splitlines()]
    (started,) = [record["run"] for record in records if record["type"] == "run"]
    assert (started["run_group"], started["job_type"]) == ("study", "patch")
    text = leet(folder)
    assert "step_metric" in text or "stepMetric" in text
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    title = "Effect over the number of latents, resid_post.1: denoise"
    x = "latents patched together"
    told = {row[x]: row[f"{title}/patched"] for row in rows if x in row}
    lines = {line["latent"].count(",") + 1: line["effect"]["value"] for line in own["top"]["denoise"]}
    assert told == pytest.approx(lines)
    digest = json.loads((out / "artifacts.jsonl").read_text())["sha256"]
    assert digest in text  # the dictionaries, by path and hash
    media = kept(folder)
    assert any(name.endswith(".html") and "<script>" in text for name, text in media.items())
    edits = [json.loads(line) for line in (out / "tables" / "Edits.jsonl").read_text().splitlines()]
    assert len(edits) == 3
    cards = [edit["card"].removeprefix("report.html#") for edit in edits if edit.get("card")]
    assert cards
    page = (out / "report.html").read_text()
    assert all(f'id="{anchor}"' in page for anchor in cards)
    assert len(list((out / "figures").glob("*.svg"))) == 0  # curves are tables


def test_heat_maps_are_plotly_figures_with_escaped_tokens(place):
    out = place / "study" / "maps"
    assert run(place, out, "patch", "--each_position", "--track", "wandb:offline", "--quiet") == 0
    (folder,) = (out / "wandb").glob("offline-run-*")
    figures = [json.loads(text) for name, text in kept(folder).items() if name.endswith(".plotly.json")]
    assert figures
    for figure in figures:
        assert figure["data"][0]["type"] == "heatmap"
        assert "<" not in json.dumps([figure["layout"]["xaxis"]["ticktext"], figure["data"][0]["text"]])
    assert "&lt;" in json.dumps(figures)  # of a token
    assert list((out / "figures").glob("*.svg"))


def test_a_figure_says_what_the_map_says():
    heat = HeatMap("<b>t", ["<s>", "b"], ["x", "<i>"], [[1.0, None], [-2.0, float("nan")]], columns_below=["=", "y"])
    figure = plotly_figure(heat).to_plotly_json()
    assert [list(row) for row in figure["data"][0]["z"]] == [[1.0, None], [-2.0, None]]
    assert figure["layout"]["xaxis"]["ticktext"] == ["x / =", "&lt;i&gt; / y"]
    assert figure["data"][0]["zmid"] == 0
    assert plotly_figure(LineChart("t", "x", "y", [Series("s", [1], [1])])) is None


def test_a_killed_run_goes_on_as_the_same_run_of_wandb(place, monkeypatch):
    out = place / "study" / "killed"
    flags = ["--latents", "3", "--part", "1", "--track", "wandb:offline", "--quiet"]
    import saepatch.runs.driver

    write = saepatch.runs.driver._write_part

    def stop(work, number, meter, check):
        if number == 1:
            raise KeyboardInterrupt
        write(work, number, meter, check)

    with monkeypatch.context() as patched:
        patched.setattr(saepatch.runs.driver, "_write_part", stop)
        assert run(place, out, "patch", *flags) == 130
    assert run(place, out, "patch", *flags) == 0
    # offline-run-<time>-<id>, and a trailing -1 where both began within a second
    folders = [path.name.split("-") for path in (out / "wandb").glob("offline-run-*")]
    assert len(folders) == 2
    assert len({parts[3] for parts in folders}) == 1


def restoring(place, out, monkeypatch, conditions):
    """A run of restore that is stopped after so many conditions, and then goes on."""
    rows = [{"prompt": f"ask {n}{EVIL}", "clean": f"say {n}", "harmful": n < 3} for n in range(4)]
    (place / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"prompts": place / "prompts.jsonl", "model": place / "model", "sae": place / "saes", "out": out}
    given |= {
        "latents": "3,5",
        "max_new_tokens": 4,
        "part": 2,
        "controls": 2,
        "refusals": "S",
        "track": "wandb:offline",
    }
    flags = ["restore", *(str(word) for name, value in given.items() for word in (f"--{name}", value)), "--quiet"]
    from saepatch.runs.commands import restorations as answering

    made, seen = answering._rows, []

    def stop(*args):
        seen.append(args)
        if len(seen) > conditions:
            raise KeyboardInterrupt
        return made(*args)

    with monkeypatch.context() as patched:
        patched.setattr(answering, "_rows", stop)
        assert main(flags) == 130
    assert main(flags) == 0


@pytest.mark.slow
def test_wandb_is_shown_a_restoration(place, monkeypatch):
    out = place / "study" / "restored"
    restoring(place, out, monkeypatch, 9)
    folders = sorted((out / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime)
    assert len(folders) == 2
    assert len({path.name.split("-")[3] for path in folders}) == 1  # one run, resumed
    text = leet(folders[1])
    records = [json.loads(line) for line in text.splitlines()]
    (started,) = [record["run"] for record in records if record["type"] == "run"]
    assert (started["run_group"], started["job_type"]) == ("study", "restore")
    summary, own = json.loads(leet(folders[1], "--summary")), json.loads((out / "summary.json").read_text())
    assert summary["config"]["model_hashes"]["model"]["hash"] == own["model"]["hash"]
    told = summary["summary"]
    assert {one["condition"] for one in own["conditions"]} == {"bare", "donor", "restored", "random", "matched"}
    for one in own["conditions"]:
        name = {None: "", True: "harmful/", False: "harmless/"}[one["harmful"]] + one["condition"]
        for outcome in ("refuse", "comply", "degenerate", "refusal_score"):
            value, low, high = one[outcome]
            assert told[f"{name}/{outcome}"] == pytest.approx(value)
            if low is not None:  # of one prompt there is no bootstrap
                assert (told[f"{name}/{outcome}_low"], told[f"{name}/{outcome}_high"]) == pytest.approx((low, high))
    assert told["Judged answers"]["_type"] == "table-file"
    assert told["Judged answers"]["nrows"] == 4 * 5
    assert told["Outcomes"]["_type"] == "table-file"
    assert told["report"]["_type"] == "html-file"
    assert json.loads((out / "artifacts.jsonl").read_text())["sha256"] in text
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2 * 7, 4 * 7]  # one start and the next; answers, whatever it restores
    answers = [json.loads(line) for line in (out / "tables" / "Judged_answers.jsonl").read_text().splitlines()]
    assert {row["condition"] for row in answers} == {"bare", "donor", "restored", "random", "matched"}


STEER = ["--unit", "2", "--max_new_tokens", "4", "--prompt", "abc"]


@pytest.mark.parametrize(("command", "more"), [("steer", STEER), ("latent", [])])
def test_pages_of_single_answers_and_latents_are_shown(place, command, more):
    (place / "texts.txt").write_text("abc\nbcd\n")
    page = place / "study" / "one.html"
    given = ["--model", place / "model", "--sae", place / "saes", "--reference", place / "texts.txt", "--html", page]
    latent = ["--latent", "resid_post.1:3"] if command == "steer" else ["resid_post.1:3"]
    assert main([command, *latent, *map(str, given), *more, "--json", "--track", "wandb:offline"]) == 0
    (folder,) = (place / "study" / "one.html.log" / "wandb").glob("offline-run-*")
    records = [json.loads(line) for line in leet(folder).splitlines()]
    (started,) = [record["run"] for record in records if record["type"] == "run"]
    assert (started["run_group"], started["job_type"]) == ("study", command)
    assert any(text == page.read_text() for text in kept(folder).values())
    if command == "steer":
        (row,) = map(
            json.loads, (place / "study" / "one.html.log" / "tables" / "Answers.jsonl").read_text().splitlines()
        )
        assert row["prompt"] == "abc"
    assert main([command, *latent, *map(str, given[:-2]), *more, "--json", "--track", "wandb:offline"]) == 2


def test_an_experiment_is_shown(tmp_path):
    out = tmp_path / "study" / "readings"
    out.mkdir(parents=True)
    page = Page("t", "", [Section("Readings", "", [Table(["a"], [(1,)], "")])])
    write_page(page, out / "report.html")
    summary = {"one": {"share": [0.5, 0.25, 1], "n": 3, "ids": [3, 1, 2], "flag": True}, "name": "x"}
    show(PatchscopeConfig(out=str(out), track="wandb:offline"), "patchscope", page, summary)
    (folder,) = (out / "wandb").glob("offline-run-*")
    told = json.loads(leet(folder, "--summary"))
    figures = {name: value for name, value in told["summary"].items() if name.startswith("one/")}
    assert figures == {"one/share": 0.5, "one/share_low": 0.25, "one/share_high": 1, "one/n": 3}
    assert told["summary"]["Readings"]["nrows"] == 1
    assert told["config"]["random"] == 20
    with pytest.raises(UserError, match="unknown tracker 'clay'"):
        PatchscopeConfig(track="clay")


@pytest.mark.slow
def test_shards_and_their_merge_are_one_group(place):
    out = place / "study" / "shards"
    for shard in ("0/2", "1/2"):
        assert run(place, out, "patch", "--latents", "3", "--shard", shard, "--track", "wandb:offline", "--quiet") == 0
    assert main(["merge", str(out), "--track", "wandb:offline", "--quiet"]) == 0
    folders = [*out.glob("parts/*/wandb/offline-run-*"), *out.glob("wandb/offline-run-*")]
    told = []
    for folder in folders:
        records = [json.loads(line) for line in leet(folder).splitlines()]
        told += [(r["run"]["run_group"], r["run"]["job_type"]) for r in records if r["type"] == "run"]
    assert sorted(told) == [("study", "merge"), ("study", "patch"), ("study", "patch")]


def test_which_specs_there_are(tmp_path, capsys):
    assert tracking.read_spec("none") == ()
    assert tracking.read_spec("wandb:offline, trackio") == ("wandb:offline", "trackio")
    for spec, message in (
        ("clay", "unknown tracker 'clay'"),
        ("wandb,wandb:offline", "twice"),
        ("", "unknown tracker ''"),
    ):
        assert main(["demo", "--track", spec, "--out", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err


def test_what_is_logged_after_a_curve_is_kept(tmp_path, caplog):
    with open_tracker("wandb:offline", RunDescription(tmp_path / "out", "x", {}, axes={"loss": "tokens"})) as tracker:
        tracker.log({"loss": 5.0}, 5)
        tracker.curve("effects", "k", [1, 2, 4, 8, 16, 32], {"top": [1, 2, 3, 4, 5, 6]})
        tracker.table("some", ["a"], [[1]])
        for step in (6, 7, 8, 50):
            tracker.log({"loss": float(step)}, step)
            tracker.log({"rate": 0.5}, step)
        tracker.curve("again", "k", [1, 2], {"top": [7, 8]})
        tracker.log({"loss": 51.0}, 51)
    (folder,) = (tmp_path / "out" / "wandb").glob("offline-run-*")
    records = [json.loads(line) for line in leet(folder).splitlines()]
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [(row["tokens"], row["loss"]) for row in rows if "loss" in row] == [(n, n) for n in (5, 6, 7, 8, 50, 51)]
    assert sum("rate" in row for row in rows) == 4
    assert [row["effects/top"] for row in rows if "effects/top" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["again/top"] for row in rows if "again/top" in row] == [7, 8]
    assert sum(any(key.startswith("some") for key in row) for row in rows) == 1


def test_a_summary_replaces_what_was_logged_under_its_name(tmp_path):
    with open_tracker("wandb:offline", RunDescription(tmp_path / "out", "x", {}, axes={"*": "tokens"})) as tracker:
        tracker.log({"fvu": 0.5, "loss": 1.0}, 5)
        tracker.summarise({"fvu": 0.25})
        tracker.log({"loss": 0.5}, 5)
    (folder,) = (tmp_path / "out" / "wandb").glob("offline-run-*")
    told = json.loads(leet(folder, "--summary"))["summary"]
    assert (told["fvu"], told["loss"]) == (0.25, 0.5)
    records = [json.loads(line) for line in leet(folder).splitlines()]
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [(row["tokens"], row["loss"]) for row in rows] == [(5, 1.0), (5, 0.5)]


def logged_names():
    """Names of headline figures of every command, and of training."""
    one = [0.5, 0.4, 0.6]
    top = [{"effect": {"value": 0.5, "low": 0.4, "high": 0.6}}]
    outcomes = dict.fromkeys(("refuse", "comply", "degenerate", "refusal_score"), one) | {"prompts": 2}
    conditions = [
        {"harmful": harmful, "condition": name} | outcomes
        for harmful in (True, False)
        for name in ("bare", "donor", "restored", "random", "matched")
    ]
    counts = dict.fromkeys(("pairs", "nodes", "candidates", "edges", "whole", "empty", "completeness"), 1)
    kept = dict.fromkeys(("nodes", "kept", "dropped", "edges"), one)
    kinds = ("efficacy", "paraphrase", "neighbourhood", "reversal", "ripple")
    measured = dict.fromkeys(("success", "magnitude", "accuracy"), one)
    found = [
        kinds_of_runs._patch({"top": {"denoise": top, "noise": top}}),
        kinds_of_runs._attribute(
            dict.fromkeys(kinds_of_runs.COUNTS, 1)
            | {"screens": {"denoise": {"pearson": 0.5, "top": [{"effect": 0.5}]}}}
        ),
        kinds_of_runs._restore({"conditions": conditions, "rows": 1}),
        kinds_of_runs._circuit(counts | {"faithfulness": kept, "random": [one], "selected": {}}),
        kinds_of_runs._edit({"pairs": 1, "score": one, "kinds": dict.fromkeys(kinds, measured), "relative_norms": {}}),
        dict.fromkeys((*SpliceQuality.__annotations__, "dense_share"), 0.0),
    ]
    return {name for figures in found for name in figures}


@pytest.mark.filterwarnings("ignore:Pydantic V1 style:DeprecationWarning")
def test_the_workspace_is_one_that_its_package_reads(capsys, tmp_path, monkeypatch):
    pytest.importorskip("wandb_workspaces", reason="not installed: pip install 'saepatch[workspace]'")
    from wandb_workspaces.reports.v2 import BarPlot, MediaBrowser
    from wandb_workspaces.workspaces import Workspace, internal

    assert main(["track", "workspace", "--entity", "team", "--dry_run"]) == 0
    told = json.loads(capsys.readouterr().out)
    spec = internal.WorkspaceViewspec.model_validate_json(json.dumps(told.pop("spec")))  # as it reads W&B's answers
    read = Workspace._from_model(internal.View(spec=spec, **told))
    assert (read.entity, read.project, read.name) == ("team", "saepatch", "saepatch")
    panels = [panel for section in read.sections for panel in section.panels]
    shown = {
        getattr(metric, "name", metric) for panel in panels if isinstance(panel, BarPlot) for metric in panel.metrics
    }
    assert any(panel.media_keys == ["report"] for panel in panels if isinstance(panel, MediaBrowser))
    assert {name.removeprefix("summary:") for name in shown} <= logged_names()
    assert main(["track", "workspace"]) == 2
    assert (
        "W&B has no key: run `wandb login`, or print what would be uploaded with --dry_run" in capsys.readouterr().err
    )
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr("wandb.Api", lambda: (_ for _ in ()).throw(ConnectionError("no way there")))
    assert main(["track", "workspace"]) == 2
    assert "W&B did not take the workspace of project 'saepatch' (no way there)" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    assert main(["track", "workspace", "--dry_run"]) == 2
    assert "pip install 'saepatch[workspace]'" in capsys.readouterr().err


def test_curves_stay_in_the_local_log_too(tmp_path):
    with open_tracker("none", RunDescription(tmp_path, "r", {})) as tracker:
        tracker.curve("effects", "k", [1, 2], {"top": [0.5, None], "random": [0.0, 0.1]})
        with pytest.raises(ValueError, match="1 values of 'top' for 2 places"):
            tracker.curve("effects", "k", [1, 2], {"top": [0.5]})
    rows = [json.loads(line) for line in (tmp_path / "tables" / "effects.jsonl").read_text().splitlines()]
    assert rows == [{"k": 1, "top": 0.5, "random": 0.0}, {"k": 2, "top": None, "random": 0.1}]


def test_no_trackio_is_no_trouble(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with open_tracker("trackio", RunDescription(tmp_path, "r", {})) as tracker:
        tracker.log({"x": 1.0}, step=1)
    assert "trackio could not start" in caplog.text
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


SERVER = """
import sys, trackio
served = trackio.show(project="saepatch", open_browser=False, block_thread=True, server_port=int(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.browser
def test_trackios_dashboard_shows_a_run(browser, place, capfd, monkeypatch):
    pytest.importorskip("trackio", reason="trackio is not installed: pip install saepatch[dashboard]")

    store = place / "trackio"
    environment = os.environ | {"TRACKIO_DIR": str(store), "HF_HUB_OFFLINE": "1", "HOME": str(place / "home")}
    given = [
        "--model",
        place / "model",
        "--sae",
        place / "saes",
        "--pairs",
        place / "pairs.jsonl",
        "--latents",
        "3; 3,5",
    ]
    command = [sys.executable, "-m", "saepatch", "patch", *map(str, given), "--out", str(place / "run"), "--json"]
    done = subprocess.run(
        [*command, "--track", "trackio,wandb:offline"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["summary"]["pairs"] == 2  # nothing but the JSON: trackio's own prints are elsewhere
    assert "token" not in done.stderr
    port = 17860 + os.getpid() % 1000
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(port)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: _answers(port))
        browser.get(f"http://127.0.0.1:{port}/?project=saepatch")
        wait_for(lambda: "patch-pairs" in browser.page_source)
        wait_for(lambda: "edits" in browser.find_element("css selector", "body").text)
        assert browser.execute_script("return window.hit") is None
    finally:
        server.terminate()
        server.wait(20)


def _answers(port: int) -> bool:
    import urllib.request

    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def wait_for(found, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.2)


def test_no_other_module_knows_a_tracker():
    room = Path(tracking.__file__).parent
    root = room.parents[1]
    sources = [path for package in ("saepatch", "training", "experiments") for path in (root / package).rglob("*.py")]
    importers = {
        name: [path for path in sources if f" import {name}\n" in path.read_text(encoding="utf-8")]
        for name in ("wandb", "trackio")
    }
    assert {name: set(paths) for name, paths in importers.items()} == {
        "wandb": {room / "wandb.py", room / "workspace.py"},
        "trackio": {room / "trackio.py"},
    }
