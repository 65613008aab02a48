"""Sweeps: which runs there are, what each shard does, what resuming skips, and the table at the end."""

import json
import re

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
