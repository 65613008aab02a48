"""How much of an ablation do later parts of the model repair, by depth?

    python -m experiments.self_repair --out runs/self-repair
    python -m experiments.self_repair --model google/gemma-3-270m --pairs 24 --out runs/self-repair-gemma

Every attention layer and MLP is ablated, one at a time, at the last position; so are, of each layer, the head and, of
each dictionary, the latent with the largest direct effect on the answer's logit. An ablated node has its value in the
pair's corrupted prompt (resampled) or its mean over the prompts of `select`. Nodes are used where they lose a direct
effect on `select`, which also chooses the backups that are ablated jointly; everything is reported on `report`. Repair
is the change of the logit that is not the node's own direct effect, as a share of the direct effect that is lost: by
later heads, later MLPs and the final norm's new scale. A stopped run continues when the same command is given again.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from saepatch.circuits.residual.direct import direct_attribution
from saepatch.circuits.residual.self_repair import SHARES, RepairRuns, SelfRepair
from saepatch.cli.parser import run_config
from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import load_saes
from saepatch.engine.components import Heads, Patchable, Stream
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading.load import load_model
from saepatch.model.sites import Site
from saepatch.organism import is_checkpoint
from saepatch.pages.charts import INTERVALS, band, cell
from saepatch.records.provenance import Provenance
from saepatch.records.rows import write_records
from saepatch.records.statistics import Interval, bootstrap_mean, bootstrap_ratio
from saepatch.report import Cell, Facts, LineChart, Page, Section, Table
from saepatch.runs.measurements import measurements
from saepatch.runs.ownership import check_owner
from saepatch.tracking.open import read_spec

from .common.kept import KeptResults, deciding
from .common.tracked import conclude
from .real.stages.tasks import task_pairs

log = logging.getLogger(__name__)

ABLATIONS = ("resample ablation", "mean ablation")
KINDS = {
    "attention layer": "the output of an attention layer",
    "MLP": "the output of an MLP",
    "head": "of each layer, the head with the largest direct effect on `select`",
    "latent": "of each dictionary, the latent with the largest direct effect on `select`",
}
HALVES = ("first half", "second half")


@dataclass(frozen=True)
class SelfRepairConfig:
    """Ablate attention layers, MLPs, heads and latents, and see how much later parts repair."""

    model: str = "organism"
    """Model: organism, a folder, or a Hugging Face id."""
    sae: str = "organism"
    """Dictionaries: organism, or a folder with one sub-folder per site; for other models than the embedded one, empty:
    no latents are ablated."""
    task: str = "ioi"
    """Task: one of the embedded model's, or for other models ioi, facts, greater_than, agreement or pronouns."""
    out: str = "runs/self-repair"
    """Folder for summary.json, report.html, results.parquet and config.yaml."""
    pairs: int = 100
    """Maximum number of prompt pairs of each split."""
    seed: int = 0
    """Seed of pairs and bootstrap draws."""
    device: str = "cpu"
    """Where to run: cpu, cuda or mps."""
    dtype: str = "float32"
    """Precision of the model: float32, bfloat16 or float16."""
    track: str = "none"
    """Trackers besides the local log, separated by commas: none, wandb, wandb:offline, wandb:online, trackio."""

    def __post_init__(self) -> None:
        read_spec(self.track)
        if self.pairs < 2:
            raise UserError(f"pairs = {self.pairs} is too few for an interval: use at least 2")


@dataclass(frozen=True)
class RepairNode:
    """A node that may be ablated: `layer` is the number of whole blocks before what reads it."""

    kind: str
    site: Site
    unit: int

    @property
    def layer(self) -> int:
        return self.site.layer - (self.site.stream == "resid_pre")


@dataclass(frozen=True, eq=False)
class RepairChoice:
    """Direct effects that nodes lose on `select`, by ablation: means of the answer's logit with their intervals."""

    nodes: tuple[RepairNode, ...]
    lost: dict[str, tuple[Interval, ...]]

    def used(self, ablation: str) -> list[RepairNode]:
        """Nodes whose ablation loses a direct effect."""
        return [node for node, lost in zip(self.nodes, self.lost[ablation], strict=True) if lost.low > 0]


Repairs = Mapping[tuple[RepairNode, str], SelfRepair]


def choose(model: LanguageModel, saes: Mapping[Site, Dictionary], pairs: Sequence[PromptPair]) -> RepairChoice:
    """The nodes to ablate, and the direct effect that each loses on `select`. Heads are chosen by resample ablation."""
    runs, prompts = RepairRuns(model, pairs), _prompts(pairs)

    def lost(node: RepairNode, over: Sequence[str]) -> Interval:
        try:
            return bootstrap_mean(-runs.ablate(_patchable(model, saes, node), node.unit, over).direct)
        except UserError as error:  # it is the same in both runs of every pair
            return Interval.withheld(0.0, len(pairs), str(error))

    nodes = [RepairNode("attention layer", site, 0) for site in model.layout.of_stream("attn_out")]
    nodes += [RepairNode("MLP", site, 0) for site in model.layout.of_stream("mlp_out")]
    for site in model.layout.of_stream("z"):
        heads = [RepairNode("head", site, head) for head in range(model.n_heads)]
        nodes += [max(heads, key=lambda head: lost(head, ()).value)] if heads else []
    nodes += [RepairNode("latent", site, top_latent(model, sae, pairs)) for site, sae in saes.items()]
    by_ablation = {how: tuple(lost(node, over) for node in nodes) for how, over in zip(ABLATIONS, ((), prompts))}
    return RepairChoice(tuple(nodes), by_ablation)


