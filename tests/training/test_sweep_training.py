"""Sweeps: which runs there are, what each shard does, what resuming skips, and the table at the end."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from runs_of_training import documents, small
from tiny import byte_tokenizer, tiny_model

from saepatch.errors import UserError
from saepatch.model.sites import Site
from training.__main__ import COLUMNS, main, read
from training.config import TrainingConfig
from training.loop import checkpoints, trainer
from training.loop.saving import Outcome
from training.loop.sweep import points, run_sweep, share
from training.loop.sweep_file import read_sweep

pytestmark = pytest.mark.whole

GRID = {"sae.k": [2, 4], "lr": [1e-3, 3e-3]}
NAMES = ["sae.k=2,lr=0.001", "sae.k=2,lr=0.003", "sae.k=4,lr=0.001", "sae.k=4,lr=0.003"]


def test_every_combination_is_a_run(tmp_path):
    base = small(sweep=GRID, shard="1/3", out=tmp_path, seed=7, sites=["resid_post.1"])
    found = points(base)
    assert [point.name for point in found] == NAMES
    assert [(point.config.sae.k, point.config.lr) for point in found] == [(2, 1e-3), (2, 3e-3), (4, 1e-3), (4, 3e-3)]
    for point in found:
        assert point.config.out == tmp_path / point.name
        assert (point.config.sweep, point.config.shard) == ({}, "0/1")
        rest = point.config.to_dict() | {"lr": base.lr, "out": str(base.out), "sweep": GRID, "shard": "1/3"}
        assert rest | {"sae": rest["sae"] | {"k": base.sae.k}} == base.to_dict()
    assert base.sweep == GRID, "the config handed in stays as it was"


def test_names_are_folders():
    swept = {"sites": ["all", ["resid_post.1", "mlp_out.2"]], "pack": [True], "sae.d_sae": [None], "lr": [1e-5]}
    first, second = points(TrainingConfig(sweep=swept))
    assert first.name == "sites=all,pack=true,sae.d_sae=null,lr=1e-05"
    assert second.name == "sites=resid_post.1+mlp_out.2,pack=true,sae.d_sae=null,lr=1e-05"
    assert second.config.sites == ["resid_post.1", "mlp_out.2"]
    assert first.config.lr == 1e-5


def test_shards_are_a_partition():
    every = points(TrainingConfig(sweep={"seed": list(range(7))}))
    for count in (1, 2, 3, 7, 9):
        parts = [share(every, f"{i}/{count}") for i in range(count)]
        assert sorted(point.config.seed for part in parts for point in part) == list(range(7))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ({"sae.kk": [1]}, "sweep over 'sae.kk': there is no such setting; write its full name, as in sae.k"),
        ({"sae": [1]}, "sweep over 'sae': there is no such setting"),
        ({"k": [1]}, "sweep over 'k': there is no such setting"),
        ({"model": ["a", "b"]}, "sweep over 'model': all runs of a sweep share it"),
        ({"out": ["a", "b"]}, "sweep over 'out': it belongs to the sweep as a whole"),
        ({"lr": []}, "sweep over 'lr' has no values"),
        ({"lr": [1e-3, 0.001]}, "two runs of the sweep would be named 'lr=0.001'"),
        ({"lr": [1e-3, -1]}, "run 'lr=-1' of the sweep: lr is -1.0"),
        ({"sae.k": ["many"]}, "run 'sae.k=many' of the sweep: "),
        ({"sae.k": [4, 100_000], "sae.d_sae": [48]}, "lower k or widen it"),
    ],
)
def test_what_cannot_be_swept_is_said_before_anything_runs(sweep, said, tmp_path, capsys):
    config = tmp_path / "sweep.yaml"
    config.write_text(yaml.safe_dump({"model": "./nowhere", "data": "./nowhere", "sweep": sweep}))
    assert main([str(config), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shard", ["2/2", "1", "a/b", "-1/2", "0/0", "0/2/3", ""])
def test_shards_that_there_are_not(shard):
    with pytest.raises(UserError, match="write I/N with I from 0 to N-1"):
        TrainingConfig(shard=shard)


def test_sweeps_are_read_from_files_and_from_the_command_line(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("lr: 1.0e-2\nsweep:\n  sae.k: [8, 16]\n  lr: [1.0e-3, 3e-3]\n")
    assert read([str(file)]).sweep == {"sae.k": [8, 16], "lr": [1e-3, 3e-3]}
    given = read(["--sweep", "{sae.k: [8, 16], lr: [1.0e-3]}", "--shard", "1/4"])
    assert (given.sweep, given.shard) == ({"sae.k": [8, 16], "lr": [1e-3]}, "1/4")


class Trained:
    """Stands in for training: writes the summary of a finished run, and keeps what it was called with."""

    def __init__(self, fail="", stop=""):
        self.calls, self.fail, self.stop = [], fail, stop

    def __call__(self, model, texts, config, out, ranks, also):
        self.calls.append((model, texts, config))
        if out.name == self.fail:
            raise UserError("the loss is nan")
        if out.name == self.stop:
            return Outcome({}, 512, stopped=True)
        figures = {site: dict.fromkeys(COLUMNS, config.sae.k + config.lr + site.layer) for site in config.sites_of(3)}
        out.mkdir(parents=True)
        summary = {
            "identity": {"config": checkpoints.identifying_settings(config)},
            "sites": {str(site): row for site, row in figures.items()},
        }
        (out / "summary.json").write_text(json.dumps(summary))
        return Outcome(figures, config.tokens)

    @property
    def names(self):
        return [config.out.name for _, _, config in self.calls]


@pytest.fixture
def stand_in(monkeypatch):
    def put(**options):
        trained = Trained(**options)
        monkeypatch.setattr(trainer, "train_saes", trained)
        return trained

    return put


def test_runs_share_the_model_and_the_documents(tmp_path, stand_in):
    trained, model = stand_in(), tiny_model()
    swept = run_sweep(model, iter(documents()), small(sweep=GRID, out=tmp_path))
    assert trained.names == NAMES
    assert all(each[0] is model for each in trained.calls)
    assert all(each[1] is trained.calls[0][1] for each in trained.calls)
    assert list(trained.calls[0][1]) == documents()
    assert [run["name"] for run in swept.runs] == NAMES
    assert json.loads((tmp_path / "sweep.json").read_text()) == {"fields": GRID, "runs": swept.runs}
    assert swept.runs[3]["values"] == {"sae.k": 4, "lr": 3e-3}
    assert swept.runs[3]["sites"]["resid_post.2"]["fvu"] == pytest.approx(6.003)
    assert not list(tmp_path.glob(".*"))


def test_shards_together_make_the_table(tmp_path, stand_in):
    trained = stand_in()
    for i, finished in ((1, NAMES[1::2]), (0, NAMES)):
        swept = run_sweep(tiny_model(), documents(), small(sweep=GRID, out=tmp_path, shard=f"{i}/2"))
        assert [run["name"] for run in swept.runs] == finished
    assert trained.names == NAMES[1::2] + NAMES[::2]
    assert [run["name"] for run in json.loads((tmp_path / "sweep.json").read_text())["runs"]] == NAMES


def test_a_run_that_fails_does_not_end_the_sweep(tmp_path, stand_in):
    trained = stand_in(fail=NAMES[1])
    swept = run_sweep(tiny_model(), documents(), small(sweep=GRID, out=tmp_path))
    assert trained.names == NAMES
    assert swept.failed == {NAMES[1]: "the loss is nan"}
    assert [run["name"] for run in swept.runs] == [NAMES[0], *NAMES[2:]]


def test_a_sweep_that_is_stopped_begins_no_other_run(tmp_path, stand_in):
    trained = stand_in(stop=NAMES[1])
    swept = run_sweep(tiny_model(), documents(), small(sweep=GRID, out=tmp_path))
    assert trained.names == NAMES[:2]
    assert swept.stopped
    assert [run["name"] for run in swept.runs] == NAMES[:1]


def test_no_run_begins_where_another_could_not(tmp_path, stand_in):
    trained = stand_in()
    (tmp_path / NAMES[2] / "resid_post.1").mkdir(parents=True)
    with pytest.raises(UserError, match="holds resid_post.1 already"):
        run_sweep(tiny_model(), documents(), small(sweep=GRID, out=tmp_path))
    with pytest.raises(UserError, match="the model has 3 layers"):
        run_sweep(tiny_model(), documents(), small(sweep={"sites": [["resid_post.1"], ["resid_post.3"]]}, out=tmp_path))
    assert trained.calls == []


@pytest.fixture
def command(tmp_path):
    """A command line over a model and texts in files, and what makes each of its runs short."""
    model = tiny_model()
    model.hf.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()))
    settings = small(tokens=1024, sites=["resid_post.1"]).to_dict()
    settings |= {"model": str(tmp_path / "model"), "data": str(tmp_path / "data.jsonl"), "out": str(tmp_path / "out")}
    settings["sweep"] = {"sae.k": [2, 4]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return [str(tmp_path / "config.yaml")]


@pytest.mark.slow
def test_the_command_line(command, tmp_path, capsys, stand_in):
    trained = stand_in(fail="sae.k=2")
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert out.splitlines()[1].split()[0] == "sae.k=4"
    assert "1 finished runs" in out
    assert "error: 1 runs of the sweep failed, sae.k=2 first: the loss is nan" in err
    trained.fail, trained.stop = "", "sae.k=2"
    (tmp_path / "out/sae.k=4/summary.json").unlink()
    assert main([*command, "--resume", "true"]) == 130
    assert re.search(r"interrupted: a checkpoint .*: run the same command with --resume true", capsys.readouterr().err)
    assert main([*command, "--dry_run"]) == 0
    assert "2 runs:\n  sae.k=2\n  sae.k=4\n" in capsys.readouterr().out


def test_a_whole_sweep(command, tmp_path, capsys):
    from saepatch.dictionaries.loading import load_sae

    assert main([*command, "--shard", "1/2"]) == 0
    assert "1 finished runs" in capsys.readouterr().out
    assert main([*command, "--resume", "true"]) == 0
    out, err = capsys.readouterr()
    assert "sae.k=4 is already finished" in err
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows[:3]] == ["run", "sae.k=2", "sae.k=4"]
    assert float(rows[1][rows[0].index("l0")]) <= 2 < float(rows[2][rows[0].index("l0")]) <= 4
    for k in (2, 4):
        place = tmp_path / "out" / f"sae.k={k}"
        assert load_sae(str(place), "resid_post.1").site == Site(1)
        kept = yaml.safe_load((place / "config.yaml").read_text())
        assert (kept["sae"]["k"], kept["sweep"], kept["out"]) == (k, {}, str(place))


WANDB = """
program: saepatch
command: [saepatch, train, CONFIG.yaml, --point, "${args_json}", --track, wandb, --resume]
method: grid
metric: {name: ce_recovered, goal: maximize}
parameters:
  sae.k: {values: [2, 4]}
  lr: {values: [0.001, 0.003]}
  seed: {value: 1}
