"""A long sweep written part by part: cut into shards, stopped and resumed, without a row lost or repeated.

What is on the disk is said in `saepatch.runs.parts`; `saepatch.runs.merge` puts the parts together.
"""

import logging
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from numpy import ndarray

from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.latent_set import LatentSet
from saepatch.engine.components import Component, LatentUnits
from saepatch.engine.corruptions import Corruption
from saepatch.engine.metrics import Metric, read_metric, source_hash
from saepatch.errors import UserError
from saepatch.measure.attribution import attribute
from saepatch.measure.controls import with_controls
from saepatch.measure.patching import patch_components
from saepatch.model.language_model import LanguageModel
from saepatch.model.positions import Positions
from saepatch.records.files import check_writable, output_folder, write_json, write_yaml
from saepatch.records.rows import Row, read_about, write_rows
from saepatch.runs.interpret import (
    base_prompt,
    check_pairs,
    pairs_hash,
    read_components,
    read_corruption,
    read_directions,
    read_method,
    read_model,
    read_pairs,
    read_positions,
    read_shard,
    token_texts,
)
from saepatch.runs.parts import (
    PARTS,
    Part,
    Record,
    cut_parts,
    deciding,
    edit_facts,
    keep_run,
    known_run,
    part_file,
    read_records,
    refuse_if_other,
    refuse_other_command,
    shard_folder,
)
from saepatch.runs.progress import Check, Meter, said_once, stoppable
from saepatch.runs.screens import screen_about, screen_rows
from saepatch.settings.commands import AttributeConfig, PatchConfig, SweepConfig
from saepatch.tracking.open import RunDescription, Tracker, open_tracker

log = logging.getLogger(__name__)

# Settings that say where and how a run goes, not what comes out of it: they may change from one start to the next.
FREE = ("out", "shard", "track", "device", "device_map", "batch_size", "progress", "quiet", "json", "trust_remote_code")


@dataclass(frozen=True, eq=False)
class Sweep:
    """Everything that working through the parts of a shard takes."""

    config: SweepConfig
    task: str
    pairs: Sequence[PromptPair]
    model: LanguageModel
    groups: Sequence[Sequence[Component]]
    metric: Metric
    positions: Positions
    corruption: Corruption | None
    record: Record
    parts: Sequence[Part]
    folder: Path

    @property
    def left(self) -> list[Part]:
        """Parts that are not there yet, or that are damaged.

        Raises:
            UserError: a part is of another run.
        """
        found = []
        for part in self.parts:
            about = read_about(part_file(self.folder, part.number))
            if about is None:
                found.append(part)
            elif about["run"] != self.record.key:
                raise UserError(f"{part_file(self.folder, part.number)} is of another run: remove {self.folder}")
        return found

    def options(self, part: Part) -> dict[str, Any]:
        """What exact and estimated effects are told alike."""
        config = self.config
        return {
            "positions": self.positions,
            "direction": part.direction,
            "metric": self.metric,
            "corruption": self.corruption,
            "min_gap": config.min_gap,
            "align": config.align,
            "batch_size": config.batch_size or None,
        }


@dataclass(frozen=True)
class Finished:
    """How far a run is: `shards` of them were there, `parts` files are in this one; what it worked with."""

    out: Path
    shard: int
    shards: int
    parts: int
    edits: int
    sweep: Sweep


Conclude = Callable[[Finished, Tracker], None]


def run_sweep(config: SweepConfig, conclude: Conclude | None = None) -> Finished:
    """Work through the parts of a shard that are not there yet.

    `conclude` is called at the end of a run of one shard, while its tracker is still open.

    Raises:
        UserError: settings that do not fit, or a folder that holds another run.
        KeyboardInterrupt: the run was stopped, by Ctrl-C or SIGTERM; what is written stays, and how to go on is said.
    """
    with stoppable() as check:
        torch.manual_seed(config.seed)
        sweep = prepare(config)
        left = sweep.left
        try:
            return _work(sweep, left, check, conclude)
        except KeyboardInterrupt:
            total = len(sweep.parts)
            again = f"saepatch {config.command} --config {shlex.quote(str(sweep.folder / 'config.yaml'))}"
            raise KeyboardInterrupt(
                f"{total - len(sweep.left)} of {total} parts are written; to go on from there: {again}"
            ) from None