def _prompts(pairs: Sequence[PromptPair]) -> list[str]:
    return [text for pair in pairs for text in (pair.clean, pair.corrupted)]


def top_latent(model: LanguageModel, dictionary: Dictionary, pairs: Sequence[PromptPair]) -> int:
    """The latent with the largest direct effect on the answer's logit in clean prompts, beyond that in corrupted."""
    answers = [[model.encode(f"{pair.clean}{pair.answer}")[-1]] for pair in pairs]
    total = np.zeros(dictionary.d_sae)
    for sign, texts in ((1, [pair.clean for pair in pairs]), (-1, [pair.corrupted for pair in pairs])):
        made = direct_attribution(model, dictionary, texts, answers)
        np.add.at(total, made.latents[2], sign * made.latent_effect[:, 0])
    return int(total.argmax())


def _patchable(model: LanguageModel, saes: Mapping[Site, Dictionary], node: RepairNode) -> Patchable:
    if node.kind == "latent":
        return saes[node.site]
    return Heads(node.site.layer, model.n_heads) if node.kind == "head" else Stream(node.site)


def pooled(repairs: Repairs, layers: int) -> dict[str, dict[str, Interval]]:
    """By ablation, kind and half of the depth: repair of all nodes together over all that they lose directly."""
    out: dict[str, dict[str, Interval]] = {}
    for ablation in ABLATIONS:
        for kind in KINDS:
            for half, name in enumerate(HALVES):
                mine = [
                    repair
                    for (node, how), repair in repairs.items()
                    if (how, node.kind) == (ablation, kind) and (2 * node.layer >= layers) == bool(half)
                ]
                if mine:
                    repaired, lost = sum(r.repair.sum(1) for r in mine), sum(-r.direct for r in mine)
                    out.setdefault(ablation, {})[f"{kind}, {name}"] = bootstrap_ratio(
                        np.asarray(repaired), np.asarray(lost)
                    )
    return out


def verdict(pools: Mapping[str, Mapping[str, Interval]]) -> str:
    """How much of what attention layers and MLPs lose is repaired, in both halves of the model."""
    sentences = []
    for ablation, listed in pools.items():
        named = {name: share for name, share in listed.items() if name.startswith(("attention", "MLP"))}
        parts = [f"{name} {share}" for name, share in named.items() if not share.reason]
        sentences += [f"By {ablation}, {', '.join(parts)} of the lost direct effect is repaired."] if parts else []
    return " ".join(sentences) or "No node has a share of its lost direct effect that differs from others."


def main(config: SelfRepairConfig) -> None:
    out = Path(config.out)
    check_owner(out, "self-repair")
    model = load_model(config.model, config.device, config.dtype)
    own = is_checkpoint(config.model)
    saes = load_saes(config.sae, config.device) if config.sae and (own or config.sae != "organism") else {}
    for dictionary in saes.values():
        dictionary.check(model)
    decides = deciding(config, model, saes, ("out", "device", "track"))
    with measurements(out, "self-repair", decides) as kept_file:
        kept = KeptResults(kept_file, {})
        sizes = {"select": config.pairs, "report": config.pairs}
        pairs = task_pairs(config.model, model, config.task, sizes, config.seed, kept)
        choice = kept.get("choice", RepairChoice, partial(choose, model, saes, pairs["select"]))
        write(config, model, saes, choice, _measured(model, saes, pairs, choice, kept))


def _measured(
    model: LanguageModel,
    saes: Mapping[Site, Dictionary],
    pairs: Mapping[str, Sequence[PromptPair]],
    choice: RepairChoice,
    kept: KeptResults,
) -> dict[tuple[RepairNode, str], SelfRepair]:
    """The repair of every node that is used, on `report`, by both ablations."""
    runs, prompts, repairs = RepairRuns(model, pairs["report"], pairs["select"]), _prompts(pairs["select"]), {}
    for ablation, over in zip(ABLATIONS, ((), prompts), strict=True):
        for number, node in enumerate(used := choice.used(ablation)):
            log.info("%s: %s %s, %d of %d", ablation, node.site, node.kind, number + 1, len(used))
            measure = partial(runs.ablate, _patchable(model, saes, node), node.unit, over)
            repairs[node, ablation] = kept.get(f"{ablation}/{node.site}/{node.unit}", SelfRepair, measure)
    return repairs


