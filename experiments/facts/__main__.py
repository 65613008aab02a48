import sys

from saepatch.cli.parser import run_config

from .settings import FactsConfig
from .study import main

if __name__ == "__main__":
    sys.exit(run_config(FactsConfig, main, "python -m experiments.facts"))
