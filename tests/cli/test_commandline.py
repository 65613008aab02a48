"""The command line as a user meets it: quick help, one line and exit code 2 for a mistake, no traceback."""

import inspect
import io
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass, field, fields

import pytest
import yaml
from tiny import random_sae, tiny_model

from saepatch.cli.help import SELDOM
from saepatch.cli.main import COMMANDS, main
from saepatch.cli.parser import read_config
from saepatch.errors import UserError
from saepatch.records.bars import progress_bar
from training.config import TrainingConfig


def failed(capsys, *arguments):
    """The one line that a mistake is answered with."""
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert "Traceback" not in err
    return errors[0]


@pytest.fixture
def folders(tmp_path):
    model = tiny_model()
    model.hf.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    for layer, width in ((0, 16), (1, 12)):
        sae = random_sae(d_in=width)
        sae.cfg.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
        sae.save_model(tmp_path / f"saes{width}" / f"resid_post.{layer}")
    return tmp_path


def test_inspect(folders, capsys):
    assert main(["inspect", str(folders / "model"), "--sae", str(folders / "saes16")]) == 0
    out = capsys.readouterr().out
    assert "3 layers, width 16" in out
    assert "resid_post.0 … resid_post.2" in out
    assert "topk, 48 latents" in out


def test_mistakes(folders, capsys):
    model = str(folders / "model")
    assert "unknown dtype 'float8'" in failed(capsys, "inspect", model, "--dtype", "float8")
    assert "'./nowhere' is neither a folder nor a Hugging Face id" in failed(capsys, "inspect", "./nowhere")
    assert "width 12, but" in failed(capsys, "inspect", model, "--sae", str(folders / "saes12"))
    assert "unknown dictionary 'nowhere'" in failed(capsys, "inspect", model, "--sae", "nowhere")
    assert "unrecognized arguments: --bogus" in failed(capsys, "inspect", model, "--bogus", "1")
    assert "there is no command 'conjure': use one of demo, inspect, patch" in failed(capsys, "conjure")
    assert "there is no command 'ptach': did you mean patch?" in failed(capsys, "ptach")
    assert "--pair ioi (did you mean --pairs?)" in failed(capsys, "patch", "--pair", "ioi")
    assert "too few" in failed(capsys, "demo", "--pairs", "3")
    assert "unknown tracker 'clay'" in failed(capsys, "demo", "--track", "clay", "--out", str(folders / "out"))


