"""`python -m experiments.circuits`."""

import sys

from saepatch.cli.parser import run_config

from .settings import CircuitsConfig
from .study import main

sys.exit(run_config(CircuitsConfig, main, "python -m experiments.circuits"))
