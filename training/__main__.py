"""`python -m training CONFIG.yaml [--key value …]`: train dictionaries on the activations of a language model."""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

# Before torch: threads that spin while they wait are up to twenty times slower on a machine that is shared.
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
GO_ON = "the same command with --resume true goes on from there"


def read(arguments: Sequence[str]) -> TrainingConfig:
    """The run that the command line asks for."""
    return read_config(TrainingConfig, PROG, arguments)


def run(config: TrainingConfig) -> None:
    """Train what the config describes, a run or a sweep of them, and print the metrics; or print the plan of it.

    Raises:
        UserError: something that the config names cannot be used, or a run of a sweep failed.
    """
    if config.dry_run:
        show_plan(config)
        return
    from saepatch.model.loading import load_model, usable_device
    from saepatch.records.files import check_writable

    from .data.texts import texts
    from .loop.sweep import points, run_sweep
    from .loop.trainer import train_saes
    from .ranks import joined

    points(config)  # reports an unknown field before anything is loaded
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
        if config.sweep:
            swept = run_sweep(model, documents, config, ranks, also)
            if ranks.first:
                show_sweep(swept, config)
            if swept.stopped:
                stop(ranks, f"a checkpoint of the run under way is in {config.out}: {GO_ON}")
            return
        outcome = train_saes(model, documents, config, config.out, ranks, also)
    if outcome.stopped:
        stop(ranks, f"after {outcome.tokens:,} tokens; a checkpoint is in {config.out}: {GO_ON}")
    if not ranks.first:
        return
    print(table({str(site): row for site, row in outcome.figures.items()}))
    for name, figures in outcome.also.items():
        print(f"in {name}:")
        print(table({str(site): row for site, row in figures.items()}))
    print(f"dictionaries, summary.json and metrics.jsonl are in {config.out}")


def stop(ranks: "Ranks", message: str) -> NoReturn:
    """End a run that was asked to stop with the exit code of an interrupt, 130; one of several processes says so."""
    if ranks.first:
        raise KeyboardInterrupt(message)
    sys.exit(130)


def own_device(device: str) -> str:
    """The device of this process: each that torchrun starts on a machine has a GPU of its own.

    Raises:
        UserError: there are more processes than GPUs.
    """
    local = os.environ.get("LOCAL_RANK")
    if device != "cuda" or local is None:
        return device
    import torch

    if int(local) >= torch.cuda.device_count():
        raise UserError(f"process {local} has no GPU, there are {torch.cuda.device_count()}: start as many processes")
    torch.cuda.set_device(int(local))
    return f"cuda:{local}"


def show_plan(config: TrainingConfig) -> None:
    """Print what the run would take; of a sweep, which runs there are, and what the first of this shard takes."""
    from .loop.plan import plan
    from .loop.sweep import points, share

    mine = share(points(config), config.shard)
    if config.sweep:
        print("\n".join([f"{len(mine)} runs:", *(f"  {point.name}" for point in mine)]))
        if not mine:
            return
        print(f"each of them much as {mine[0].name}:")
        config = mine[0].config
    print("\n".join(plan(config).lines()))


def show_sweep(swept: "SweepResult", config: TrainingConfig) -> None:
    """Print a line for each finished run.

    Raises:
        UserError: one that ran here failed.
    """
    from .loop.sweep import SUMMARY, table

    print(table(swept.runs, COLUMNS))
    print(
        f"figures of {len(swept.runs)} finished runs, means over their sites; all of them are in {config.out}/{SUMMARY}"
    )
    if swept.failed and not swept.stopped:
        first, reason = next(iter(swept.failed.items()))
        raise UserError(f"{len(swept.failed)} runs of the sweep failed, {first} first: {reason}")


def table(figures: Mapping[str, Mapping[str, float]]) -> str:
    """The metrics of each site, a line each."""
    rows = [[site, *(f"{row.get(name, math.nan):.4g}" for name in COLUMNS)] for site, row in figures.items()]
    return text_table(["site", *COLUMNS], rows)


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Train what a YAML file or the name of a preset says; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and not given[0].startswith("-") and not Path(given[0]).is_file():
        presets = {path.stem: str(path) for path in sorted(PRESETS.glob("*.yaml"))}
        if given[0] not in presets:
            sys.stderr.write(f"error: no config file {given[0]!r}, nor a preset ({', '.join(presets)}); see --help\n")
            return 2
        given[0] = presets[given[0]]
    nothing = f"the run under way wrote no dictionary; if there is a checkpoint, {GO_ON}"
    return run_config(TrainingConfig, run, prog, given, interrupted=nothing)


if __name__ == "__main__":
    sys.exit(main())
