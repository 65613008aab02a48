"""Edges of models whose every weight is known."""

import numpy as np
import pytest
import torch
from planted_circuits import ANSWER, WIDTH, identity, pair, planted, relus, wires
from tiny import tiny_model

import saepatch as sp
from saepatch.circuits.nodes import Edge, Node
from saepatch.engine.components import Heads, Stream
from saepatch.model.sites import Site

BEFORE = Site(0)


def scores(result, least=1e-6):
    """Edges by the units they join, summed over positions."""
    sums = {}
    for number in range(len(result)):
        edge = result.edge(number)
        key = (edge.up.unit, "logits" if edge.down.site is None else edge.down.unit, str(edge.up.site))
        sums[key] = sums.get(key, 0.0) + float(result.score[number])
    return {key: value for key, value in sums.items() if abs(value) > least}


def test_in_a_linear_model_edges_sum_to_the_gap_and_are_their_path_patches():
    generator = torch.Generator().manual_seed(0)
    mixing = [0.2 * torch.randn(WIDTH, WIDTH, generator=generator) for _ in range(3)]
    model = planted("abcdef", [torch.zeros(WIDTH, WIDTH), *mixing])
    dictionaries = [identity(0, signed=True), identity(2, signed=True)]
    result = sp.edges(model, dictionaries, [pair("abcd", "efcb")], sp.EdgeOptions(verify=40, sample=0))
    into = result.names[4] < 3  # not those to the logits
    into_logits = ~into
    assert result.score[into].sum() == pytest.approx(result.gap[0], rel=1e-4)
    assert result.score[into_logits].sum() == pytest.approx(result.gap[0], rel=1e-4)
    np.testing.assert_allclose(result.verified.exact, result.verified.estimated, rtol=1e-3, atol=1e-5)


def test_two_paths_that_cancel_are_two_edges():
    """+1 and −1: the node has no effect, its edges have 1 and −1."""
    copies = relus(({0: 1.0}, 0.0, {10: 1.0}), ({0: 1.0}, 0.0, {11: 1.0}))
    model = planted("u", [wires(), copies, wires((10, ANSWER, 1.0), (11, ANSWER, -1.0))])
    pairs = [pair("u", ".")]
    result = sp.edges(model, [identity(0), identity(1)], pairs, sp.EdgeOptions(sp.Linear(steps=4)), min_gap=1e-9)
    by_name = scores(result)
    assert by_name[0, 10, "resid_post.0"] == pytest.approx(1.0, abs=1e-5)
    assert by_name[0, 11, "resid_post.0"] == pytest.approx(-1.0, abs=1e-5)
    exact = dict(zip((edge for _, edge in result.checked), result.verified.exact, strict=True))
    u, up, down = Node(BEFORE, 0, 1), Node(Site(1), 10, 1), Node(Site(1), 11, 1)
    assert exact[Edge(u, up)] == pytest.approx(1.0, abs=1e-5)
    assert exact[Edge(u, down)] == pytest.approx(-1.0, abs=1e-5)
    node = sp.patch_latents(model, identity(0), pairs, [0], controls=0, min_gap=1e-9)
    assert node.change[0, 0] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.whole
def test_query_heads_that_share_a_key_head_have_edges_that_sum():
    """Patching both heads of a group changes a later latent's site by the sum of their parts: z is linear there."""
    model = tiny_model("llama")
    pairs = [sp.PromptPair("cat", "dot", "x", "y")]
    how = sp.EdgeOptions(paths=sp.Paths(attention=False, mlp=False), verify=0, sample=0)
    heads = sp.edges(model, [Heads(1, 4), Stream(Site(1))], pairs, how)
    outputs = sp.edges(model, [Stream(Site(1, "attn_out")), Stream(Site(1))], pairs, how)
    for position in range(1, 4):
        own = (heads.names[4] == 1) & (heads.names[3] == position)
        whole = (outputs.names[4] == 1) & (outputs.names[3] == position)
        assert heads.score[own].sum() == pytest.approx(outputs.score[whole].sum(), rel=1e-3, abs=1e-6)
