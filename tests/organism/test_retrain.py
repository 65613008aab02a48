"""The whole recipe again, from the seed: it must reach every threshold it shipped with (some twenty minutes)."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_recipe_reaches_its_thresholds_again(tmp_path):
    command = [sys.executable, "-m", "training.organism", "--out", str(tmp_path / "organism"), "--ship", "false"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "MISSED" not in done.stdout
    assert done.stdout.count(" ok") > 20
