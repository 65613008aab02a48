"""`python -m training CONFIG.yaml [--key value …]`: train dictionaries on the activations of a language model."""

import os
import sys
from collections.abc import Mapping, Sequence

# Before torch: threads that spin while they wait are up to twenty times slower on a machine that is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from saepatch.commandline import read_config, run_config
from training.config import TrainingConfig

PROG = "python -m training"
COLUMNS = ("ce_recovered", "ce_recovered_mean", "kl", "fvu", "l0", "alive_share", "dense_share", "identity_error")


def read(arguments: Sequence[str]) -> TrainingConfig:
    """The run that the command line asks for."""
    return read_config(TrainingConfig, PROG, arguments)


def run(config: TrainingConfig) -> None:
    """Load what the config names, train, and print the metrics of each site."""
    from saepatch.models import load_model
    from saepatch.results import check_writable
    from training.activations import texts
    from training.trainer import train_saes

    check_writable(config.out)
    documents = texts(config.data, config.text_column)
    model = load_model(config.model, config.device, config.dtype)
    found = train_saes(model, documents, config, config.out)
    print(table({str(site): row for site, row in found.items()}))
    print(f"dictionaries, summary.json and metrics.jsonl are in {config.out}")


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """The metrics of each site, a line each."""
    lines = ["site".ljust(14) + "".join(name.rjust(19) for name in COLUMNS)]
    for site, row in found.items():
        lines.append(site.ljust(14) + "".join(f"{row[name]:19.4g}" for name in COLUMNS))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    nothing = "no dictionary was written; the same command starts from the beginning"
    return run_config(TrainingConfig, run, PROG, arguments, interrupted=nothing)


if __name__ == "__main__":
    sys.exit(main())
