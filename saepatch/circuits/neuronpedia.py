"""A circuit as an attribution graph in the JSON that Neuronpedia and circuit-tracer's viewer read.

Node and link names follow the files that circuit-tracer writes (`circuit_tracer/frontend/graph_models.py`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from saepatch.circuits.circuit import Circuit
from saepatch.circuits.nodes import Node
from saepatch.errors import UserError


def graph_json(
    circuit: Circuit,
    prompt: Sequence[str],
    model: str,
    slug: str,
    answer: tuple[int, str] = (0, ""),
    labels: Mapping[Node, str] | None = None,
) -> dict[str, Any]:
    """The circuit as that JSON.

    A node's `influence` is the size of its effect as a share of the largest. Viewers show the nodes of one layer
    together, so a layer may have nodes at one site only. Dictionaries of a residual stream are not transcoders, but
    viewers have no other kind of feature.

    Args:
        circuit: Its nodes are latents and error terms at one position each, and the logits.
        prompt: The texts of the prompt's tokens, by which columns are named.
        model: The model's name in the viewer.
        slug: The graph's name: letters, digits and hyphens.
        answer: Id and text of the token that stands for the logits.
        labels: What nodes are called.

    Raises:
        UserError: a node has no position or one beyond the prompt, is no latent or error term, or shares its layer
            with another site.
    """
    sites = {node.site for node in circuit.nodes if node.site is not None}
    layers = {site: site.layer for site in sites}
    if len(set(layers.values())) < len(layers):
        raise UserError(f"several sites of one layer ({', '.join(sorted(map(str, sites)))}): export one of them")
    for node in circuit.nodes:
        if node.site is not None and (node.position is None or node.kind not in ("latent", "error")):
            raise UserError(f"{node} is not a latent or error term at one position, so the graph cannot show it")
        if node.position is not None and not 0 <= node.position < len(prompt):
            raise UserError(f"{node} is not in the prompt, which has {len(prompt)} tokens: give a longer one")
    top, last = 1 + max(layers.values(), default=0), len(prompt) - 1
    largest = max(map(abs, circuit.effects), default=0.0) or 1.0
    nodes = []
    for i, node in enumerate(circuit.nodes):
        effect = circuit.effects[i] if circuit.effects else 0.0
        facts = _target(top, last, answer) if node.site is None else _node(node, (labels or {}).get(node, str(node)))
        nodes.append(facts | ({} if node.site is None else {"influence": abs(effect) / largest}))
    ids = {node: facts["node_id"] for node, facts in zip(circuit.nodes, nodes, strict=True)}
    weights = circuit.weights or (0.0,) * len(circuit.edges)
    return {
        "metadata": {
            "slug": slug,
            "scan": model,
            "transcoder_list": [],
            "prompt_tokens": list(prompt),
            "prompt": "".join(prompt),
            "schema_version": 1,
        },
        "qParams": {"linkType": "both", "pinnedIds": [], "clickedId": "", "supernodes": [], "sg_pos": ""},
        "nodes": nodes,
        "links": [
            {"source": ids[edge.up], "target": ids[edge.down], "weight": weight}
            for edge, weight in zip(circuit.edges, weights, strict=True)
        ],
    }


def _node(node: Node, name: str) -> dict[str, Any]:
    assert node.site is not None
    assert node.position is not None
    layer = node.site.layer
    if node.kind == "error":
        facts = _facts(f"0_{layer}_{node.position}", -1, str(layer), node.position, "mlp reconstruction error", name)
        return facts | {"jsNodeId": f"{layer}_{node.position}-0"}
    paired = (layer + node.unit) * (layer + node.unit + 1) // 2 + node.unit  # Cantor's pairing, as in the viewer
    name_of_kind = "cross layer transcoder"
    facts = _facts(f"{layer}_{node.unit}_{node.position}", paired, str(layer), node.position, name_of_kind, name)
    return facts | {"jsNodeId": f"{layer}_{node.unit}-0"}


def _target(top: int, position: int, answer: tuple[int, str]) -> dict[str, Any]:
    token, text = answer
    facts = _facts(f"{top}_{token}_{position}", token, str(top), position, "logit", f'Output "{text}"')
    return facts | {"jsNodeId": f"L_{token}-{position}", "is_target_logit": True}


def _facts(name: str, feature: int, layer: str, position: int, kind: str, label: str) -> dict[str, Any]:
    return {
        "node_id": name,
        "feature": feature,
        "layer": layer,
        "ctx_idx": position,
        "feature_type": kind,
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": name,
        "clerp": label,
        "influence": None,
        "activation": None,
    }
