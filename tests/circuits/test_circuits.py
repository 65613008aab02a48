"""Circuits of models whose every weight is known, and runs of circuits against plain hooks."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from bare_hooks import forward
from planted_circuits import ANSWER, WIDTH, identity, pair, planted, relus, wires
from tiny import random_dictionary, tiny_model

import saepatch as sp
from saepatch.circuits.circuit import TARGET, Circuit, random_like
from saepatch.circuits.edges.edge_runs import EdgeRuns
from saepatch.circuits.find import edge_weights
from saepatch.circuits.measures import completeness, faithfulness, knocked_out, minimality, size_curve
from saepatch.circuits.node_runs import NodeRuns
from saepatch.circuits.nodes import Edge, Node
from saepatch.circuits.prune import acdc, by_threshold, greedy
from saepatch.engine.components import Heads, Stream
from saepatch.engine.metrics import kl_divergence
from saepatch.errors import UserError
from saepatch.model.sites import Site

FIRST, SECOND = Site(0), Site(1)
PAIRS = [pair("ab.", "..c", "p"), pair("ba.", ".c.", "q")]
NOTHING = wires()
COMPONENTS = (("mlp_out", "stream"), ("z", "head"))


def network(*units):
    """Letters a, b, c: block 1 gathers them into 3, 4, 5 and computes units; block 2 reads 10 for the answer."""
    gather = wires((0, 3, 1.0), (1, 4, 1.0), (2, 5, 1.0))
    return planted("abc", [NOTHING, (gather, *relus(*units)), relus(({10: 1.0}, 0.0, {ANSWER: 4.0}))])


def members(width=4, first=(0, 1, 2), second=(10, 11, 12)):
    positions = range(1, width)
    return [
        *(Node(FIRST, u, p) for u in first for p in positions),
        *(Node(SECOND, u, p) for u in second for p in positions),
    ]


def test_a_circuit_is_written_and_read_back(tmp_path):
    u, d = Node(FIRST, 3, 1), Node(SECOND, 0, 2, "error")
    circuit = Circuit((u, d, TARGET), (Edge(u, d), Edge(d, TARGET)), (0.5, -0.25, 0.0), (0.125, 1e-7))
    for name in ("circuit.json", "circuit.graphml"):
        circuit.write(tmp_path / name)
        assert Circuit.read(tmp_path / name) == Circuit.read(str(tmp_path / name)) == circuit
    networkx = pytest.importorskip("networkx")
    graph = networkx.read_graphml(tmp_path / "circuit.graphml")
    assert graph.number_of_edges() == 2
    assert graph.nodes["n0"]["unit"] == 3
    assert graph.edges["n0", "n1"]["weight"] == 0.125
    (tmp_path / "circuit.json").write_text("{}")
    with pytest.raises(UserError, match="format"):
        Circuit.read(tmp_path / "circuit.json")
    with pytest.raises(UserError, match="not among its nodes"):
        Circuit((u,), (Edge(u, d),))
    assert Circuit.of_edges([(Edge(u, d), 2.0)], {u: 1.0}).effects == (1.0, 0.0)


@pytest.mark.whole
@pytest.mark.parametrize("errors", ["nodes", "kept", "dropped"])
def test_node_runs_are_those_of_plain_hooks(errors):
    """Random circuits of a random model, with error terms in each of three ways, beside hooks that say so literally."""
    model = tiny_model("llama")
    dictionaries = [random_dictionary("resid_post.0", seed=1), random_dictionary("resid_post.1", "jumprelu", seed=2)]
    one = sp.PromptPair("cat", "dot", "x", "y")
    nodes = [Node(d.site, u, p) for d in dictionaries for u in range(0, 48, 3) for p in (1, 2, None)]
    nodes = [n for n in nodes if n.position is not None or n.unit % 2]
    nodes = [n for n in nodes if n.position is None or not n.unit % 2]
    if errors == "nodes":
        nodes += [Node(FIRST, 0, 2, "error"), Node(SECOND, 0, None, "error")]
    runs = NodeRuns(model, dictionaries, [one], nodes, errors)
    act = torch.rand(3, len(nodes), generator=torch.Generator().manual_seed(0)) < 0.5
    for others_act in (False, True):
        ours = runs.run(act, others_act=others_act)[:, 0]
        expected = [literal(model, dictionaries, one, nodes, mask, errors, others_act) for mask in act.tolist()]
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4)
    everything = torch.ones(1, len(nodes), dtype=torch.bool)
    assert runs.run(everything, others_act=True)[0, 0] == pytest.approx(runs.whole[0], abs=1e-5)


def literal(model, dictionaries, pair, nodes, mask, errors, others_act):
    def acting(site, kind, unit, position):
        for node, acts in zip(nodes, mask, strict=True):
            if (node.site, node.kind, node.unit) == (site, kind, unit) and node.position in (None, position):
                return acts
        return True if kind == "error" and errors == "kept" else others_act

    def edited(d, source):
        def run(x):
            new = x.clone()
            mine, other = d.encode(x), source[d.site]
            for p in range(1, x.shape[1]):
                acts = [mine.acts[0, p, u] if acting(d.site, "latent", u, p) else other[0][0, p, u] for u in range(48)]
                new[0, p] = torch.stack(acts) @ d.rows + d.sae.b_dec
                if errors != "dropped":
                    new[0, p] += mine.error[0, p] if acting(d.site, "error", 0, p) else other[1][0, p]
            return new

        return run

    source = {}

    def record(d):
        def run(x):
            latents = d.encode(x)
            source[d.site] = (latents.acts, latents.error)
            if errors != "dropped":
                return x
            new = x.clone()
            new[:, 1:] = latents.reconstruction[:, 1:]
            return new

        return run

    with torch.no_grad():
        forward(model, pair.corrupted, {d.site: record(d) for d in dictionaries})
        logits = forward(model, pair.clean, {d.site: edited(d, dict(source)) for d in dictionaries})
    return float(logits[model.encode("x")[-1]] - logits[model.encode("y")[-1]])


def test_means_over_other_prompts_take_the_corrupted_runs_place():
    """An AND of two letters, and the mean over prompts that never hold both."""
    model = network(({3: 1.0, 4: 1.0}, -1.0, {10: 1.0}))
    others = [pair("a..", "..c"), pair(".b.", "..c"), pair("..c", "..c")]
    nodes = [Node(FIRST, 0), Node(FIRST, 1)]
    runs = NodeRuns(model, [identity(0)], [pair("ab.", "...")], nodes, means=others)
    assert runs.whole[0] == pytest.approx(4.0, abs=1e-5)
    alone = runs.run(torch.tensor([[True, False], [True, True]]))[:, 0]
    # the block sums over positions: each letter's mean is 1/3, so a alone leaves max(0, 1 + 1/3 − 1)
    np.testing.assert_allclose(alone, [4 / 3, 4.0], atol=1e-4)
    with pytest.raises(UserError, match="no mean over prompts of 4 tokens"):
        NodeRuns(model, [identity(0)], [pair("ab.", "...")], nodes, means=[pair("a.", ".b")])


def test_an_and_is_recovered_and_nothing_else():
    model = network(({3: 1.0, 4: 1.0}, -1.0, {10: 1.0}), ({5: 1.0}, 0.0, {11: 1.0}))
    dictionaries, nodes = [identity(0), identity(1)], [Node(FIRST, u) for u in (0, 1, 2)]
    nodes += [Node(SECOND, u) for u in (10, 11, 12)]
    runs = NodeRuns(model, dictionaries, PAIRS, nodes)
    wanted = runs.mask([nodes[0], nodes[1], nodes[3]])
    assert faithfulness(runs, wanted).value == pytest.approx(1.0, abs=1e-5)
    assert completeness(runs, wanted).value == pytest.approx(0.0, abs=1e-5)
    np.testing.assert_allclose(minimality(runs, wanted), [1.0, 1.0, 1.0], atol=1e-5)
    for pruned in (greedy(runs, 0.1), *acdc(runs, [0.1, 1.0])):
        assert torch.equal(pruned.act, wanted)
    for size in (1, 2, 3):
        assert all(k.gap == pytest.approx(0.0, abs=1e-5) for k in knocked_out(runs, wanted, [size], draws=2))


def test_an_or_with_a_silent_backup():
    """The backup speaks only where the first arm is silent: either arm is enough, and greedy removal leaves one."""
    model = planted(
        "abc",
        [
            NOTHING,
            (wires((0, 3, 1.0), (1, 4, 1.0)), *relus(({3: 1.0}, 0.0, {10: 1.0}), ({4: 1.0}, 0.0, {11: 1.0}))),
            relus(({10: 1.0}, 0.0, {ANSWER: 4.0}), ({11: 1.0, 10: -1.0}, 0.0, {ANSWER: 4.0})),
        ],
    )
    pairs, last = [pair("ab.", "..c"), pair("ba.", ".c.")], 3
    nodes = [Node(SECOND, unit, last) for unit in (10, 11, 12)]
    runs = NodeRuns(model, [identity(1)], pairs, nodes)
    arms = torch.tensor([[True, False, False], [False, True, False], [True, True, False]])
    np.testing.assert_allclose(runs.run(arms).mean(-1), 4.0, atol=1e-5)
    np.testing.assert_allclose(minimality(runs, arms[2]), [0.0, 0.0], atol=1e-5)  # one at a time, neither matters
    for pruned in (greedy(runs, 0.01), *acdc(runs, [0.01])):
        assert pruned.size == 1
        assert not bool(pruned.act[2])
        assert pruned.metric == pytest.approx(4.0, abs=1e-5)
    # leaving out one arm leaves a circuit that is faithful but not complete: the other arm still does it all
    assert faithfulness(runs, arms[0]).value == pytest.approx(1.0, abs=1e-5)
    assert completeness(runs, arms[0]).value == pytest.approx(1.0, abs=1e-5)
    assert completeness(runs, arms[2]).value == pytest.approx(0.0, abs=1e-5)


def chain():
    model = planted("abc", [NOTHING, relus(({0: 1.0}, 0.0, {10: 1.0}), ({1: 1.0}, 0.0, {11: 1.0})),
                            relus(({10: 1.0}, 0.0, {12: 1.0})), wires((12, ANSWER, 4.0))])  # fmt: skip
    return model, [identity(0), identity(1), identity(2)]


def all_edges(nodes):
    edges = [
        Edge(u, d) for u, d in product(nodes, nodes) if u.site.layer + 1 == d.site.layer and u.position <= d.position
    ]
    return edges + [Edge(u, TARGET) for u in nodes if u.site.layer == 2]


def test_a_chain_of_edges_is_recovered():
    model, dictionaries = chain()
    one = [pair("a", "b")]
    nodes = [Node(Site(layer), u, 1) for layer, units in enumerate([(0, 1), (10, 11), (12, 11, 10)]) for u in units]
    runs = EdgeRuns(model, dictionaries, one, all_edges(nodes))
    wanted = {
        Edge(Node(Site(0), 0, 1), Node(Site(1), 10, 1)),
        Edge(Node(Site(1), 10, 1), Node(Site(2), 12, 1)),
        Edge(Node(Site(2), 12, 1), TARGET),
    }
    for pruned in (greedy(runs, 0.01), *acdc(runs, [0.01, 1.0])):
        assert {edge for edge, acts in zip(runs.members, pruned.act.tolist(), strict=True) if acts} == wanted
    cut = torch.tensor([edge in wanted for edge in runs.members])
    assert faithfulness(runs, cut).value == pytest.approx(1.0, abs=1e-5)
    curve = size_curve(runs, [float(e in wanted) for e in runs.members], by_size=True, shares=(0.1, 0.5, 1.0))
    assert curve.faithfulness[-1].value == pytest.approx(1.0, abs=1e-5)
    assert curve.cpr + curve.cmd == pytest.approx(0.9, abs=1e-4)
    kept = by_threshold(runs, [float(e in wanted) for e in runs.members], [0.5, 0.0])
    assert [p.size for p in kept] == [3, len(runs.members)]


@pytest.mark.whole
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_all_edges_are_the_clean_run_and_none_the_corrupted(family):
    """Random latents and error terms, heads and an MLP: the whole graph is the model, the empty one the other run."""
    model, one = tiny_model(family), sp.PromptPair("cat", "dot", "x", "y")
    dictionaries = [random_dictionary("resid_post.0", seed=1), random_dictionary("resid_post.1", "jumprelu", seed=2)]
    positions = (1, 2, 3)
    for patchables in (dictionaries, [Stream(Site(0, "resid_pre")), Heads(0, 4), Stream(Site(0, "mlp_out"))]):
        result = sp.edges(model, patchables, [one], sp.EdgeOptions(verify=0, sample=0, keep=10), metric=kl_divergence())
        nodes = [
            Node(site, unit, p, kind)
            for site, kind in result.parts
            if site is not None
            for unit in range(48 if kind == "latent" else 4 if kind == "head" else 1)
            for p in positions
        ]
        cut = dictionaries is patchables
        listed = [Edge(u, d) for u in nodes for d in nodes if u.site.order < d.site.order and u.position <= d.position]
        listed += [Edge(u, TARGET) for u in nodes if not cut or u.site.layer == 1]
        if cut:
            listed = sample_of(listed, model, dictionaries, one)
        runs = EdgeRuns(model, patchables, [one], listed)
        everything = runs.run(torch.ones(1, len(listed), dtype=torch.bool))[0, 0]
        assert everything == pytest.approx(runs.whole[0], abs=1e-3 * max(1, abs(runs.whole[0])))
        if cut:
            corrupted = model.next_logits(model.tokenize([one.corrupted]))[0]
            x, y = (model.encode(letter)[-1] for letter in "xy")
            assert runs.empty[0] == pytest.approx(float(corrupted[x] - corrupted[y]), abs=1e-4)


def sample_of(listed, model, dictionaries, one):
    """The edges whose upstream nodes differ between the runs: all others carry nothing."""
    differ = set()
    for d in dictionaries:
        here, there = (model.capture(model.tokenize([t]), [d.site])[d.site] for t in (one.clean, one.corrupted))
        change = (d.activations(here)[0] - d.activations(there)[0])[0]
        differ |= {Node(d.site, int(u), int(p)) for p, u in change.nonzero().tolist() if p}
        differ |= {Node(d.site, 0, p, "error") for p in (1, 2, 3)}
    return [e for e in listed if e.up in differ and (e.down in differ or e.down.site is None)]


@pytest.mark.parametrize("sites", [("resid_post.0", "resid_post.1"), ()])
def test_an_edge_at_all_positions_is_all_its_edges_at_single_ones(sites):
    model, pairs = tiny_model("llama"), [sp.PromptPair("cat", "dot", "x", "y"), sp.PromptPair("ca", "da", "x", "y")]
    dictionaries = [random_dictionary(site, seed=1) for site in sites]
    patchables = dictionaries or [Stream(Site(0, "resid_pre")), Heads(0, 4), Stream(Site(0, "mlp_out"))]
    result = sp.edges(model, patchables, pairs, sp.EdgeOptions(verify=0, sample=0))
    weights = edge_weights(result, each_position=False)
    order = sorted(weights, key=lambda edge: -abs(weights[edge]))
    last = [edge for edge in order if edge.down.site is None][:8]
    read = {edge.up for edge in last}
    every = last + [edge for edge in order if edge.down in read][:16]
    assert len(every) > 12
    single = [
        Edge(replace(e.up, position=q), replace(e.down, position=None if e.down.site is None else p))
        for e in every
        for p in ((1, 2, 3) if e.down.site else (9,))
        for q in (1, 2, 3)
        if q <= p
    ]
    of_every = {edge: {s for s in single if (s.up.site, s.up.unit, s.down.site, s.down.unit, s.up.kind, s.down.kind)
                       == (edge.up.site, edge.up.unit, edge.down.site, edge.down.unit, edge.up.kind, edge.down.kind)}
                for edge in every}  # fmt: skip
    together, alone = (EdgeRuns(model, patchables, pairs, listed) for listed in (every, single))
    act = torch.rand(3, len(every), generator=torch.Generator().manual_seed(0)) < 0.7
    for mask in act:
        chosen = set().union(*(of_every[edge] for edge, acts in zip(every, mask.tolist(), strict=True) if acts))
        others = torch.tensor([edge in chosen for edge in alone.members])
        ours, expected = together.run(mask[None])[0], alone.run(others[None])[0]
        np.testing.assert_allclose(ours, expected, atol=1e-4)
        assert np.abs(ours - together.empty).max() > 1e-3  # they carry something
    with pytest.raises(UserError, match="or all of them at all positions"):
        EdgeRuns(model, patchables, pairs, [every[0], single[0]])


def test_random_circuits_have_the_profile_of_the_circuit():
    candidates = members()
    chosen = [candidates[0], candidates[1], candidates[-1]]
    drawn = random_like(chosen, candidates, draws=5)
    assert all(sorted(str(n.site) for n in some) == ["resid_post.0", "resid_post.0", "resid_post.1"] for some in drawn)
    streams, heads = ([Node(Site(i, stream), 0, None, kind) for i in range(4)] for stream, kind in COMPONENTS)
    for some, kinds in (([*streams[:2], heads[0]], ["head", "stream", "stream"]), (streams, ["head"] * 4)):
        everything = [*streams, *heads, Node(Site(0, "z"), 1, None, "head")]
        for drawn_nodes in random_like(some, everything):
            assert sorted(node.kind for node in drawn_nodes) == kinds
            assert len(set(drawn_nodes) - set(some)) == len(some)
    embeddings = Node(Site(0, "resid_pre"), 0, None, "stream")
    for drawn_nodes in random_like([embeddings, heads[0]], [embeddings, *heads, everything[-1]]):
        assert drawn_nodes == [embeddings, everything[-1]]
    with pytest.raises(UserError, match="at least 5"):
        random_like(chosen, candidates, draws=3)
    with pytest.raises(UserError, match="candidates"):
        random_like(chosen, chosen[:1])


def test_members_that_are_no_nodes_are_refused():
    model = network(({0: 1.0}, 0.0, {10: 1.0}))
    with pytest.raises(UserError, match="not among the nodes"):
        NodeRuns(model, [identity(0)], PAIRS, [Node(SECOND, 1)])
    with pytest.raises(UserError, match="error terms are kept"):
        NodeRuns(model, [identity(0)], PAIRS, [Node(FIRST, 0, None, "error")], errors="kept")
    with pytest.raises(UserError, match="residual stream that has nodes"):
        EdgeRuns(model, [identity(0), identity(1)], PAIRS, [Edge(Node(FIRST, 0, 1), TARGET)])
    assert WIDTH > ANSWER
