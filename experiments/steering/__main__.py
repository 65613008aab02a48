"""`python -m experiments.steering`."""

import sys

from saepatch.cli.parser import run_config

from .question import main
from .results import SteeringConfig

sys.exit(
    run_config(
        SteeringConfig,
        main,
        "python -m experiments.steering",
    )
)
