"""Runs over every combination of some fields' values, in one command or as a Slurm job array.

As an array of four jobs, each takes its share, and the last to end has the whole table (submitted again, it goes on):

    #!/bin/bash
    #SBATCH --array=0-3 --gres=gpu:1 --time=12:00:00 --signal=TERM@120
    srun python -m training CONFIG.yaml --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT --resume true
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import product
from typing import TYPE_CHECKING, Any

from saepatch.cli.parser import read_config
from saepatch.errors import UserError
from saepatch.records.files import atomic
from saepatch.records.tables import text_table

from ..config import TrainingConfig
from ..data.texts import Streamed, as_documents
from ..ranks import ALONE, Ranks

if TYPE_CHECKING:
    from saepatch.model.language_model import LanguageModel

log = logging.getLogger(__name__)

SUMMARY = "sweep.json"
_SHARED = frozenset(["model", "data", "subset", "split", "streaming", "text_column", "device", "dtype"])
_OWN = frozenset(["out", "overwrite", "resume", "sweep", "shard", "dry_run"])


@dataclass(frozen=True)
class SweepPoint:
    """One run of a sweep: its name, which is its folder's too, the values it tries, and its whole config."""

    name: str
    values: Mapping[str, Any]
    config: TrainingConfig


@dataclass(frozen=True)
class SweepResult:
    """How a sweep, or the share of it that ran here, ended.

    Attributes:
        runs: Every finished run of the whole sweep, those of other shards too: `name`, `values` and, as in
            `summary.json`, `sites`.
        failed: What went wrong, by name, in runs that ended with an error.
        stopped: Whether it was asked to stop before its end.
    """

    runs: list[dict[str, Any]]
    failed: dict[str, str]
    stopped: bool = False


def points(config: TrainingConfig) -> list[SweepPoint]:
    """The runs of a sweep: all combinations, the last field changing fastest.

    Raises:
        UserError: a field does not exist or cannot be swept over, or a value is none that it takes.
    """
    known = _fields(TrainingConfig().to_dict())
    for name, values in config.sweep.items():
        if name in _SHARED | _OWN:
            why = "all runs of a sweep share it" if name in _SHARED else "it belongs to the sweep as a whole"
            raise UserError(f"sweep over {name!r}: {why}; leave it out, or start one command for each value")
        if name not in known:
            near = get_close_matches(name, known, 1) or ["sae.k"]
            raise UserError(f"sweep over {name!r}: there is no such field; write it in full, as in {near[0]}")
        if not values:
            raise UserError(f"sweep over {name!r} has no values: give a list, as in {{{name}: [1, 2]}}")
    runs = [_point(config, dict(zip(config.sweep, each))) for each in product(*config.sweep.values())]
    names = [point.name for point in runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two runs of the sweep would be called {twice[0]!r}: give each value once")
    return runs


def share(every: Sequence[SweepPoint], shard: str) -> list[SweepPoint]:
    """The runs of one shard I/N: every N-th, from the I-th on."""
    index, count = map(int, shard.split("/"))
    return list(every[index::count])


def _point(config: TrainingConfig, values: dict[str, Any]) -> SweepPoint:
    name = ",".join(f"{field}={_text(value)}" for field, value in values.items())
    settings = replace(config, sweep={}, shard="0/1", out=config.out / name).to_dict()
    for field, value in values.items():
        *groups, last = field.split(".")
        place = settings
        for group in groups:
            place = place[group]
        place[last] = value
    try:
        # As if it stood in a file, so that a value is refused here just as it would be there.
        return SweepPoint(
            name, values, read_config(TrainingConfig, "python -m training", ["--config", json.dumps(settings)])
        )
    except UserError as error:
        raise UserError(f"run {name!r} of the sweep: {error}") from error


def _text(value: Any) -> str:
    """A value as part of a folder's name."""
    if isinstance(value, list):
        return "+".join(map(_text, value))
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(char if char.isalnum() or char in "._-+:" else "_" for char in text)


def _fields(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Paths of all fields, as in sae.k."""
    paths: list[str] = []
    for name, value in settings.items():
        nested = isinstance(value, dict) and name != "sweep"
        paths += _fields(value, f"{prefix}{name}.") if nested else [prefix + name]
    return paths


def run_sweep(
    model: "LanguageModel",
    texts: Iterable[str] | Streamed,
    config: TrainingConfig,
    ranks: Ranks = ALONE,
    also: Sequence["LanguageModel"] = (),
) -> SweepResult:
    """Train at every point of this shard, each in a folder of `config.out`, under the rules that a single run has.

    A run that fails (its loss is not finite, say) is noted, and the next one begins. `sweep.json` holds all runs that
    are finished.

    Args:
        model: Whose activations are learnt, in every run.
        texts: Documents of every run.
        config: The sweep.
        ranks: The processes of the run; each calls this with the same arguments.
        also: Further models that the dictionaries of every run are to serve.

    Raises:
        UserError: a point of the sweep cannot be run, seen before the first one is.
    """
    from . import saving
    from .checks import check_also, check_model
    from .trainer import train_saes

    every = points(config)
    mine = share(every, config.shard)
    for point in mine:
        sites = point.config.sites_of(model.n_layers)
        check_model(model, sites, point.config, ranks)
        check_also(model, also, sites, point.config)
        saving.check_folder(point.config.out, sites, point.config)
    documents = as_documents(texts)
    failed: dict[str, str] = {}
    stopped = False
    for number, point in enumerate(mine, 1):
        log.info("run %d of %d: %s", number, len(mine), point.name)
        try:
            stopped = train_saes(model, documents, point.config, point.config.out, ranks, also).stopped
        except UserError as error:
            if ranks.size > 1:  # the other processes may not have failed, and would wait for this one
                raise
            log.warning("%s failed: %s", point.name, error)
            failed[point.name] = str(error)
        if stopped:
            break
    return SweepResult(_write(every, model.n_layers, config) if ranks.first else [], failed, stopped)


def _write(every: Sequence[SweepPoint], n_layers: int, config: TrainingConfig) -> list[dict[str, Any]]:
    """Write `sweep.json` over the runs that are finished, in whatever shard."""
    place = config.out / SUMMARY
    while True:
        runs = _finished(every, n_layers)
        content = {"fields": dict(config.sweep), "runs": runs}
        try:
            config.out.mkdir(parents=True, exist_ok=True)
            with atomic(place) as part:
                part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"cannot write {str(place)!r} ({error.strerror}): make room, and run with --resume true"
            ) from error
        if _finished(every, n_layers) == runs:  # another shard may have ended a run meanwhile, and written before this
            return runs


def _finished(every: Sequence[SweepPoint], n_layers: int) -> list[dict[str, Any]]:
    from . import saving
    from .checkpoints import identifying_settings

    runs = []
    for point in every:
        done = saving.finished(point.config.out, point.config.sites_of(n_layers))
        if done is not None and done.identity["config"] == json.loads(json.dumps(identifying_settings(point.config))):
            sites = {str(site): row for site, row in done.figures.items()}
            runs.append({"name": point.name, "values": dict(point.values), "sites": sites})
    return runs


def table(runs: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A line for each run: figures as means over its sites."""
    rows = []
    for run in runs:
        sites = list(run["sites"].values())
        rows.append(
            [run["name"], *(f"{sum(row.get(name, math.nan) for row in sites) / len(sites):.4g}" for name in columns)]
        )
    return text_table(["run", *columns], rows)
