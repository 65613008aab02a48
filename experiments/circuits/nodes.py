"""Circuits of nodes: ranked on `select`, their size chosen on `tune`, measured on `report`."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from saepatch.circuits.circuit import Circuit, random_like
from saepatch.circuits.find import FindOptions, node_effects
from saepatch.circuits.learned import LearningOptions, fit_dbm
from saepatch.circuits.measures import MemberRuns, completeness, faithfulness, knocked_out, minimality, size_curve
from saepatch.circuits.node_runs import NodeRuns
from saepatch.circuits.nodes import Node, every_component
from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.components import ErrorTerm, LatentUnits, Patchable
from saepatch.engine.gradients import FirstOrder, IntegratedGradients, Method
from saepatch.engine.options import SweepOptions
from saepatch.errors import UserError
from saepatch.measure.patching import patch_components
from saepatch.model.language_model import LanguageModel
from saepatch.records.statistics import Interval

from .settings import CircuitsConfig

MOST = 100  # nodes that are taken out one by one
RANDOM = 5  # random circuits beside each circuit
STEPS = 5  # of integrated gradients
SHARES = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0)
SPARSITIES = (0.03, 0.003)  # of masks
COMPONENTS = "heads, MLPs and embeddings"
INTEGRATED, EXACT, DBM = "integrated gradients", "exact patching", "DBM"

Ranking = dict[Node, float]
Splits = Mapping[str, Sequence[PromptPair]]


@dataclass(frozen=True, eq=False)
class MemberKind:
    """What nodes are of: some dictionaries' latents and error terms, or (none) heads, MLPs and embeddings."""

    name: str
    parts: tuple[Dictionary, ...]

    def patchables(self, model: LanguageModel) -> Sequence[Patchable]:
        return self.parts or every_component(model)


@dataclass(frozen=True, eq=False)
class MeasuredCircuit:
    """A circuit and its measures on `report`. `active` counts the nodes that are active or act there at all."""

    task: str
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
    accuracy: Interval | None = None

    @property
    def random_at_most(self) -> float:
        return max(self.random, default=math.nan)


def rankings(
    config: CircuitsConfig, model: LanguageModel, kind: MemberKind, pairs: Sequence[PromptPair]
) -> dict[str, Callable[[], Ranking]]:
    """Signed mean effects of all nodes, by method."""
    exact = partial(_patched, model, kind, pairs[: config.few] if kind.parts else pairs)
    if not kind.parts:
        return {EXACT: exact}
    methods: dict[str, Method] = {"first order": FirstOrder(), INTEGRATED: IntegratedGradients(STEPS)}
    by_gradients: dict[str, Callable[[], Ranking]] = {
        name: partial(_attributed, model, kind, pairs, FindOptions(method)) for name, method in methods.items()
    }
    return by_gradients | {EXACT: exact}


def _attributed(model: LanguageModel, kind: MemberKind, pairs: Sequence[PromptPair], how: FindOptions) -> Ranking:
    return node_effects(model, list(kind.parts), pairs, how, SweepOptions())[0]


def _patched(model: LanguageModel, kind: MemberKind, pairs: Sequence[PromptPair]) -> Ranking:
    parts = [of(dictionary) for dictionary in kind.parts for of in (LatentUnits, ErrorTerm)]
    effects = patch_components(model, parts or every_component(model), pairs)
    means = zip(effects.edits, effects.change.mean(0).tolist(), effects.ran.T, strict=True)
    return {Node(edit.site, edit.units[0], None, edit.kind): mean for edit, mean, ran in means if ran.any()}


@torch.no_grad()
def active(model: LanguageModel, kind: MemberKind, pairs: Sequence[PromptPair]) -> int:
    """Number of nodes that hold something in the clean runs: latents active at some token, and each error term."""
    if not kind.parts:
        return sum(component.units for component in every_component(model))
    total, tokens = 0, model.tokenize([pair.clean for pair in pairs])
    for dictionary in kind.parts:
        acts = dictionary.activations(model.capture(tokens, [dictionary.site])[dictionary.site])[0]
        known = dictionary.known(model, tokens).ordinary
        total += 1 + int((acts.ne(0) & known[..., None]).flatten(0, 1).any(0).sum())
    return total


