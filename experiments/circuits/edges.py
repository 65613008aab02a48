"""Circuits of edges: those between the nodes of a circuit, ranked by several estimates, as few as are faithful."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy import ndarray
from torch import Tensor

from saepatch.circuits.edges.backward import gim, relp
from saepatch.circuits.edges.edge_runs import EdgeRuns
from saepatch.circuits.edges.estimates import EdgeOptions, Linear, edges
from saepatch.circuits.find import edge_weights
from saepatch.circuits.measures import faithfulness
from saepatch.circuits.node_runs import NodeRuns
from saepatch.circuits.nodes import Node
from saepatch.model.language_model import LanguageModel
from saepatch.records.statistics import Interval

from .nodes import RANDOM, STEPS, MemberKind, Ranking, Splits, smallest
from .settings import CircuitsConfig

# Integrated gradients find edges into silent latents. Heads and MLPs are never silent, and their many sites are slow.
METHODS: Mapping[str, Linear] = {
    "first order": Linear(),
    "integrated gradients": Linear(steps=STEPS),
    "GIM": Linear(backward=gim),
    "RelP": Linear(backward=relp),
}
VERIFIED = 20  # edges with the largest estimates, and as many at random, that are path-patched


@dataclass(frozen=True, eq=False)
class MeasuredEdges:
    """As few edges of a ranking as are faithful, between `nodes` nodes. `whole` is the faithfulness of all edges."""

    task: str
    members: str
    method: str
    nodes: int
    size: int
    possible: int
    tuned: float
    faithfulness: Interval
    whole: Interval
    random: tuple[float, ...]
    pearson: float


def room(config: CircuitsConfig, model: LanguageModel, kind: MemberKind, pairs: Splits, effects: Ranking) -> list[Node]:
    """Nodes to look for edges between: as few as leave room for edges to be taken out (halfway from `least` to 1)."""
    order = sorted(effects, key=lambda node: -effects[node])
    tune = NodeRuns(model, kind.patchables(model), pairs["tune"], order)
    scores = [effects[node] for node in order]
    size, value = smallest(tune, scores, (1 + config.least) / 2)
    return order[: size if value >= (1 + config.least) / 2 else smallest(tune, scores, config.least)[0]]


def find_edges(
    config: CircuitsConfig,
    model: LanguageModel,
    kind: MemberKind,
    pairs: Splits,
    name: tuple[str, str],
    nodes: Sequence[Node],
) -> MeasuredEdges:
    """Edges between nodes: ranked on `select`, their number chosen on `tune`, measured on `report`.

    `name` is the task and the method.
    """
    patchables, few = kind.patchables(model), {split: some[: config.few] for split, some in pairs.items()}
    how = EdgeOptions(METHODS[name[1]], among=tuple(nodes), verify=VERIFIED, sample=VERIFIED, seed=config.seed)
    estimated = edges(model, patchables, few["select"], how)
    weights = edge_weights(estimated, each_position=False)
    listed, scores = list(weights), list(weights.values())
    tune, report = (EdgeRuns(model, patchables, few[split], listed) for split in ("tune", "report"))
    size, tuned = smallest(tune, scores, config.least)
    order, rng = np.argsort(-np.asarray(scores), kind="stable"), np.random.default_rng(config.seed)
    draws = [rng.choice(order[size:], size, replace=False) for _ in range(RANDOM)] if len(order) >= 2 * size else []

    def acting(chosen: Int[ndarray, "chosen"]) -> Bool[Tensor, "edges"]:
        act = torch.zeros(len(listed), dtype=torch.bool)
        act[torch.from_numpy(np.ascontiguousarray(chosen))] = True
        return act

    verified = estimated.verified
    return MeasuredEdges(
        name[0],
        kind.name,
        name[1],
        len(nodes),
        size,
        len(listed),
        tuned,
        faithfulness(report, acting(order[:size])),
        faithfulness(report, acting(order)),
        tuple(faithfulness(report, acting(draw)).value for draw in draws),
        math.nan if verified is None else verified.pearson(),
    )
