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


def brackets():
    """Does a string of `o` (open) and `c` (close) ever close more than it has opened? In the manner of Tracr.

    Every variable of the program has a dimension of its own, as in models compiled from RASP (Lindner et al. 2023), on
    which the recovery of circuits is measured by the ROC of their edges (Conmy et al. 2023). Beside the answer the
    model computes the same of `d` and `e`, which nothing reads.
    """
    model = planted(
        "ocde",
        [
            wires(),
            relus(*(({token: 1.0}, 0.0, {10 + token: 1.0}) for token in range(4))),  # is the token an o, c, d, e?
            wires(*((10 + token, 14 + token, 1.0) for token in range(4))),  # how many so far?
            relus(({15: 1.0, 14: -1.0}, 0.0, {18: 1.0}), ({17: 1.0, 16: -1.0}, 0.0, {19: 1.0})),  # too many closed?
            wires((18, 20, 1.0), (19, 21, 1.0)),  # ever?
            relus(({20: 1.0}, 0.0, {ANSWER: 4.0}), ({20: 1.0}, -1.0, {ANSWER: -4.0})),  # at least once
        ],
    )
    program = {(0, 0, 10), (0, 1, 11), (1, 10, 14), (1, 11, 15), (2, 14, 18), (2, 15, 18), (3, 18, 20), (4, 20, ANSWER)}
    pairs = [pair("coo", "oco"), pair("occo", "ooco"), pair("dcce", "dooe"), pair("occe", "oocd"), pair("cdo", "ode")]
    return model, program, [*pairs, pair("occoc", "ococo")]


def area(truth, score):
    """The area under the ROC curve, ties counted half."""
    positive, negative = score[truth], score[~truth]
    above = (positive[:, None] > negative).mean() + 0.5 * (positive[:, None] == negative).mean()
    return float(above)


def roc_of_edges(how):
    """The ROC of all edges between the units of neighbouring sites, by their mean absolute estimates."""
    model, program, pairs = brackets()
    result = sp.edges(model, [identity(layer) for layer in range(6)], pairs, how)
    truth, score = np.zeros((5, WIDTH, WIDTH), bool), np.zeros((5, WIDTH, WIDTH))
    for layer, up, down in program:
        truth[layer, up, down] = True
    for number in range(len(result)):
        edge = result.edge(number)
        if edge.down.site is not None and edge.up.kind == edge.down.kind == "latent":
            score[edge.up.site.layer, edge.up.unit, edge.down.unit] += abs(result.score[number])
    return area(truth.ravel(), score.ravel()), result


def test_the_edges_of_a_compiled_program_are_told_from_all_others():
    found, result = roc_of_edges(sp.EdgeOptions(sp.Linear(steps=10), verify=30, sample=30))
    assert found >= 0.95
    assert result.verified.pearson() > 0.7  # of single edges, where nonlinear units saturate on the way
    # gradients at the base run miss what is silent there: no string of a corrupted prompt closes too much
    assert roc_of_edges(sp.EdgeOptions(verify=0, sample=0))[0] < found
    assert area(np.array([True, False, False]), np.array([1.0, 1.0, 0.0])) == 0.75
