"""How small a circuit does the organism need for indirect objects? Latents by several rankings, beside heads and MLPs.

    python -m experiments.circuits --out runs/circuits

Members are nodes at all positions: latents and error terms of one dictionary, of two, and the heads, MLPs and token
embeddings of all layers. They are ranked on the pairs of `select`, a size is chosen on `tune` (the smallest with
faithfulness of at least `least`), and the circuit is reported on `report`, whose names, places and templates occur in
neither. Everything outside a circuit, error terms too, has its value of the pair's corrupted run. Controls are random
circuits of the same size and layer profile. A stopped run continues when the same command is given again.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saepatch.circuits.circuit import Circuit, random_like
from saepatch.circuits.measures import completeness, faithfulness, knocked_out, minimality, size_curve
from saepatch.circuits.node_runs import NodeRuns
from saepatch.circuits.nodes import Node, every_component
from saepatch.cli.parser import run_config
from saepatch.data.pairs import PromptPair, load_pairs
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import load_saes
from saepatch.engine.components import Patchable
from saepatch.errors import UserError
from saepatch.measure.attribution import FirstOrder, IntegratedGradients, attribute
from saepatch.measure.patching import patch_components
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading.load import load_model
from saepatch.model.sites import Site
from saepatch.records.provenance import Provenance
from saepatch.records.statistics import Interval
from saepatch.report import Facts, Page, Section, Table
from saepatch.runs.measurements import measurements
from saepatch.runs.ownership import check_owner
from saepatch.tracking.open import read_spec

from .common.kept import KeptResults, deciding
from .common.tracked import conclude

MOST = 100  # nodes that are removed one by one
RANDOM = 5  # random circuits beside each circuit
STEPS = 5  # of integrated gradients
SHARES = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0)


@dataclass(frozen=True)
class CircuitsConfig:
    """Find the smallest faithful circuits for indirect objects, by several rankings."""

    out: str = "runs/circuits"
    """Folder for summary.json, report.html, the circuits and config.yaml."""
    sae: str = "organism"
    """Dictionaries: organism, or a folder with one sub-folder per site."""
    sites: tuple[str, ...] = ("resid_post.4", "resid_post.2,resid_post.4")
    """Sites whose latents and error terms are members, together where separated by commas."""
    select: int = 200
    """Number of pairs that nodes are ranked on."""
    tune: int = 60
    """Number of pairs that sizes are chosen on."""
    report: int = 100
    """Number of pairs that circuits are reported on."""
    least: float = 0.9
    """Faithfulness that a circuit must reach."""
    seed: int = 0
    """Seed of pairs and of random circuits."""
    track: str = "none"
    """Trackers besides the local log, separated by commas: none, wandb, wandb:offline, wandb:online, trackio."""

    def __post_init__(self) -> None:
        read_spec(self.track)
        if min(self.select, self.tune, self.report) < 2 or not self.sites:
            raise UserError("give at least one site, and at least 2 pairs of each split")
        if not 0 < self.least < 1:
            raise UserError(f"least = {self.least}: use a share between 0 and 1")


@dataclass(frozen=True, eq=False)
class MeasuredCircuit:
    """A circuit and its measures on `report`. `active` counts the nodes that are active or act there at all."""

    members: str
    ranking: str
    circuit: str  # as JSON
    size: int
    active: int
    tuned: float
    faithfulness: Interval
    completeness: Interval
    random: tuple[float, ...]
    knocked_out: float
    smallest_loss: float
    cpr: float
    cmd: float


Ranking = tuple[list[Node], list[float]]


def rankings(
    model: LanguageModel, parts: Sequence[Dictionary], pairs: Sequence[PromptPair]
) -> dict[str, Callable[[], Ranking]]:
    """Rankings of a set of dictionaries' nodes, or (without dictionaries) of heads and whole sites."""
    if not parts:
        return {"exact patching": partial(_patched, model, pairs)}
    methods = {"first order": FirstOrder(), "integrated gradients": IntegratedGradients(STEPS)}
    return {name: partial(_attributed, model, parts, pairs, method) for name, method in methods.items()}


def _attributed(model: LanguageModel, parts: Sequence[Dictionary], pairs: Sequence[PromptPair], method: Any) -> Ranking:
    edits, means = attribute(model, parts, pairs, method).means(each_position=False)
    return [Node(edit.site, edit.units[0], None, edit.kind) for edit in edits], means.tolist()


def _patched(model: LanguageModel, pairs: Sequence[PromptPair]) -> Ranking:
    effects = patch_components(model, every_component(model), pairs)
    nodes = [Node(edit.site, edit.units[0], None, edit.kind) for edit in effects.edits]
    return nodes, effects.change.mean(0).tolist()


@torch.no_grad()
def active(model: LanguageModel, parts: Sequence[Dictionary], pairs: Sequence[PromptPair]) -> int:
    """Number of nodes that are active in the clean runs: latents active at some token, and every error term."""
    if not parts:
        return sum(component.units for component in every_component(model))
    total = 0
    for dictionary in parts:
        tokens = model.tokenize([pair.clean for pair in pairs])
        acts = dictionary.activations(model.capture(tokens, [dictionary.site])[dictionary.site])[0]
        total += 1 + int((acts.ne(0) & tokens.ordinary[..., None]).flatten(0, 1).any(0).sum())
    return total


