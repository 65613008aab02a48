"""`python -m experiments.steering`."""

import sys

from experiments.steering.question import SteeringConfig, main
from saepatch.cli.parser import run_config

sys.exit(
    run_config(
        SteeringConfig,
        main,
        "python -m experiments.steering",
        interrupted="what was measured is kept, and the same command goes on from there",
    )
)
