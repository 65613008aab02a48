"""`saepatch patch` and `attribute`: what one part of a sweep is. Its rows are merged by `saepatch.runs.merge`."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from numpy import ndarray

from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.latent_set import LatentSet
from saepatch.engine.components import Component, LatentUnits
from saepatch.engine.corruptions import Corruption
from saepatch.engine.metrics import Metric, read_metric, source_hash
from saepatch.measure.attribution import attribute
from saepatch.measure.controls import with_controls
from saepatch.measure.patching import patch_components
from saepatch.model.language_model import LanguageModel
from saepatch.model.positions import Positions
from saepatch.records.rows import Row
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
from saepatch.runs.screens import screen_about, screen_rows
from saepatch.settings.sweeps import AttributeConfig, PatchConfig, SweepConfig
from saepatch.tracking.open import Tracker


@dataclass(frozen=True, eq=False)
class Sweep:
    """Everything that working through the parts of a shard takes."""

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
        own = zip(part.pairs, pairs, measured.clean.tolist(), measured.corrupted.tolist(), strict=True)
        about = {
            "direction": part.direction,
            "pairs": [[index, pair.example, clean, corrupted] for index, pair, clean, corrupted in own],
        }
        rows = ((some, self.record.provenance(some[0].site)) for some in measured.rows)
        return PartContent(rows, about | measured.about)

    def options(self, part: Part) -> dict[str, Any]:
        """Options that exact and estimated effects share."""
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
    """Run the parts of a shard that are not there yet; see `saepatch.runs.driver.drive`."""
    return drive(config, prepare, conclude)


def prepare(config: SweepConfig) -> Sweep:
    """Load what a run needs, and see that all of it fits and that the folder holds this run or none.

    Raises:
        UserError: it does not, or it holds another.
    """
    place = Place.of(config)
    metric, positions = read_metric(config.metric), read_positions(config.positions)
    source, pairs = read_pairs(config)
    directions = read_directions(config.direction)
    model = read_model(config, config.shard)
    groups = read_components(config, model)
    check_pairs(config, model, pairs[place.shard :: place.shards], positions)
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
    """What to patch: the given latents and controls beside them; None: every unit, each alone."""
    if not isinstance(config, PatchConfig) or not (latents := LatentSet.parse(config.latents)):
        return None
    edits = []
    latents = latents.at([component.site for (component,) in groups])
    for (component,) in groups:
        assert isinstance(component, LatentUnits)
        site = component.site
        wanted = [{site: ids} for ids in latents.groups(site) or ()]
        edits += with_controls(model, [component.dictionary], pairs, wanted, config.controls, config.seed)
    return [edit_facts(edit) for edit in edits]


@dataclass(frozen=True, eq=False)
class Measured:
    """What working through a part gave: the pairs' own metrics, rows some at a time, what else merging has to know."""

    clean: Float[ndarray, "pairs"]
    corrupted: Float[ndarray, "pairs"]
    rows: Iterable[list[Row]]  # each of one site
    about: dict[str, Any]


def _patch(
    sweep: Sweep, part: Part, pairs: Sequence[PromptPair], tokens: Sequence[Sequence[str]], count: Count
) -> Measured:
    config, components = sweep.config, sweep.groups[part.components]
    assert isinstance(config, PatchConfig)
    sites, asked = {component.site for component in components}, sweep.record.asked
    if asked is not None:  # a control set that stands beside several groups is run once
        mine = [edit for edit in asked if sites >= {part.site for part in edit.parts}]
        asked = list({(edit.key, edit.role): edit for edit in mine}.values())
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
        seed=config.seed + part.pairs[0],  # each part draws its own sample
        **sweep.options(part),
    )
    count(len(screen) + (0 if screen.verified is None else len(screen.verified.index)))
    corruption = "" if sweep.corruption is None else str(sweep.corruption)
    rows = screen_rows(screen, sweep.source, tokens, corruption)
    return Measured(screen.clean, screen.corrupted, rows, screen_about(screen))
