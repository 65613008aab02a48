"""Run the study: `python -m experiments.two_hop --out runs/two_hop`."""

import sys

from saepatch.cli.parser import run_config

from .results import TwoHopConfig
from .study import main

if __name__ == "__main__":
    sys.exit(run_config(TwoHopConfig, main, "python -m experiments.two_hop"))
