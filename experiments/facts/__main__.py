import sys

from saepatch.cli.parser import run_config

from .study import FactsConfig, main

if __name__ == "__main__":
    sys.exit(run_config(FactsConfig, main, "python -m experiments.facts"))