def test_yaml_that_cannot_be_parsed_names_its_file(tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text("pairs: ioi\nsite: resid_post.3\n  n: 3\n")
    told = failed(capsys, "patch", "--config", str(config))
    assert f"{config}, line 3 is no YAML (mapping values are not allowed in this context): write one" in told


def test_a_value_of_the_command_line_is_not_looked_for_in_the_file(tmp_path, capsys):
    config = tmp_path / "c.yaml"
    nowhere = str(tmp_path / "organism")
    config.write_text(f"model: {nowhere}\nsites: [resid_post.1]\n")
    assert "(set in " not in failed(capsys, "train", str(config), "--data", nowhere)


def test_alone_it_says_what_to_do_first(capsys):
    assert main([]) == 0
    told = capsys.readouterr().out
    steps = [
        shlex.split(line.partition("   ")[0])[1:]
        for line in map(str.strip, told.splitlines())
        if line[:8] == "saepatch"
    ]
    first = [step for step in steps if "MODEL" not in step and step[0] in COMMANDS]
    assert {step[0] for step in first} >= {"demo", "play", "latent", "steer", "patch"}
    for step in first:
        with pytest.raises(SystemExit) as stopped:
            main([*step, "--print_config"])
        assert stopped.value.code == 0, step


@pytest.mark.parametrize("command", [*COMMANDS, "train"])
def test_help_of_a_command_fits_two_screens(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    printed = {}
    for word in ("--help", "--help_all"):
        with pytest.raises(SystemExit):
            main([command, word])
        printed[word] = capsys.readouterr().out
    assert len(printed["--help"].splitlines()) <= 90
    config = TrainingConfig if command == "train" else COMMANDS[command][0]
    every = {one.name for one in fields(config)}
    listed = {name for name in every if f"--{name}" in printed["--help_all"] or f"  {name}" in printed["--help_all"]}
    assert listed == every
    hidden = (
        {name for name in every if f"  --{name}" not in printed["--help"]}
        & every
        & (SELDOM | getattr(config, "seldom", set()))
    )
    assert ("--help_all" in printed["--help"]) == bool(hidden)
    assert "More settings" not in printed["--help_all"]


@pytest.mark.parametrize(
    ("command", "yaml_text", "arguments", "line"),
    [
        ("steer", "latent: resid_post.3:1\nprompt: a\nstrength: abc\n", (), 3),
        ("steer", "latent: resid_post.3:1\nprompt: a\ndecay: 2.0\n", (), 3),
        ("steer", "# a note\nlatent: nowhere\nprompt: a\n", (), 2),
        ("steer", "latent: resid_post.3:1\nprompt: a\npositions: elsewhere\n", (), 3),
        ("patch", "pears: ioi\n", (), 1),
        ("patch", "pairs: ioi\n\nshard: 5/4\n", (), 3),
        ("patch", "pairs: ioi\nn: -1\n", (), 2),
        ("patch", "pairs: ioi\nn: -1\n", ("--n", "-2"), None),
        ("patch", "pairs: ioi\nsite: resid_post.9\n", (), 2),
        ("steer", "prompt: a\nlatent: resid_post.3:99999\n", (), 2),
    ],
)
def test_an_error_names_its_settings_line_in_the_file(tmp_path, capsys, command, yaml_text, arguments, line):
    config = tmp_path / "c.yaml"
    config.write_text(yaml_text)
    told = failed(capsys, command, "--config", str(config), *arguments)
    assert told.endswith(f"(set in {config}, line {line})") if line else "set in" not in told


def test_so_does_an_error_after_training_has_begun(tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text("sae: {k: 4}\nsweep: nowhere.yaml\n")
    assert failed(capsys, "train", str(config)).endswith(f"(set in {config}, line 2)")


def test_settings_of_sections_have_their_lines(tmp_path):
    (tmp_path / "c.yaml").write_text("size: 2\ninner:\n  depth: many\n")
    with pytest.raises(UserError, match=r"line 3\)$"):
        read_config(Nested, "prog", [str(tmp_path / "c.yaml")])


def test_bars_are_lines_in_a_log_file(monkeypatch):
    for terminal in (False, True):
        written = io.StringIO()
        written.isatty = lambda terminal=terminal: terminal
        monkeypatch.setattr(sys, "stderr", written)
        monkeypatch.setattr("saepatch.records.bars.EVERY", 0.0)
        with progress_bar(True, desc="denoise", total=3, unit="edit") as bar:
            for _ in range(3):
                bar.update(1)
        text = written.getvalue()
        assert ("\r" in text) == terminal
        assert "denoise" in text
        if not terminal:
            assert [line.split(":")[0] for line in text.splitlines()] == ["denoise"] * len(text.splitlines())
            assert text.endswith("\n")
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    with progress_bar(False, total=1) as bar:
        bar.update(1)
    assert written.getvalue() == ""


def test_an_output_folder_that_cannot_be_written(folders, capsys):
    blocked = folders / "file"
    blocked.write_text("")
    assert "cannot write to" in failed(capsys, "demo", "--out", str(blocked / "demo"))


def test_settings_from_yaml_and_unknown_keys(folders, capsys):
    config = folders / "c.yaml"
    config.write_text("pairs: 4\n")
    assert "too few" in failed(capsys, "demo", "--config", str(config))
    config.write_text("pears: 40\n")
    assert "pears" in failed(capsys, "demo", "--config", str(config))
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--seed", "5", "--print_config"])
    assert stopped.value.code == 0
    assert "seed: 5" in capsys.readouterr().out


def test_booleans_are_flags(folders, capsys):
    def quiet(*given):
        with pytest.raises(SystemExit) as stopped:
            main(["patch", "--pairs", "ioi", *given, "--print_config"])
        assert stopped.value.code == 0
        return yaml.safe_load(capsys.readouterr().out)["quiet"]

    config = folders / "c.yaml"
    config.write_text("quiet: true\n")
    assert [quiet(), quiet("--quiet"), quiet("--quiet", "--n", "3"), quiet("--config", str(config))] == [
        False, True, True, True]  # fmt: skip
    assert [quiet("--quiet", "true"), quiet("--quiet", "false"), quiet("--quiet=false")] == [True, False, False]
    assert not quiet("--config", str(config), "--quiet", "false")
    assert "unrecognized arguments: --loud" in failed(capsys, "patch", "--quiet", "--loud")
    assert "--quiet takes true or false, not 'maybe'" in failed(capsys, "patch", "--quiet", "maybe")
    assert main(["inspect", str(folders / "model"), "--trust_remote_code"]) == 0
    for command in ("patch", "attribute"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "--json [{true,false}]" in capsys.readouterr().out


def test_trusting_code_puts_no_bos_in_front(folders, monkeypatch):
    from saepatch.runs import interpret

    loaded, asked = interpret.load_model, []

    def load(*args, **options):
        asked.append(inspect.signature(loaded).bind(*args, **options).arguments)
        return loaded(*args, **options)

    monkeypatch.setattr(interpret, "load_model", load)
    assert main(["inspect", str(folders / "model"), "--trust_remote_code"]) == 0
    assert [(one.get("trust_remote_code"), one.get("prepend_bos", False)) for one in asked] == [(True, False)]


def test_help_of_a_command_says_how_pairs_and_answers_are_written(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["patch", "--help"])
    assert stopped.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    assert '--answers " Mary| John"' in told
    assert ".jsonl, .json, .csv or .parquet file with columns clean, corrupted, answer, counter" in told
    assert "417;281" in told
    assert '"resid_post.3: 281; 3,17 | resid_post.4: 5"' in told
    with pytest.raises(SystemExit):
        main(["attribute", "--help"])
    assert "in each part of pairs (--part)" in " ".join(capsys.readouterr().out.split())


def test_help_and_import_load_neither_torch_nor_the_sae_library():
    """What makes them quick; the times themselves depend on the machine."""
    code = (
        "import sys\n"
        "from saepatch.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "import json\n"
        "print(json.dumps([m for m in ('torch', 'sae_lens', 'transformers', 'wandb', 'datasets') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"\n    {command} " in done.stdout for command in ("demo", "inspect", "patch", "attribute", "merge"))
    assert json.loads(done.stdout.splitlines()[-1]) == []
    code = "import torch, sys, saepatch; print([m for m in ('sae_lens', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_mistakes_are_told_without_pythons_words(capsys, tmp_path):
    other = tmp_path / "training.yaml"
    other.write_text("sae: {k: 4}\n")
    for arguments, said in (
        (("steer", "--strength", "abc"), "--strength takes a number, not 'abc'"),
        (("steer", "--act", "bogus"), "--act takes one of add, clamp, at-least, ablate, not 'bogus'"),
        (("patch", "--n", "1.5"), "--n takes a whole number, not '1.5'"),
        (("patch", "--config", str(other)), "--sae takes a text, not a mapping (is the file for another command?)"),
        (("patch", "--pairz", "ioi"), "(did you mean --pairs?)"),
        (("latent", "resid_post.3:281", "--data", "texts.txt"), "(it is called --reference now)"),
        (("restore", "--prompts", "refusal:report", "--tokens", "4"), "(it is called --max_new_tokens now)"),
        (("circuit", "--pairs", "ioi", "--random", "3"), "(it is called --controls now)"),
        (("plan", "organism", "--latents", "3"), "(it is called --d_sae now)"),
        (("compare", "runs/a"), "'other' is missing: see saepatch compare --help"),
    ):
        text = failed(capsys, *arguments)
        assert said in text
        assert "class" not in text
        assert "Parser key" not in text


@dataclass(frozen=True)
class Inner:
    depth: int = 1
    width: int = 2


@dataclass(frozen=True)
class Nested:
    """A command whose settings have sections."""

    size: int = 3
    width: int = 4
    inner: Inner = field(default_factory=Inner)
    outer: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("text", "argument", "place"),
    [
        ("depht: 2", "--depht", "did you mean --inner.depth?"),
        ("inner: {size: 2}", "--inner.size", "it belongs at the top level, --size on the command line"),
        ("inner: {widht: 2}", "--inner.widht", "did you mean --inner.width?"),
        ("widht: 2", "--widht", "did you mean --width?"),
        ("inner: {siez: 2}", "--inner.siez", "did you mean --size?"),
        ("depth: 2", "--depth", "it belongs under 'inner', --inner.depth on the command line"),
        ("zebra: 2", "--zebra", "see --help"),
    ],
)
def test_a_misplaced_setting_is_told_where_it_lives(tmp_path, text, argument, place):
    (tmp_path / "config.yaml").write_text(text)
    name = argument.removeprefix("--").rpartition(".")[2]
    level = "under 'inner'" if "inner" in text else "at the top level"
    with pytest.raises(UserError) as refused:
        read_config(Nested, "prog", [str(tmp_path / "config.yaml")])
    assert str(refused.value).startswith(f"{name!r} is not a setting {level}: {place} (set in ")
    with pytest.raises(UserError) as refused:
        read_config(Nested, "prog", [argument, "2"])
    assert str(refused.value) == f"unrecognized arguments: {argument} 2 ({place})"


def test_an_unknown_setting_in_a_commands_file(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("model: organism\nsiet: resid_post.1\n")
    said = failed(capsys, "attribute", "--config", str(tmp_path / "config.yaml"))
    assert "'siet' is not a setting at the top level: did you mean --site" in said