def prepare(config: SweepConfig) -> Sweep:
    """Load what a run needs, see that all of it fits, and that the folder holds this run or none."""
    shard, shards = read_shard(config.shard)
    out = Path(config.out)
    check_writable(out)
    refuse_other_command(out, PARTS)
    there = read_records(out)
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    for record in there:  # before anything is loaded
        refuse_if_other(out, record.decides, deciding(config.command, settings, shards))
    metric, positions = read_metric(config.metric), read_positions(config.positions)
    task, pairs = read_pairs(config)
    directions = read_directions(config.direction)
    model = read_model(config, config.shard)
    groups = read_components(config, model)
    mine = [pairs[i] for i in range(shard, len(pairs), shards)]
    check_pairs(config, model, mine, positions)
    parts = cut_parts(len(pairs), shard, shards, config.part, len(groups), directions)
    record = Record(
        config.command,
        settings,
        {"name": model.name, "hash": model.fingerprint},
        {
            str(component.site): {"name": dictionary.name, "hash": dictionary.fingerprint}
            for group in groups
            for component in group
            if (dictionary := getattr(component, "dictionary", None)) is not None
        },
        {"count": len(pairs), "hash": pairs_hash(pairs)},
        shard,
        shards,
        len(parts),
        metric_source=source_hash(config.metric),
    )
    for other in there:
        refuse_if_other(out, other.decides, record.decides)
    corruption = read_corruption(config, model, groups, pairs)
    record = replace(record, edits=_edits(config, model, groups, pairs, there))
    folder = output_folder(shard_folder(out, shard, shards))
    write_yaml(asdict(config) | {"shard": f"{shard}/{shards}"}, folder / "config.yaml")
    if any(other.shard == shard and other.versions != record.versions for other in there):
        log.warning(
            "the versions of some libraries are others than when this shard was started: see %s/run.json", folder
        )
    return Sweep(config, task, pairs, model, groups, metric, positions, corruption, record, parts, folder)


def _edits(
    config: SweepConfig,
    model: LanguageModel,
    groups: Sequence[Sequence[Component]],
    pairs: Sequence[PromptPair],
    there: Sequence[Record],
) -> list[dict[str, Any]] | None:
    """What to patch. Controls are drawn once for all shards: on another machine a near tie could fall otherwise."""
    if not isinstance(config, PatchConfig) or not (latents := LatentSet.parse(config.latents)):
        return None
    if there:
        return there[0].edits
    edits = []
    latents = latents.at([component.site for (component,) in groups])
    for (component,) in groups:
        assert isinstance(component, LatentUnits)
        wanted = latents.groups(component.site) or ()
        edits += with_controls(model, component.dictionary, pairs, wanted, config.controls, config.seed)
    return [edit_facts(edit) for edit in edits]


def _work(sweep: Sweep, left: Sequence[Part], check: Check, conclude: Conclude | None) -> Finished:
    config, record = sweep.config, sweep.record
    done = len(sweep.parts) - len(left)
    before = sum((read_about(part_file(sweep.folder, n)) or {}).get("edits", 0) for n in range(len(sweep.parts)))
    if done and not config.quiet:
        log.info("%d of %d parts are there already", done, len(sweep.parts))
    where = Path(config.out) if record.shards == 1 else sweep.folder
    name = f"{config.command}-{sweep.task}"
    about = RunDescription(
        where,
        run=name,
        config=asdict(config),
        run_id=known_run(sweep.folder),
        group=Path(config.out).absolute().parent.name,
        job_type=config.command,
        axes={"*": "edits"},
    )
    tracker = open_tracker(config.track, about, resume=done > 0)
    keep_run(sweep.folder, tracker.run_id)
    with tracker:
        alike = said_once("saepatch.engine.sweep", "saepatch.measure.screen")
        with alike, Meter(len(sweep.parts), done, before, config, tracker) as meter:
            for part in left:
                check()
                _write_part(sweep, part, meter, check)
                meter.part_done()
        _write_record(sweep)
        found = Finished(Path(config.out), record.shard, record.shards, len(sweep.parts), meter.edits, sweep)
        if conclude is not None and record.shards == 1:
            conclude(found, tracker)
    return found


