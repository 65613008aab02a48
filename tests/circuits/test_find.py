"""Circuits found by ranking, on models whose every weight is known; and as graphs of Neuronpedia's viewer."""

import pytest
from graph_schema import check_graph
from planted_circuits import ANSWER, identity, pair, planted, relus, wires
from tiny import random_dictionary, tiny_model

import saepatch as sp
from saepatch.circuits.circuit import TARGET, Circuit
from saepatch.circuits.find import FindOptions, find_circuit, members_of
from saepatch.circuits.neuronpedia import graph_json
from saepatch.circuits.nodes import every_component
from saepatch.engine.components import Stream
from saepatch.engine.gradients import IntegratedGradients
from saepatch.errors import UserError
from saepatch.model.sites import Site

STEPS, EDGES = IntegratedGradients(20), sp.EdgeOptions(sp.Linear(steps=20))
PAIRS = [pair("ab.", "..c", "p"), pair("ba.", ".c.", "q")]


@pytest.fixture(scope="module")
def model():
    """An AND of the letters a and b, and a unit that only copies c, which nothing reads."""
    gather = wires((0, 3, 1.0), (1, 4, 1.0), (2, 5, 1.0))
    units = relus(({3: 1.0, 4: 1.0}, -1.0, {10: 1.0}), ({5: 1.0}, 0.0, {11: 1.0}))
    return planted("abc", [wires(), (gather, *units), relus(({10: 1.0}, 0.0, {ANSWER: 4.0}))])


def test_an_and_is_found_with_its_edges(model):
    dictionaries, how = [identity(0), identity(1)], FindOptions(STEPS, prune=0.1, edges=EDGES)
    found = find_circuit(model, dictionaries, PAIRS, how=how)
    a, b, both = sp.Node(Site(0), 0), sp.Node(Site(0), 1), sp.Node(Site(1), 10)
    assert members_of(found.circuit) == [a, b, both]
    weights = dict(zip(found.circuit.edges, found.circuit.weights, strict=True))
    assert weights[sp.Edge(both, TARGET)] == pytest.approx(4.0, abs=1e-4)
    assert set(weights) <= {sp.Edge(a, both), sp.Edge(b, both), sp.Edge(both, TARGET)}
    assert found.curve.faithfulness[-1].value == pytest.approx(1.0, abs=1e-4)
    at_positions = find_circuit(model, dictionaries, PAIRS[:1], how=FindOptions(STEPS, True, size=3))
    assert sp.Node(Site(0), 0, 1) in at_positions.circuit.nodes
    assert sp.Node(Site(0), 1, 2) in at_positions.circuit.nodes


@pytest.mark.slow
def test_heads_and_mlps_are_ranked_by_patching_each():
    model, one = tiny_model("llama"), [sp.PromptPair("cat", "dot", "x", "y")]
    found = find_circuit(model, every_component(model), one, how=FindOptions(size=8, edges=EDGES))
    effects = dict(zip(found.circuit.nodes, found.circuit.effects, strict=True))
    exact = sp.patch_heads(model, one)
    of_heads = {(edit.site, edit.units[0]): exact.change[0, i] for i, edit in enumerate(exact.edits)}
    heads = [node for node in effects if node.kind == "head"]
    assert heads
    assert all(effects[node] == pytest.approx(of_heads[node.site, node.unit], abs=1e-5) for node in heads)
    assert found.score.tolist() == sorted(found.score.tolist(), reverse=True)
    assert found.curve.faithfulness[-1].value == pytest.approx(1.0, abs=1e-4)
    assert all(edge.down.site is None or edge.up.site.order < edge.down.site.order for edge in found.circuit.edges)
    mixed = [random_dictionary("resid_post.0"), Stream(Site(1, "mlp_out"))]
    ranked = find_circuit(model, mixed, one, how=FindOptions(size=8, edges=None)).ranked
    assert {node.kind for node in ranked} >= {"latent", "stream"}


def test_what_cannot_be_found_is_refused(model):
    for how, message in (
        (FindOptions(size=9999), "ask for fewer"),
        (FindOptions(prune=1e6), "removes all"),
    ):
        with pytest.raises(UserError, match=message):
            find_circuit(model, [identity(0)], PAIRS, how=how)
    with pytest.raises(UserError, match="nothing differs"):
        find_circuit(model, [identity(0)], [pair("ab.", "ab.")])


def test_a_circuit_becomes_a_graph_of_the_viewer():
    up, error = sp.Node(Site(0), 7, 1), sp.Node(Site(0), 0, 2, "error")
    down = sp.Node(Site(3), 5, 2)
    edges = (sp.Edge(up, down), sp.Edge(error, down), sp.Edge(down, TARGET))
    circuit = Circuit((up, error, down, TARGET), edges, (0.5, -1.0, 0.25, 0.0), (0.5, -0.25, 1.0))
    graph = graph_json(circuit, ["<bos>", " a", " b"], "gpt2", "a-graph", (12, " c"), {up: "<letter>"})
    check_graph(graph)
    by_id = {node["node_id"]: node for node in graph["nodes"]}
    assert by_id["0_7_1"]["clerp"] == "<letter>"
    assert by_id["0_7_1"]["feature"] == 35  # Cantor's pairing of layer 0 and latent 7
    assert by_id["0_0_2"]["influence"] == 1.0
    assert by_id["4_12_2"]["is_target_logit"]
    assert {(k["source"], k["target"]): k["weight"] for k in graph["links"]}["0_0_2", "3_5_2"] == -0.25
    with pytest.raises(UserError, match="one position"):
        graph_json(Circuit((sp.Node(Site(0), 7),)), ["a"], "gpt2", "a")
    with pytest.raises(UserError, match="several sites of one layer"):
        graph_json(Circuit((sp.Node(Site(0), 7, 0), sp.Node(Site(0, "mlp_out"), 7, 0))), ["a"], "gpt2", "a")