"""


def sweep_of_wandb(tmp_path, **changes):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(WANDB), **changes}))
    return str(path)


def test_the_file_of_a_wandb_sweep_is_a_sweep_here(tmp_path, stand_in):
    trained = stand_in()
    config = small(sweep=sweep_of_wandb(tmp_path), out=tmp_path / "out")
    found = points(config)
    assert [point.values for point in found] == [
        {"lr": lr, "sae.k": k, "seed": 1} for lr in (1e-3, 3e-3) for k in (2, 4)
    ]
    run_sweep(tiny_model(), documents(), config)
    told = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert told["fields"] == {"lr": [1e-3, 3e-3], "sae.k": [2, 4], "seed": [1]}
    assert trained.names[:2] == ["lr=0.001,sae.k=2,seed=1", "lr=0.001,sae.k=4,seed=1"]


def test_an_agent_of_wandb_runs_a_point_in_the_folder_of_the_sweep(tmp_path, stand_in):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    whole = points(small(sweep=sweep_of_wandb(tmp_path), out=tmp_path))
    told = {name: {"value": value} for name, value in reversed(whole[2].values.items())}  # what an agent is sent
    macros = create_sweep_command_args({"args": told})
    command = create_sweep_command(yaml.safe_load(WANDB)["command"])
    words = [word for part in command for word in (macros[part[2:-1]] if part.startswith("${") else [part])]
    (tmp_path / "CONFIG.yaml").write_text(yaml.safe_dump(small().to_dict() | {"out": str(tmp_path)}))
    config = read([str(tmp_path / "CONFIG.yaml"), *words[3:]])
    (point,) = points(config)
    assert (point.name, point.config.out) == (whole[2].name, whole[2].config.out)
    assert (point.config.sae.k, point.config.lr, point.config.seed) == (2, 3e-3, 1)
    assert (config.track, config.resume) == ("wandb", True)
    trained = stand_in()
    swept = run_sweep(tiny_model(), documents(), config)
    assert trained.names == [run["name"] for run in swept.runs] == [whole[2].name]
    assert not (tmp_path / "sweep.json").exists()


def test_random_draws_of_a_wandb_sweep_are_the_same_each_time(tmp_path):
    parameters = {
        "sae.k": {"min": 2, "max": 4},
        "lr": {"min": 1e-4, "max": 1e-2, "distribution": "log_uniform_values"},
        "warmup": {"min": 0.0, "max": 0.5},
        "sae.architecture": {"values": ["topk", "batchtopk"], "probabilities": [0.9, 0.1]},
    }
    path = sweep_of_wandb(tmp_path, method="random", run_cap=300, parameters=parameters)
    drawn = read_sweep(path, 0)
    assert drawn == read_sweep(path, 0) != read_sweep(path, 1)
    assert {run["sae.k"] for run in drawn} == {2, 3, 4}
    assert all(1e-4 <= run["lr"] <= 1e-2 and 0 <= run["warmup"] <= 0.5 for run in drawn)
    assert sum(run["lr"] < 1e-3 for run in drawn) == pytest.approx(150, abs=35)  # half, on a logarithmic scale
    assert sum(run["sae.architecture"] == "topk" for run in drawn) == pytest.approx(270, abs=25)
    twice = sweep_of_wandb(tmp_path, method="random", run_cap=20, parameters={"seed": {"values": [1, 2]}})
    assert sorted(run["seed"] for run in read_sweep(twice, 0)) == [1, 2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "bayes"}, "use grid or random; bayes needs W&B's server"),
        ({"method": "random"}, "give run_cap"),
        ({"run_cap": 0}, "run_cap is 0"),
        ({"parameters": {}}, "has no parameters"),
        ({"params": 1}, "'params' is no key of a sweep"),
        ({"parameters": {"lr": {"min": 0.1, "max": 0.2}}}, "'lr' is continuous"),
        ({"parameters": {"lr": {"min": 2, "max": 1}}}, "the smaller first"),
        ({"parameters": {"lr": {"min": 0.1, "max": float("inf")}}}, "finite numbers"),
        ({"parameters": {"lr": {"min": 0.5, "max": 2.0, "distribution": "int_uniform"}}}, "finite whole numbers"),
        ({"parameters": {"lr": {"mu": 1, "distribution": "normal"}}}, "has distribution 'normal'"),
        ({"parameters": {"lr": 3}}, "'lr' is 3: write value"),
        ({"parameters": {"sae": {"parameters": {"k": {"value": 3}}}}}, "is nested: write the setting's full name"),
        ({"parameters": {"k": {"values": [3]}}}, "sweep over 'k': there is no such setting"),
        ({"parameters": {"lr": {"values": [1, 2], "probabilities": [1]}}}, "one probability for each value"),
    ],
)
def test_what_a_wandb_sweep_cannot_do_here_is_said(changes, said, tmp_path):
    with pytest.raises(UserError, match=re.escape(said)):
        points(small(sweep=sweep_of_wandb(tmp_path, **changes), out=tmp_path))


def test_the_same_runs_as_wandbs_own_sweeps(tmp_path):
    sweeps = pytest.importorskip("sweeps", reason="W&B's package is not installed: pip install 'wandb[sweeps]'")
    from sweeps.config.schema import fill_validate_schema

    config, runs = yaml.safe_load(WANDB), []
    fill_validate_schema(config)  # raises where W&B would refuse the file
    while (run := sweeps.next_run(config, runs)) is not None:
        runs.append(run)
    theirs = [{name: value["value"] for name, value in run.config.items()} for run in runs]
    ours = read_sweep(sweep_of_wandb(tmp_path), 0)
    assert sorted(theirs, key=json.dumps) == sorted((dict(run) for run in ours), key=json.dumps)


@pytest.mark.slow
def test_a_run_of_an_agent_is_kept_as_the_sweeps(command, tmp_path, monkeypatch):
    agent = {"WANDB_SWEEP_ID": "abcd1234", "WANDB_RUN_ID": "runofagent", "WANDB_MODE": "offline"}
    given = [*command, "--sweep", "{}", "--point", '{"sae.k": 2}', "--track", "wandb"]
    done = subprocess.run(
        [sys.executable, "-m", "training", *given], env={**os.environ, **agent}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "out" / "sae.k=2" / "wandb").glob("offline-run-*-runofagent")
    assert f"wandb sync {folder}" in done.stderr
    leet = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json"]
    lines = subprocess.run([*leet, folder], capture_output=True, text=True, check=True).stdout.splitlines()
    (started,) = [record["run"] for line in lines if (record := json.loads(line))["type"] == "run"]
    assert (started["run_id"], started["sweep_id"]) == ("runofagent", "abcd1234")
    told = json.loads(subprocess.run([*leet, "--summary", folder], capture_output=True, check=True).stdout)["summary"]
    own = json.loads((tmp_path / "out" / "sae.k=2" / "summary.json").read_text())["sites"]["resid_post.1"]
    assert told["ce_recovered"] == pytest.approx(own["ce_recovered"])
    assert told["resid_post.1/fvu"] == pytest.approx(own["fvu"])
