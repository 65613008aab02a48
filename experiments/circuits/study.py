"""How small a circuit does a behaviour need? Latents by several rankings, beside learned masks, heads and MLPs.

    python -m experiments.circuits --out runs/circuits
    python -m experiments.circuits --model google/gemma-3-270m --sae FOLDER --tasks [ioi] --out runs/circuits-gemma

Members are nodes at all positions: latents and error terms of one dictionary, of two, and the heads, MLPs and token
embeddings of all layers. They are ranked on the pairs of `select`, a size is chosen on `tune` (the smallest with
faithfulness of at least `least`), and the circuit is reported on `report`, whose names, places and templates occur in
neither. Between a circuit's nodes, edges are ranked, chosen and reported likewise. Everything outside a circuit, error
terms too, has its value of the pair's corrupted run. Controls are random circuits of the same size and layer profile.
A stopped run continues when the same command is given again.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import load_saes
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading.load import load_model
from saepatch.model.sites import Site
from saepatch.organism import is_checkpoint
from saepatch.records.provenance import versions
from saepatch.runs.measurements import measurements
from saepatch.runs.ownership import check_owner

from ..common.kept import KeptResults
from ..real.stages.tasks import task_pairs
from .edges import METHODS, MeasuredEdges, find_edges, room
from .nodes import (
    COMPONENTS,
    DBM,
    EXACT,
    INTEGRATED,
    MeasuredCircuit,
    MemberKind,
    Ranking,
    Splits,
    find,
    learned,
    rankings,
)
from .page import write
from .settings import OWN_SITES, CircuitsConfig

log = logging.getLogger(__name__)


def members(config: CircuitsConfig, saes: Mapping[Site, Dictionary]) -> Iterator[MemberKind]:
    """What nodes are of, one after the other.

    Raises:
        UserError: a site has no dictionary.
    """
    own = OWN_SITES if is_checkpoint(config.model) else tuple(map(str, saes))
    for text in (config.sites or own) if saes else ():
        sites = [Site.parse(part.strip()) for part in text.split(",")]
        if missing := [site for site in sites if site not in saes]:
            raise UserError(f"no dictionary at {missing[0]}: there are some at {', '.join(map(str, saes))}")
        yield MemberKind(" and ".join(map(str, sites)), tuple(saes[site] for site in sites))
    yield MemberKind(COMPONENTS, ())


def main(config: CircuitsConfig) -> None:
    out = Path(config.out)
    check_owner(out, "circuits")
    model = load_model(config.model, config.device, config.dtype)
    saes = load_saes(config.sae, config.device) if config.sae else {}
    for dictionary in saes.values():
        dictionary.check(model)
    free = ("out", "device", "track")
    decides = {
        "settings": {name: value for name, value in asdict(config).items() if name not in free},
        "model's weights": model.fingerprint,
        "dictionaries": {str(site): dictionary.fingerprint for site, dictionary in saes.items()},
        "versions": versions(),
    }
    sizes = {"select": config.select, "tune": config.tune, "report": config.report}
    circuits: list[MeasuredCircuit] = []
    of_edges: list[MeasuredEdges] = []
    with measurements(out, "circuits", decides) as kept_file:
        kept = KeptResults(kept_file, {})
        for task in config.tasks:
            pairs = task_pairs(config.model, model, task, sizes, config.seed, kept)
            for kind in members(config, saes):
                nodes, edges = _of_members(config, model, kind, pairs, task, kept)
                circuits += nodes
                of_edges += edges
        write(config, model, saes, circuits, of_edges)


def _of_members(
    config: CircuitsConfig, model: LanguageModel, kind: MemberKind, pairs: Splits, task: str, kept: KeptResults
) -> tuple[list[MeasuredCircuit], list[MeasuredEdges]]:
    """The circuits of one kind of members, by every ranking."""
    ranks = {name: cache(rank) for name, rank in rankings(config, model, kind, pairs["select"]).items()}
    place = f"{task}/{kind.name}"
    circuits: list[MeasuredCircuit] = []
    for name, rank in ranks.items():
        log.info("%s: nodes, %s", place, name)
        measure = partial(find, config, model, kind, pairs, (task, name), rank)
        circuits.append(kept.get(f"nodes/{place}/{name}", MeasuredCircuit, measure))
    best = ranks[INTEGRATED if kind.parts else EXACT]
    if len(kind.parts) == 1 and config.steps:
        mask = partial(learned, config, model, kind, pairs, task, lambda: dict(best()))
        circuits.append(kept.get(f"nodes/{place}/{DBM}", MeasuredCircuit, mask))

    @cache
    def between() -> Ranking:
        effects = best()
        return {node: effects[node] for node in room(config, model, kind, pairs, effects)}

    edges: list[MeasuredEdges] = []
    for name in (name for name, method in METHODS.items() if kind.parts or not method.steps):
        log.info("%s: edges, %s", place, name)

        def ranked(name: str = name) -> MeasuredEdges:
            return find_edges(config, model, kind, pairs, (task, name), list(between()))

        edges.append(kept.get(f"edges/{place}/{name}", MeasuredEdges, ranked))
    return circuits, edges
