"""Run the experiment: `python -m experiments.jailbreak --out runs/jailbreak`."""

import sys

from saepatch.cli.parser import run_config

from .results import JailbreakConfig
from .study import main

if __name__ == "__main__":
    sys.exit(run_config(JailbreakConfig, main, "python -m experiments.jailbreak"))