def find(
    config: CircuitsConfig,
    model: LanguageModel,
    parts: Sequence[Dictionary],
    pairs: Mapping[str, Sequence[PromptPair]],
    name: tuple[str, str],
    rank: Callable[[], Ranking],
) -> MeasuredCircuit:
    """Rank on `select`, choose a size on `tune`, measure on `report`."""
    patchables: Sequence[Patchable] = parts or every_component(model)
    nodes, scores = rank()
    tune, report = (NodeRuns(model, patchables, pairs[split], nodes) for split in ("tune", "report"))
    curve = size_curve(tune, scores, by_size=False, shares=SHARES)
    size = curve.smallest(config.least) or len(nodes)
    order = np.argsort(-np.asarray(scores), kind="stable")[:size].tolist()
    act = report.mask([nodes[i] for i in order])
    listed = sorted((nodes[i] for i in order), key=lambda node: node.order)
    effects = dict(zip(nodes, scores, strict=True))
    drawn = random_like(listed, nodes, RANDOM, config.seed)
    knocked = knocked_out(report, act, sorted({1, max(1, size // 2)}), RANDOM, config.seed)
    on_report = size_curve(report, scores, by_size=False)
    return MeasuredCircuit(
        *name,
        json.dumps(Circuit(tuple(listed), effects=tuple(effects[node] for node in listed)).facts()),
        size,
        active(model, parts, pairs["report"]),
        next(f.value for n, f in zip(curve.sizes, curve.faithfulness, strict=True) if n >= size),
        faithfulness(report, act),
        completeness(report, act),
        tuple(faithfulness(report, report.mask(some)).value for some in drawn),
        max(draw.gap for draw in knocked),
        float(minimality(report, act).min()) if size <= MOST else float("nan"),
        on_report.cpr,
        size_curve(report, scores, by_size=True).cmd,
    )


def verdict(config: CircuitsConfig, found: Sequence[MeasuredCircuit]) -> str:
    """The smallest circuit, relative to what is active, that holds on `report`, with its controls."""
    good = [circuit for circuit in found if circuit.faithfulness.value >= config.least]
    if not good:
        return f"No circuit chosen on `tune` has a faithfulness of {config.least:g} on `report`."
    best = min(good, key=lambda circuit: circuit.size / circuit.active)
    return (
        f"{best.size} of {best.active} active nodes ({best.members}, {best.ranking}) have a faithfulness of "
        f"{best.faithfulness} on held-out pairs; random circuits of the same layers at most {max(best.random):.3f}. "
        f"Without them {best.completeness} is left."
    )


def main(config: CircuitsConfig) -> None:
    out = Path(config.out)
    check_owner(out, "circuits")
    model, saes = load_model("organism"), load_saes(config.sae)
    sizes = {"select": config.select, "tune": config.tune, "report": config.report}
    pairs = {split: load_pairs("ioi", split, n, config.seed) for split, n in sizes.items()}
    found: list[MeasuredCircuit] = []
    with measurements(out, "circuits", deciding(config, model, saes)) as kept_file:
        kept = KeptResults(kept_file, {})
        for text in (*config.sites, ""):
            parts = [saes[Site.parse(site)] for site in text.split(",")] if text else []
            name = " and ".join(text.split(",")) if text else "heads, MLPs and embeddings"
            for ranking, rank in rankings(model, parts, pairs["select"]).items():
                measure = partial(find, config, model, parts, pairs, (name, ranking), rank)
                found.append(kept.get(f"circuits/{name}/{ranking}", MeasuredCircuit, measure))
        write(config, model, saes, found)


def write(
    config: CircuitsConfig, model: LanguageModel, saes: Mapping[Site, Dictionary], found: Sequence[MeasuredCircuit]
) -> None:
    """Write the report, the summary, the circuits and the settings, and log them to trackers."""
    out, finding = Path(config.out), verdict(config, found)
    first = next(iter(saes.values()))
    provenance = Provenance(model.name, model.fingerprint, config.sae, first.fingerprint, config.seed)
    head = ["members", "ranking", "nodes", "active", "faithfulness", "completeness", "random, at most"]
    head += ["knock-out gap", "smallest loss", "CPR", "CMD"]
    rows: list[Sequence[str | float | int]] = [
        (
            each.members, each.ranking, each.size, each.active, str(each.faithfulness), str(each.completeness),
            *(round(x, 4) for x in (max(each.random), each.knocked_out, each.smallest_loss, each.cpr, each.cmd)),
        )
        for each in found
    ]  # fmt: skip
    note = (
        f"Smallest circuits with a faithfulness of at least {config.least:g} on `tune`, measured on `report`. "
        "Everything else, error terms too, has its value of the pair's corrupted run; before the first site with nodes "
        "everything is live. Knock-out gap: the largest difference between circuit and model without random nodes of "
        "the circuit. Smallest loss: of a single node taken out (of circuits "
        f"of up to {MOST} nodes). CPR ranks by signed score, CMD by size."
    )
    sections = [Section("Circuits", "", [Table(head, rows, note)])]
    page = Page("How small a circuit do indirect objects need?", finding, sections, Facts(provenance.facts()))
    for number, each in enumerate(found):
        Circuit.from_facts(json.loads(each.circuit)).write(out / f"circuit-{number}.json")
    listed = {}
    for number, each in enumerate(found):
        intervals = {"faithfulness": each.faithfulness.as_list(), "completeness": each.completeness.as_list()}
        rest = {"random": max(each.random), "circuit": f"circuit-{number}.json"}
        listed[f"{each.members}, {each.ranking}"] = asdict(each) | intervals | rest
    figures = {f"{each.members}/{each.ranking}": each.faithfulness.value for each in found}
    conclude(config, "circuits", page, {"circuits": listed}, figures)


if __name__ == "__main__":
    sys.exit(run_config(CircuitsConfig, main, "python -m experiments.circuits"))
