"""`python -m experiments.real`."""

import sys

from saepatch.cli.parser import run_config

from .settings import RealConfig
from .study import main

sys.exit(run_config(RealConfig, main, "python -m experiments.real"))