def _write_record(sweep: Sweep) -> None:
    """With the first part: a run whose settings turn out not to work leaves nothing that other settings run into."""
    path = sweep.folder / "run.json"
    if not path.exists():
        write_json(asdict(sweep.record), path)


@dataclass(frozen=True, eq=False)
class Found:
    """What working through a part gave: the pairs' own metrics, rows some at a time, what else merging has to know."""

    clean: Float[ndarray, "pairs"]
    corrupted: Float[ndarray, "pairs"]
    rows: Iterable[list[Row]]  # each of one site
    about: dict[str, Any]


def _write_part(sweep: Sweep, part: Part, meter: Meter, check: Check) -> None:
    pairs = [sweep.pairs[i] for i in part.pairs]
    tokens = token_texts(sweep.model, [getattr(pair, base_prompt(sweep.config, part.direction)) for pair in pairs])
    before = meter.edits

    def count(edits: int) -> None:
        check()
        meter.ran(edits)

    found = (_estimate if isinstance(sweep.config, AttributeConfig) else _patch)(sweep, part, pairs, tokens, count)
    own = zip(part.pairs, pairs, found.clean.tolist(), found.corrupted.tolist(), strict=True)
    about = {
        "run": sweep.record.key,
        "direction": part.direction,
        "edits": meter.edits - before,
        "pairs": [[index, pair.example, clean, corrupted] for index, pair, clean, corrupted in own],
    }
    named = ((rows, sweep.record.provenance(rows[0].site)) for rows in found.rows)
    _write_record(sweep)
    write_rows(named, part_file(sweep.folder, part.number), about | found.about)


Count = Callable[[int], None]  # told how many edits were just done


def _patch(
    sweep: Sweep, part: Part, pairs: Sequence[PromptPair], tokens: Sequence[Sequence[str]], count: Count
) -> Found:
    config, components = sweep.config, sweep.groups[part.components]
    assert isinstance(config, PatchConfig)
    sites, asked = {component.site for component in components}, sweep.record.asked
    if asked is not None:  # a control set that stands beside several groups is run once
        asked = list({(edit.units, edit.role): edit for edit in asked if edit.site in sites}.values())
    effects = patch_components(
        sweep.model,
        components,
        pairs,
        asked,
        each_position=config.each_position,
        progress=count,
        **sweep.options(part),
    )
    by_site: dict[str, list[Row]] = {}
    for row in effects.rows(sweep.task, tokens):
        by_site.setdefault(row.site, []).append(row)
    return Found(effects.clean, effects.corrupted, by_site.values(), {"rounding": effects.rounding})


def _estimate(
    sweep: Sweep, part: Part, pairs: Sequence[PromptPair], tokens: Sequence[Sequence[str]], count: Count
) -> Found:
    config, components = sweep.config, sweep.groups[part.components]
    assert isinstance(config, AttributeConfig)
    screen = attribute(
        sweep.model,
        [component.dictionary for component in components if isinstance(component, LatentUnits)],
        pairs,
        method=read_method(config),
        verify=config.verify,
        sample=config.sample,
        seed=config.seed + part.pairs[0],  # each part draws its own sample
        **sweep.options(part),
    )
    count(len(screen) + (0 if screen.verified is None else len(screen.verified.index)))
    corruption = "" if sweep.corruption is None else str(sweep.corruption)
    rows = screen_rows(screen, sweep.task, tokens, corruption)
    return Found(screen.clean, screen.corrupted, rows, screen_about(screen))
