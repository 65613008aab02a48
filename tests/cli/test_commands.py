"""What every command has: examples that are commands, JSON, quiet, a config that runs it again, exit codes."""

import json
import shlex
import subprocess
import sys

import pytest
import yaml
from tiny import save_model_and_sae

from saepatch.cli.main import COMMANDS, main
from saepatch.records.rows import read_rows

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    save_model_and_sae(folder)
    pair = {"clean": "abc", "corrupted": "adc", "answer": "x", "counter": "y"}
    (folder / "pairs.jsonl").write_text(json.dumps(pair))
    (folder / "texts.txt").write_text("abc\nadc adc\n")
    return folder


@pytest.fixture(scope="module")
def patched(place):
    given = ["--model", place / "model", "--sae", place / "saes", "--pairs", place / "pairs.jsonl"]
    out = place / "runs" / "one"
    assert main(["patch", *map(str, given), "--latents", "3;5", "--n", "1", "--out", str(out), "--quiet"]) == 0
    return out


def test_the_examples_of_every_command_are_commands(capsys, monkeypatch):
    """Each example parses as it stands, and stands in the command's help."""
    for name, (config, _) in COMMANDS.items():
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        assert stopped.value.code == 0
        told = capsys.readouterr().out
        assert config.examples
        for example in config.examples:
            assert f"\n  {example}\n" in told
            words = shlex.split(example)
            assert words[:2] == ["saepatch", name]
            if "--config" in words:
                continue
            with pytest.raises(SystemExit) as stopped:
                main([*words[1:], "--print_config"])
            assert stopped.value.code == 0, example
            assert yaml.safe_load(capsys.readouterr().out)


def test_the_pair_that_is_spelt_out_in_an_example_is_one(tmp_path, capsys):
    (example,) = [one for one in COMMANDS["attribute"][0].examples if "--clean" in one]
    words = shlex.split(example)
    assert main([*words[1 : words.index("--out")], "--out", str(tmp_path / "one"), "--quiet"]) == 0
    assert "Pearson" in capsys.readouterr().out


def test_every_command_says_json(place, patched, capsys):
    model, saes = str(place / "model"), str(place / "saes")

    def said(*arguments):
        assert main([*arguments, "--json"]) == 0
        out, err = capsys.readouterr()
        assert "…" not in err
        return json.loads(out)

    other = str(place / "runs" / "other")
    again = said("patch", "--config", str(patched / "config.yaml"), "--out", other)
    assert again["summary"]["top"]["denoise"][0]["effect"]["n"] == 1
    assert said("merge", other)["report"] == f"{other}/report.html"
    assert said("report", other) == {"report": f"{other}/report.html"}
    found = said("inspect", model, "--sae", saes)
    assert (found["layers"], found["dictionaries"]["resid_post.1"]["latents"]) == (3, 48)
    listed = said("runs", str(place / "runs"))
    assert [one["path"] for one in listed["runs"]] == [str(patched), other]
    compared = said("compare", str(patched), other)
    assert compared["settings"] == []
    assert all(one["effects"][0] == one["effects"][1] for one in compared["edits"])
    card = said("latent", "resid_post.1:3", "--model", model, "--sae", saes, "--reference", str(place / "texts.txt"))
    assert (card["latent"], card["texts"]) == (3, 2)
    assert said("push", saes, "OWNER/NAME", "--dry_run")["dry_run"] is True
    screened = said(
        "attribute",
        "--model",
        model,
        "--sae",
        saes,
        "--pairs",
        str(place / "pairs.jsonl"),
        "--out",
        str(place / "screen"),
    )
    assert "denoise" in screened["summary"]["screens"]


def test_the_config_of_a_run_runs_it_again(place, patched):
    for name in ("again", "once more"):
        out = place / name
        assert main(["patch", "--config", str(patched / "config.yaml"), "--out", str(out)]) == 0
        first, second = (read_rows(folder / "results.parquet") for folder in (patched, out))
        drop = {"command", "versions"}
        assert [{k: v for k, v in row.items() if k not in drop} for row in first] == [
            {k: v for k, v in row.items() if k not in drop} for row in second
        ]
        kept = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in (patched, out)]
        assert kept[0] | {"out": ""} == kept[1] | {"out": ""}


def test_quiet_says_results_alone(place, patched, capsys):
    given = ["--model", place / "model", "--sae", place / "saes", "--pairs", place / "pairs.jsonl"]
    assert main(["attribute", *map(str, given), "--out", str(place / "hush"), "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert "Report: " in out
    assert err == ""
    assert main(["attribute", *map(str, given), "--out", str(place / "hush")]) == 0
    assert "parts are done" in capsys.readouterr().err  # and notes are back


def test_completion_of_a_shell(tmp_path):
    shell = subprocess.run(
        [sys.executable, "-m", "saepatch", "--print_completion", "shtab-bash"],
        capture_output=True,
        text=True,
        check=True,
    )
    (tmp_path / "complete.sh").write_text(shell.stdout)
    asked = f"""
        source {tmp_path}/complete.sh
        complete -p saepatch | grep -o -- '-F [^ ]*'
        COMP_WORDS=(saepatch patch --each); COMP_CWORD=2
        $(complete -p saepatch | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        echo "${{COMPREPLY[@]}}"
    """
    told = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
    assert "--each_position" in told.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("code", "failure"), [(1, "RuntimeError('bug')"), (130, "KeyboardInterrupt"), (2, "UserError('no')")]
)
def test_exit_codes(code, failure):
    """A bug has a traceback and 1; a mistake and an interrupt have a line, 2 and 130."""
    program = (
        "import sys, saepatch.cli.main as program\n"
        "from saepatch.errors import UserError\n"
        "def broken(config): raise FAILURE\n"
        "program.COMMANDS = {'runs': (program.RunsConfig, broken)}\n"
        "sys.exit(program.main(['runs']))\n"
    ).replace("FAILURE", failure)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == code
    assert ("Traceback" in done.stderr) == (code == 1)
    assert done.stdout == ""


def test_a_reader_that_goes_away_is_no_bug(patched):
    command = f"{shlex.quote(sys.executable)} -m saepatch runs {shlex.quote(str(patched.parent))}"
    done = subprocess.run(["bash", "-c", f"{command} | true"], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
