"""`saepatch patch` and `attribute`: the parts of a sweep. `saepatch.runs.merge` merges them."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from numpy import ndarray

from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.latent_set import LatentSet
from saepatch.engine.components import Component, LatentUnits
from saepatch.engine.corruptions import Corruption
from saepatch.engine.metrics import Metric, read_metric, source_hash
from saepatch.engine.options import SweepOptions
from saepatch.engine.passes.shared_runs import shared_runs
from saepatch.measure.attribution import attribute
from saepatch.measure.controls import with_controls
from saepatch.measure.patching import patch_components
from saepatch.model.language_model import LanguageModel
from saepatch.model.positions import Positions
from saepatch.records.rows import Row
from saepatch.runs.commands.screens import screen_about, screen_rows
from saepatch.runs.driver import Count, Finished, PartContent, Place, drive
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
)
from saepatch.runs.parts import Part, Record, cut_parts, edit_facts
from saepatch.settings.sweeps import AttributeConfig, PatchConfig, SweepConfig
from saepatch.tracking.open import Tracker


@dataclass(frozen=True, eq=False)
class Sweep:
    """A shard of a sweep with everything needed to run its parts."""

    config: SweepConfig
    source: str
    pairs: Sequence[PromptPair]
    model: LanguageModel
    groups: Sequence[Sequence[Component]]
    metric: Metric
    positions: Positions
    corruption: Corruption | None
    record: Record
    parts: Sequence[Part]
    place: Place
    unit: str = "edits"

    def run_part(self, number: int, count: Count) -> PartContent:
        part = self.parts[number]
        pairs = [self.pairs[i] for i in part.pairs]
        prompts = [getattr(pair, base_prompt(self.config, part.direction)) for pair in pairs]
        tokens = [self.model.token_texts(self.model.encode(prompt)) for prompt in prompts]
        measure = _estimate if isinstance(self.config, AttributeConfig) else _patch
        measured = measure(self, part, pairs, tokens, count)
        metrics = zip(part.pairs, pairs, measured.clean.tolist(), measured.corrupted.tolist(), strict=True)
        about = {
            "direction": part.direction,
            "pairs": [[index, pair.example, clean, corrupted] for index, pair, clean, corrupted in metrics],
        }
        rows = ((chunk, self.record.provenance(chunk[0].site)) for chunk in measured.rows)
        return PartContent(rows, about | measured.about)

    def options(self, part: Part) -> dict[str, Any]:
        """Options shared by exact and estimated effects."""
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


def run_sweep(config: SweepConfig, conclude: Callable[[Sweep, Tracker], None] | None = None) -> Finished:
    """Run the missing parts of a shard; see `saepatch.runs.driver.drive`."""
    # the parts of one set of pairs follow each other, direction by direction
    with shared_runs() if len(read_directions(config.direction)) > 1 else nullcontext():
        return drive(config, prepare, conclude)


def prepare(config: SweepConfig) -> Sweep:
    """Load everything a run needs, and check that it fits together and that the folder holds no other run.

    Raises:
        UserError: something does not fit, or the folder holds another run.
    """
    place = Place.of(config)
    metric, positions = read_metric(config.metric), read_positions(config.positions)
    source, pairs = read_pairs(config)
    directions = read_directions(config.direction)
    model = read_model(config, config.shard)
    groups = read_components(config, model)
    options = SweepOptions(metric=metric, positions=positions, align=config.align)
    check_pairs(config, model, pairs[place.shard :: place.shards], options)
    parts = cut_parts(len(pairs), place.shard, place.shards, config.part, len(groups), directions)
    record = Record(
        config.command,
        place.settings,
        {"name": model.name, "hash": model.fingerprint},
        {
            str(component.site): {"name": dictionary.name, "hash": dictionary.fingerprint}
            for group in groups
            for component in group
            if (dictionary := getattr(component, "dictionary", None)) is not None
        },
        {"count": len(pairs), "hash": pairs_hash(pairs)},
        place.shard,
        place.shards,
        len(parts),
        metric_source=source_hash(config.metric),
    )
    record = place.agreed(record)
    corruption = read_corruption(config, model, groups, pairs)
    if not place.records:
        record = replace(record, edits=_edits(config, model, groups, pairs))
    return Sweep(config, source, pairs, model, groups, metric, positions, corruption, record, parts, place)


def _edits(
    config: SweepConfig, model: LanguageModel, groups: Sequence[Sequence[Component]], pairs: Sequence[PromptPair]
) -> list[dict[str, Any]] | None:
    """The given latents and their controls; None: every unit separately."""
    if not isinstance(config, PatchConfig) or not (latents := LatentSet.parse(config.latents)):
        return None
    edits = []
    latents = latents.at([component.site for (component,) in groups])
    for (component,) in groups:
        assert isinstance(component, LatentUnits)
        site = component.site
        groups_there = [{site: ids} for ids in latents.groups(site) or ()]
        edits += with_controls(model, [component.dictionary], pairs, groups_there, config.controls, config.seed)
    return [edit_facts(edit) for edit in edits]


@dataclass(frozen=True, eq=False)
class Measured:
    """Results of a part: the metrics of the pairs' two runs, rows in chunks, and further facts for merging."""

    clean: Float[ndarray, "pairs"]
    corrupted: Float[ndarray, "pairs"]
    rows: Iterable[list[Row]]  # each chunk is of one site
    about: dict[str, Any]


def _patch(
    sweep: Sweep, part: Part, pairs: Sequence[PromptPair], tokens: Sequence[Sequence[str]], count: Count
) -> Measured:
    config, components = sweep.config, sweep.groups[part.components]
    assert isinstance(config, PatchConfig)
    sites, edits = {component.site for component in components}, sweep.record.requested
    if edits is not None:  # a control set shared by several groups is run once
        own = [edit for edit in edits if sites >= {part.site for part in edit.parts}]
        edits = list({(edit.key, edit.role): edit for edit in own}.values())
    effects = patch_components(
        sweep.model,
        components,
        pairs,
        edits,
        each_position=config.each_position,
        progress=count,
        **sweep.options(part),
    )
    by_site: dict[str, list[Row]] = {}
    for row in effects.rows(sweep.source, tokens):
        by_site.setdefault(row.site, []).append(row)
    return Measured(effects.clean, effects.corrupted, by_site.values(), {"rounding": effects.rounding})


def _estimate(
    sweep: Sweep, part: Part, pairs: Sequence[PromptPair], tokens: Sequence[Sequence[str]], count: Count
) -> Measured:
    config, components = sweep.config, sweep.groups[part.components]
    assert isinstance(config, AttributeConfig)
    screen = attribute(
        sweep.model,
        [component.dictionary for component in components if isinstance(component, LatentUnits)],
        pairs,
        method=read_method(config),
        verify=config.verify,
        sample=config.sample,
        seed=config.seed + part.pairs[0],  # a different sample for each part
        **sweep.options(part),
    )
    count(len(screen) + (0 if screen.verified is None else len(screen.verified.index)))
    corruption = "" if sweep.corruption is None else str(sweep.corruption)
    rows = screen_rows(screen, sweep.source, tokens, corruption)
    return Measured(screen.clean, screen.corrupted, rows, screen_about(screen))
