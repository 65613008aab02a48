"""Run the experiment: `python -m experiments.cross_lingual --out runs/cross_lingual`."""

import sys

from saepatch.cli.parser import run_config

from .results import CrossLingualConfig
from .study import main

if __name__ == "__main__":
    sys.exit(run_config(CrossLingualConfig, main, "python -m experiments.cross_lingual"))