def write(
    config: SelfRepairConfig,
    model: LanguageModel,
    saes: Mapping[Site, Dictionary],
    choice: RepairChoice,
    repairs: Repairs,
) -> None:
    """Write the report, the summary, the rows and the settings, and log them to trackers."""
    out, pools = Path(config.out), pooled(repairs, model.n_layers)
    finding = verdict(pools)
    first = next(iter(saes.values()), None)
    sae = ("", "") if first is None else (config.sae, first.fingerprint)
    provenance = Provenance(model.name, model.fingerprint, *sae, config.seed)
    write_records([(_rows(config.task, repairs), provenance)], out / "results.parquet")
    page = Page("How much of an ablation is repaired?", finding, _sections(repairs, pools), Facts(provenance.facts()))
    summary = {
        "task": config.task,
        "pairs": next((len(repair.pairs) for repair in repairs.values()), 0),
        "repaired": {how: {name: share.as_list() for name, share in listed.items()} for how, listed in pools.items()},
        "nodes": [_facts(node, how, repair) for (node, how), repair in repairs.items()],
        "without a direct effect on select": {
            how: [f"{node.site} {node.kind} {node.unit}" for node in choice.nodes if node not in choice.used(how)]
            for how in ABLATIONS
        },
    }
    figures = {f"{how}/{name}": share.value for how, listed in pools.items() for name, share in listed.items()}
    conclude(config, "self-repair", page, summary, figures)


def _facts(node: RepairNode, ablation: str, repair: SelfRepair) -> dict[str, Any]:
    """One node's line of the summary."""
    return {
        "node": repair.node,
        "kind": node.kind,
        "layer": node.layer,
        "ablation": ablation,
        "lost": bootstrap_mean(-repair.direct).as_list(),
        "shares": {name: share.as_list() for name, share in repair.shares().items()},
        "backups": list(map(str, repair.backups)),
        "changes": {name: share.as_list() for name, share in _changes(repair).items()},
    }


def _changes(repair: SelfRepair) -> dict[str, Interval]:
    """The change of the answer's logit by the node, its backups, and both."""
    out = {"node": repair.change, "node and backups": repair.joint, "backups": repair.backups_alone}
    return {name: bootstrap_mean(change) for name, change in out.items() if change is not None}


def _rows(task: str, repairs: Repairs) -> list[dict[str, Any]]:
    rows = []
    for (node, ablation), repair in repairs.items():
        missing = np.full(len(repair.pairs), np.nan)
        joint, alone = (missing if some is None else some for some in (repair.joint, repair.backups_alone))
        columns: list[ndarray] = [repair.change, repair.direct, *repair.repair.T, joint, alone]
        names = ("change", "direct", *SHARES, "jointly with backups", "backups alone")
        for number, pair in enumerate(repair.pairs.tolist()):
            record = {"task": task, "node": repair.node, "kind": node.kind, "layer": node.layer, "ablation": ablation}
            values = {name: float(some[number]) for name, some in zip(names, columns, strict=True)}
            rows.append(record | {"pair": pair} | values)
    return rows


def _sections(repairs: Repairs, pools: Mapping[str, Mapping[str, Interval]]) -> list[Section]:
    names = list(dict.fromkeys(name for listed in pools.values() for name in listed))
    rows: list[list[Cell]] = [[name, *(cell(pools[how].get(name)) for how in pools)] for name in names]
    about = (
        "Repair over the lost direct effect, both summed over nodes and pairs. Nodes are those whose ablation loses a "
        f"direct effect on `select`: {'; '.join(f'{kind}: {what}' for kind, what in KINDS.items())}. {INTERVALS}"
    )
    sections = [Section("By depth", "", [Table(["nodes", *pools], rows, about), *_charts(repairs)])] if pools else []
    for ablation in pools:
        lines: list[list[Cell]] = []
        for (_, how), repair in repairs.items():
            if how == ablation:
                changes = _changes(repair)
                shares = [cell(share) for share in repair.shares().values()]
                lines.append([
                    repair.node, cell(bootstrap_mean(-repair.direct)), *shares, ", ".join(map(str, repair.backups)),
                    *(cell(changes.get(name)) for name in ("node", "node and backups", "backups")),
                ])  # fmt: skip
        head = ["node", "lost", "repaired", *(f"by {name}" for name in SHARES)]
        head += ["backups", "change", "with backups", "backups alone"]
        note = (
            "Lost: the direct effect on the answer's logit. Shares are of it. Backups are the later parts that repair "
            "most on `select`, ablated by resampling; changes are of the answer's logit."
        )
        sections.append(Section(ablation.capitalize(), "", [Table(head, lines, note)]))
    return sections


def _charts(repairs: Repairs) -> list[LineChart]:
    charts = []
    for ablation in ABLATIONS:
        series = []
        for kind in KINDS:
            mine = [
                (node.layer, repair) for (node, how), repair in repairs.items() if (how, node.kind) == (ablation, kind)
            ]
            if mine:
                shares = [repair.shares()["total"] for _, repair in mine]
                known = [share if not share.reason else None for share in shares]
                series.append(band(kind, [layer for layer, _ in mine], known))
        caption = f"A node is left out where its share has no interval. {INTERVALS}"
        charts.append(LineChart(f"Repair by layer, {ablation}", "layer", "share repaired", series, caption))
    return charts


if __name__ == "__main__":
    sys.exit(run_config(SelfRepairConfig, main, "python -m experiments.self_repair"))