def smallest(runs: MemberRuns, scores: Sequence[float], least: float) -> tuple[int, float]:
    """The smallest size that is faithful (where none is, all), and its faithfulness. Larger ones are not run."""
    size, value = len(scores), math.nan
    for part in SHARES:
        curve = size_curve(runs, scores, by_size=False, shares=(part,))
        size, value = curve.sizes[0], curve.faithfulness[0].value
        if value >= least:
            break
    return size, value


def find(
    config: CircuitsConfig,
    model: LanguageModel,
    kind: MemberKind,
    pairs: Splits,
    name: tuple[str, str],
    rank: Callable[[], Ranking],
) -> MeasuredCircuit:
    """The smallest circuit of a ranking; `name` is the task and the ranking."""
    effects = rank()
    nodes, scores = list(effects), list(effects.values())
    tune, report = (NodeRuns(model, kind.patchables(model), pairs[split], nodes) for split in ("tune", "report"))
    size, tuned = smallest(tune, scores, config.least)
    order = np.argsort(-np.asarray(scores), kind="stable")[:size].tolist()
    areas = (size_curve(report, scores, by_size=False).cpr, size_curve(report, scores, by_size=True).cmd)
    return _measured(config, model, kind, report, (name[0], name[1]), effects, [nodes[i] for i in order], tuned, areas)


def _measured(
    config: CircuitsConfig,
    model: LanguageModel,
    kind: MemberKind,
    report: NodeRuns,
    name: tuple[str, str],
    effects: Ranking,
    chosen: Sequence[Node],
    tuned: float,
    areas: tuple[float, float],
) -> MeasuredCircuit:
    listed, act = sorted(chosen, key=lambda node: node.order), report.mask(chosen)
    try:
        drawn = random_like(listed, list(effects), RANDOM, config.seed)
    except UserError:  # too few nodes are left beside the circuit
        drawn = []
    knocked = knocked_out(report, act, sorted({1, max(1, len(listed) // 2)}), RANDOM, config.seed)
    return MeasuredCircuit(
        name[0],
        kind.name,
        name[1],
        json.dumps(Circuit(tuple(listed), effects=tuple(effects[node] for node in listed)).facts()),
        len(listed),
        active(model, kind, report.pairs),
        tuned,
        faithfulness(report, act),
        completeness(report, act),
        tuple(faithfulness(report, report.mask(some)).value for some in drawn),
        max(draw.gap for draw in knocked),
        float(minimality(report, act).min()) if len(listed) <= MOST else math.nan,
        *areas,
    )


def learned(
    config: CircuitsConfig,
    model: LanguageModel,
    kind: MemberKind,
    pairs: Splits,
    task: str,
    rank: Callable[[], Ranking],
) -> MeasuredCircuit:
    """The latents of a learned mask, beside the rankings: of two sparsities, the fewest that are faithful on `tune`.

    Masks are learned on `select` for interchanges at all positions; error terms are no part of them. `accuracy` is that
    of interchanges on `report`.
    """
    effects, (dictionary,) = rank(), kind.parts
    for unit in range(dictionary.d_sae):
        effects.setdefault(Node(dictionary.site, unit), 0.0)
    tune, report = (NodeRuns(model, kind.parts, pairs[split], list(effects)) for split in ("tune", "report"))
    tried = []
    for sparsity in SPARSITIES:
        how = LearningOptions("all", steps=config.steps, sparsity=sparsity, seed=config.seed)
        mask = fit_dbm(model, LatentUnits(dictionary), pairs["select"], how)
        nodes = [Node(dictionary.site, unit) for unit in mask.units]
        tried.append((faithfulness(tune, tune.mask(nodes)).value, nodes, mask))
    enough = [(value, nodes, mask) for value, nodes, mask in tried if value >= config.least]
    tuned, nodes, mask = min(enough, key=lambda each: len(each[1])) if enough else max(tried, key=lambda each: each[0])
    if not nodes:
        raise UserError(f"no latent of {kind.name} is in a learned mask: give more --steps")
    none = (math.nan, math.nan)
    measured = _measured(config, model, kind, report, (task, DBM), effects, nodes, tuned, none)
    return replace(measured, accuracy=mask.accuracy(model, pairs["report"]))
