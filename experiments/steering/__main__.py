"""`python -m experiments.steering`."""

import sys

from saepatch.cli.parser import run_config

from .question import SteeringConfig, main

sys.exit(
    run_config(
        SteeringConfig,
        main,
        "python -m experiments.steering",
    )
)
