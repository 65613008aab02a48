"""`saepatch train` and `saepatch experiment`: from the clone, and from the wheel where there is no clone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from saepatch.cli.commands.train import EXPERIMENTS
from saepatch.cli.main import main

ROOT = Path(__file__).parents[2]


def test_help_names_both(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = " ".join(capsys.readouterr().out.split())
    assert "saepatch train CONFIG.yaml" in listed
    assert "saepatch experiment NAME" in listed


def test_a_preset_is_found_by_its_name(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "stories260k", "--sae.k", "7", "--print_config"])
    assert stopped.value.code in (0, None)
    printed = capsys.readouterr().out
    assert "k: 7" in printed
    assert "stories260K" in printed


def test_no_such_preset(capsys):
    assert main(["train", "stories"]) == 2
    refused = capsys.readouterr().err
    assert "no config file 'stories'" in refused
    assert "stories260k" in refused  # the presets there are


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_can_be_started_by_its_name(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["experiment", name, "--help"])
    assert stopped.value.code in (0, None)
    assert f"saepatch experiment {name}" in capsys.readouterr().out


def test_an_unknown_experiment(capsys):
    assert main(["experiment", "alchemy"]) == 2
    assert "unknown experiment 'alchemy'" in capsys.readouterr().err
    assert main(["experiment"]) == 0
    assert "safety" in capsys.readouterr().out


# The clone is taken off the path, so that all there is comes from the wheel.
INSTALLED = """
import sys
from pathlib import Path
sys.path = [place for place in sys.path if not (Path(place) / "training").is_dir()]
from saepatch.cli.main import main
code = main(sys.argv[1:])
assert not {"training", "experiments"} & {name.partition(".")[0] for name in sys.modules}
sys.exit(code)
"""


@pytest.mark.slow
def test_the_wheel_trains_without_the_clone(tmp_path):
    pytest.importorskip("hatchling", reason="what builds the wheel is not installed")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True)
    here = tmp_path / "elsewhere"
    here.mkdir()
    (here / "texts.txt").write_text("\n".join(f"Mary gave {n} cups to John ." for n in range(400)))
    (here / "small.yaml").write_text(
        "data: texts.txt\nsites: [resid_post.0]\ntokens: 640\nbatch_size: 64\nbuffer: 256\n"
    )

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", INSTALLED, *arguments],
            cwd=here,
            env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert "resid_post.0" in run("train", "small.yaml", "--sae.d_sae", "96", "--eval_tokens", "100", "--out", "saes")
    assert (here / "saes/resid_post.0/sae_weights.safetensors").is_file()
    assert "stories260K" in run("train", "stories260k", "--print_config")
    assert "usage: saepatch experiment pronouns" in run("experiment", "pronouns", "--help")
