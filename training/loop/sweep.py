"""Sweeps: a run for every combination of values of some settings, in one command, as a Slurm job array, or by W&B's
agents, each of which runs one point at a time.

In an array of four jobs, each takes a share of the runs, and the last to finish prints the whole table. When submitted
again, the jobs continue:

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
from ..data.document import Document
from ..data.texts import Streamed, as_documents
from ..ranks import ALONE, Ranks
from .sweep_file import read_sweep

if TYPE_CHECKING:
    from saepatch.model.language_model import LanguageModel

log = logging.getLogger(__name__)

SUMMARY = "sweep.json"
_SHARED = frozenset(["model", "data", "subset", "split", "streaming", "text_column", "device", "dtype"])
_OWN = frozenset(["out", "overwrite", "resume", "sweep", "point", "shard", "dry_run"])


@dataclass(frozen=True)
class SweepPoint:
    """One run of a sweep: its name (also that of its folder), the values it tries, and its complete config."""

    name: str
    values: Mapping[str, Any]
    config: TrainingConfig


@dataclass(frozen=True)
class SweepResult:
    """Result of a sweep, or of the shard of it that ran here.

    Attributes:
        runs: All finished runs of the sweep, other shards included: `name`, `values` and `sites`, as in
            `summary.json`.
        failed: Error messages of failed runs, by name.
        stopped: Whether the sweep was stopped before its end.
    """

    runs: list[dict[str, Any]]
    failed: dict[str, str]
    stopped: bool = False


def points(config: TrainingConfig) -> list[SweepPoint]:
    """The runs of a sweep: all combinations, the last setting varying fastest.

    Raises:
        UserError: a setting does not exist or cannot be swept over, or does not accept a value.
    """
    known = _fields(TrainingConfig().to_dict())
    tried = _tried(config)
    for name in dict.fromkeys(name for values in tried for name in values):
        if name in _SHARED | _OWN:
            why = "all runs of a sweep share it" if name in _SHARED else "it belongs to the sweep as a whole"
            raise UserError(f"sweep over {name!r}: {why}; leave it out, or start one command for each value")
        if name not in known:
            near = get_close_matches(name, known, 1) or ["sae.k"]
            raise UserError(f"sweep over {name!r}: there is no such setting; write its full name, as in {near[0]}")
    runs = [_point(config, values) for values in tried]
    names = [point.name for point in runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two runs of the sweep would be named {twice[0]!r}: give each value only once")
    return runs


def _tried(config: TrainingConfig) -> list[dict[str, Any]]:
    """The values of each run, by setting; without a sweep, none of one run."""
    if config.point:
        return [dict(sorted(config.point.items()))]  # in the order of `read_sweep`
    if isinstance(config.sweep, str):
        return read_sweep(config.sweep, config.seed)
    for name, values in config.sweep.items():
        if not values:
            raise UserError(f"sweep over {name!r} has no values: give a list, as in {{{name}: [1, 2]}}")
    return [dict(zip(config.sweep, each)) for each in product(*config.sweep.values())]


def share(every: Sequence[SweepPoint], shard: str) -> list[SweepPoint]:
    """The runs of shard I/N: every N-th, starting from the I-th."""
    index, count = map(int, shard.split("/"))
    return list(every[index::count])


def _point(config: TrainingConfig, values: dict[str, Any]) -> SweepPoint:
    name = ",".join(f"{field}={_text(value)}" for field, value in values.items())
    settings = replace(config, sweep={}, point={}, shard="0/1", out=config.out / name).to_dict()
    for field, value in values.items():
        *groups, last = field.split(".")
        place = settings
        for group in groups:
            place = place[group]
        place[last] = value
    try:
        # Parsed like a config file, so that values are checked in the same way.
        return SweepPoint(
            name, values, read_config(TrainingConfig, "python -m training", ["--config", json.dumps(settings)])
        )
    except UserError as error:
        raise UserError(f"run {name!r} of the sweep: {error}") from error


def _text(value: Any) -> str:
    """A value as part of a folder name."""
    if isinstance(value, list):
        return "+".join(map(_text, value))
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(char if char.isalnum() or char in "._-+:" else "_" for char in text)


def _fields(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Paths of all settings, such as sae.k."""
    paths: list[str] = []
    for name, value in settings.items():
        nested = isinstance(value, dict) and name not in ("sweep", "point")
        paths += _fields(value, f"{prefix}{name}.") if nested else [prefix + name]
    return paths


def run_sweep(
    model: "LanguageModel",
    texts: Iterable[Document] | Streamed,
    config: TrainingConfig,
    ranks: Ranks = ALONE,
    also: Sequence["LanguageModel"] = (),
) -> SweepResult:
    """Train every run of this shard in its own folder in `config.out`, under the same rules as a single run.

    If a run fails (for example because its loss is not finite), the error is recorded and the sweep continues.
    `sweep.json` lists all finished runs.

    Args:
        model: The model, the same in every run.
        texts: Documents of every run.
        config: The sweep.
        ranks: The processes of the run; each calls this with the same arguments.
        also: Further models to train the dictionaries of every run on.

    Raises:
        UserError: a run of the sweep is invalid; all are checked before the first one starts.
    """
    from . import saving
    from .checks import check_also, check_model
    from .trainer import train_saes

    every = points(config)
    own = share(every, config.shard)
    for point in own:
        sites = point.config.sites_of(model.n_layers)
        check_model(model, sites, point.config, ranks)
        check_also(model, also, sites, point.config)
        saving.check_folder(point.config.out, sites, point.config)
    documents = as_documents(texts)
    failed: dict[str, str] = {}
    stopped = False
    for number, point in enumerate(own, 1):
        log.info("run %d of %d: %s", number, len(own), point.name)
        try:
            stopped = train_saes(model, documents, point.config, point.config.out, ranks, also).stopped
        except UserError as error:
            if ranks.size > 1:  # other processes may not have failed, and would wait for this one forever
                raise
            log.warning("%s failed: %s", point.name, error)
            failed[point.name] = str(error)
        if stopped:
            break
    if not ranks.first:
        return SweepResult([], failed, stopped)
    # One point alone is a part of a sweep that others know: its table is left to them.
    runs = _finished(every, model.n_layers) if config.point else _write(every, model.n_layers, config)
    return SweepResult(runs, failed, stopped)


def _write(every: Sequence[SweepPoint], n_layers: int, config: TrainingConfig) -> list[dict[str, Any]]:
    """Write `sweep.json` with the finished runs of all shards."""
    place = config.out / SUMMARY
    while True:
        runs = _finished(every, n_layers)
        content = {"fields": _fields_of(every), "runs": runs}
        try:
            config.out.mkdir(parents=True, exist_ok=True)
            with atomic(place) as part:
                part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"cannot write {str(place)!r} ({error.strerror}): free some space, and run again with --resume true"
            ) from error
        if _finished(every, n_layers) == runs:  # else another shard finished a run meanwhile
            return runs


def _fields_of(every: Sequence[SweepPoint]) -> dict[str, list[Any]]:
    """The settings that are swept over, each with its values in order."""
    fields: dict[str, list[Any]] = {}
    for point in every:
        for name, value in point.values.items():
            values = fields.setdefault(name, [])
            if value not in values:
                values.append(value)
    return fields


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
    """A line for each run, with figures averaged over its sites."""
    rows = []
    for run in runs:
        sites = list(run["sites"].values())
        rows.append(
            [run["name"], *(f"{sum(row.get(name, math.nan) for row in sites) / len(sites):.4g}" for name in columns)]
        )
    return text_table(["run", *columns], rows)
