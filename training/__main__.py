"""`python -m training CONFIG.yaml [--key value …]`: train dictionaries on the activations of a language model."""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

# Must be set before torch is loaded. On a shared machine, threads that spin while they wait are up to 20 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from saepatch.cli.parser import read_config, run_config
from saepatch.errors import UserError
from saepatch.records.tables import text_table

from .config import TrainingConfig

if TYPE_CHECKING:
    from .loop.sweep import SweepResult
    from .ranks import Ranks

PROG = "python -m training"
PRESETS = Path(__file__).parent / "configs"
COLUMNS = (
    *("ce_recovered", "ce_recovered_ordinary", "ce_recovered_mean", "kl", "fvu", "l0"),
    *("alive_share", "dense_share", "identity_error"),
)
RESUME = "run the same command with --resume true to continue from it"


def read(arguments: Sequence[str]) -> TrainingConfig:
    """Read the run's settings from the command line."""
    return read_config(TrainingConfig, PROG, arguments)


def run(config: TrainingConfig) -> None:
    """Train one run or a sweep and print the metrics; with `dry_run`, print the plan only.

    Raises:
        UserError: something named in the config cannot be used, or a run of a sweep failed.
    """
    if config.dry_run:
        show_plan(config)
        return
    from saepatch.model.loading.load import load_model, usable_device
    from saepatch.records.files import check_writable

    from .data.texts import texts
    from .loop.sweep import points, run_sweep
    from .loop.trainer import train_saes
    from .ranks import joined

    points(config)  # so that an unknown field is reported before anything is loaded
    check_writable(config.out)
    config = replace(config, device=own_device(config.device))
    with joined(usable_device(config.device)) as ranks:
        documents = texts(config.data, config.text_column, config.subset, config.split, config.streaming)
        model, *also = [
            load_model(
                name,
                config.device,
                config.dtype,
                prepend_bos=config.prepend_bos,
                trust_remote_code=config.trust_remote_code,
                revision=revision or None,
            )
            for name, revision in ((config.model, config.revision), *((name, "") for name in config.also))
        ]
        if config.sweep or config.point:
            swept = run_sweep(model, documents, config, ranks, also)
            if ranks.first:
                show_sweep(swept, config)
            if swept.stopped:
                stop(ranks, f"a checkpoint of the current run is in {config.out}: {RESUME}")
            return
        outcome = train_saes(model, documents, config, config.out, ranks, also)
    if outcome.stopped:
        stop(ranks, f"after {outcome.tokens:,} tokens; a checkpoint is in {config.out}: {RESUME}")
    if not ranks.first:
        return
    print(table({str(site): row for site, row in outcome.figures.items()}))
    for name, figures in outcome.also.items():
        print(f"in {name}:")
        print(table({str(site): row for site, row in figures.items()}))
    print(f"dictionaries, summary.json and metrics.jsonl are in {config.out}")


def stop(ranks: "Ranks", message: str) -> NoReturn:
    """End a stopped run with exit code 130, as for an interrupt; only the first process prints the message."""
    if ranks.first:
        raise KeyboardInterrupt(message)
    sys.exit(130)


def own_device(device: str) -> str:
    """The device of this process; under torchrun, each process on a machine uses its own GPU.

    Raises:
        UserError: there are more processes than GPUs.
    """
    local = os.environ.get("LOCAL_RANK")
    if device != "cuda" or local is None:
        return device
    import torch

    if int(local) >= torch.cuda.device_count():
        raise UserError(
            f"process {local} has no GPU: start at most one process for each of the {torch.cuda.device_count()} GPUs"
        )
    torch.cuda.set_device(int(local))
    return f"cuda:{local}"


def show_plan(config: TrainingConfig) -> None:
    """Print the plan of the run; for a sweep, the runs of this shard and the plan of the first."""
    from .loop.plan import plan
    from .loop.sweep import points, share

    own = share(points(config), config.shard)
    if config.sweep or config.point:
        print("\n".join([f"{len(own)} runs:", *(f"  {point.name}" for point in own)]))
        if not own:
            return
        print(f"plan of {own[0].name}; the others are similar:")
        config = own[0].config
    print("\n".join(plan(config, [point.config for point in own[1:]]).lines()))


def show_sweep(swept: "SweepResult", config: TrainingConfig) -> None:
    """Print a line for each finished run.

    Raises:
        UserError: a run of this shard failed.
    """
    from .loop.sweep import SUMMARY, table

    print(table(swept.runs, COLUMNS))
    where = "" if config.point else f"; {config.out}/{SUMMARY} has all of them"
    print(f"figures of {len(swept.runs)} finished runs, averaged over sites{where}")
    if swept.failed and not swept.stopped:
        first, reason = next(iter(swept.failed.items()))
        raise UserError(f"{len(swept.failed)} runs of the sweep failed, {first} first: {reason}")


def table(figures: Mapping[str, Mapping[str, float]]) -> str:
    """The metrics of each site, one line each."""
    rows = [[site, *(f"{row.get(name, math.nan):.4g}" for name in COLUMNS)] for site, row in figures.items()]
    return text_table(["site", *COLUMNS], rows)


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Train from a YAML file or the name of a preset; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and not given[0].startswith("-") and not Path(given[0]).is_file():
        presets = {path.stem: str(path) for path in sorted(PRESETS.glob("*.yaml"))}
        if given[0] not in presets:
            sys.stderr.write(f"error: no config file {given[0]!r}, nor a preset ({', '.join(presets)}); see --help\n")
            return 2
        given[0] = presets[given[0]]
    interrupted = f"the current run wrote no dictionary; if there is a checkpoint, {RESUME}"
    return run_config(TrainingConfig, run, prog, given, interrupted=interrupted)


if __name__ == "__main__":
    sys.exit(main())
