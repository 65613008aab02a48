"""Attribution graphs under freezing: edges sum to what they lead to, in every family."""

import numpy as np
import pytest
import torch
from bare_hooks import forward
from planted import saturated_model, split_dictionary
from tiny import random_dictionary, tiny_model

import saepatch as sp
from saepatch.circuits.edges.attribution_graph import AttributionGraph, Vertex
from saepatch.circuits.edges.frozen_graph import attribution_graph, head_loadings
from saepatch.circuits.edges.score_split import score_split
from saepatch.errors import UserError
from saepatch.model.sites import Site

pytestmark = pytest.mark.whole


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "qwen3", "phi"])
def test_edges_sum_to_preactivations_and_logits(family):
    model = tiny_model(family)
    dictionaries = [random_dictionary("resid_post.0", seed=1), random_dictionary("resid_post.1", "jumprelu", seed=2)]
    graph = attribution_graph(model, dictionaries, "cat")
    assert graph.gap < 1e-4
    kinds = {vertex.kind for vertex in graph.vertices}
    assert kinds >= {"embedding", "mlp_out", "latent", "error", "b_dec", "bias", "logit"}
    named = {vertex.name for vertex in graph.vertices if vertex.kind == "bias"}
    assert any("ln_1" in name for name in named) == (family == "gpt2")
    seen = {}
    forward(model, "cat", {d.site: lambda x, s=d.site: seen.setdefault(s, x) for d in dictionaries})
    for row, value in zip(graph.reader, graph.value, strict=True):
        vertex = graph.vertices[row]
        if vertex.kind == "latent" and vertex.site == Site(0):  # a TopK of pre-activations
            acts = dictionaries[0].activations(seen[Site(0)])[0]
            assert value == pytest.approx(float(acts[0, vertex.position, vertex.unit]), abs=1e-4)
    before = [j for j, v in enumerate(graph.vertices) if v.site == Site(0) or v.kind == "embedding"]
    into = [i for i, r in enumerate(graph.reader) if graph.vertices[r].site == Site(1)]
    embeddings = [j for j in before if graph.vertices[j].kind == "embedding"]
    assert not graph.weight[np.ix_(into, embeddings)].any()  # the stream between is cut
    assert graph.weight[np.ix_(into, before)].any()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_heads_of_an_edge_sum_to_it(family):
    """Through two layers of attention, with key heads that query heads share in one family."""
    model = tiny_model(family)
    dictionaries = [random_dictionary("resid_post.2", seed=2)]
    graph = attribution_graph(model, dictionaries, "cats")
    rows = [i for i, r in enumerate(graph.reader) if graph.vertices[r].position == 3][:2]
    for kind, layers in (("embedding", {0, 1, 2}), ("mlp_out", {1, 2})):
        j = next(j for j, v in enumerate(graph.vertices) if v.kind == kind and v.position == 1)
        for i in rows:
            parts = head_loadings(model, dictionaries, "cats", graph.vertices[j], graph.vertices[graph.reader[i]])
            assert {layer for layer, _ in parts.keys() - {None}} == layers
            assert sum(parts.values()) == pytest.approx(graph.weight[i, j], rel=1e-3, abs=1e-6)
            assert len([part for part in parts.values() if abs(part) > 1e-6]) > 2
    with pytest.raises(UserError, match="no edge"):
        head_loadings(model, dictionaries, "cats", Vertex("latent", Site(2), 0, 1), graph.vertices[graph.reader[0]])


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "qwen3"])
def test_the_pairs_of_an_attention_score_sum_to_it(family):
    """Differences of scores are the log-ratios of transformers' own patterns: norms of queries, soft caps and all."""
    model, prompt, query = tiny_model(family), "cats", 4
    model.hf.set_attn_implementation("eager")
    tokens = model.tokenize([prompt])
    with torch.no_grad():
        patterns = model.hf(input_ids=tokens.input_ids, output_attentions=True).attentions
    cap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    for dictionaries, layer in (([], 0), ([random_dictionary("resid_post.0", seed=1)], 1), ([], 2)):
        for head in (1, 2):
            near, far = (score_split(model, dictionaries, prompt, (layer, head), query, key) for key in (3, 1))
            scores = [split.score if cap is None else cap * np.tanh(split.score / cap) for split in (near, far)]
            row = patterns[layer][0, head, query].double()
            assert scores[0] - scores[1] == pytest.approx(float((row[3] / row[1]).log()), abs=1e-4)
            assert near.attention == pytest.approx(float(row[3]), abs=1e-5)
            for split in (near, far):
                for sides in (split.by_query, split.by_key):
                    assert sides.sum() == pytest.approx(split.score, abs=1e-4)
                top = split.top(3)
                assert abs(top[0][2]) == pytest.approx(
                    np.abs(split.scaling * split.query @ split.key.T).max(), rel=1e-6
                )
                assert split.of(*top[1][:2]) == pytest.approx(top[1][2])
            own = [
                vertex
                for vertex, value in zip(near.vertices, near.by_key, strict=True)
                if value and vertex.position == 4
            ]
            assert not own  # the key lies before


def test_what_looks_for_a_token_and_what_is_found_are_the_pair():
    """The planted head's query is 40 at `q`, its key 1 at `A`: all of the score is that pair of embeddings."""
    split = score_split(saturated_model(), [], "Aq", (0, 0), 2, 1)
    q, a = (next(v for v in split.vertices if v.kind == "embedding" and v.position == p) for p in (2, 1))
    assert split.score == pytest.approx(40.0)
    assert split.of(q, a) == pytest.approx(40.0)
    assert split.top(1) == [(q, a, pytest.approx(40.0))]
    assert sum(abs(value) > 1e-6 for _, _, value in split.top(9)) == 1
    assert split.attention == pytest.approx(1.0, abs=1e-6)
    for head, query, key, message in (((0, 1), 2, 1, "no head 1"), ((0, 0), 1, 2, "no attention from token 1")):
        with pytest.raises(UserError, match=message):
            score_split(saturated_model(), [], "Aq", head, query, key)


def test_the_heads_that_read_a_latents_token_are_found():
    """The planted head attends from `q` to `A`, where one latent is active and another is not."""
    model, dictionary = saturated_model(), split_dictionary("resid_pre.0", 9)
    read = sp.reading_heads(model, dictionary, 2 * 5, ["aAq", "aq", "bbAq"])  # what `A` and `a` hold at dimension 5
    assert read.prompt.tolist() == [0, 1, 2]
    assert read.position.tolist() == [1, 1, 3]
    assert read.heads == ((0, 0),)
    np.testing.assert_allclose(read.attention[2], 1.0, atol=1e-6)
    assert read.attention[0, 0] < 1e-6  # the first of two equal tokens, which the head does not look for
    assert "head" in read.summary()
    with pytest.raises(UserError, match="active in none"):
        sp.reading_heads(model, dictionary, 2 * 8, ["aAq"])


def test_what_is_not_linear_under_freezing_is_refused():
    with pytest.raises(UserError, match=r"gated.*not W_enc x \+ b_enc"):
        attribution_graph(tiny_model("llama"), [random_dictionary("resid_post.1", "gated")], "cat")
    with pytest.raises(UserError, match="mlp_out"):
        attribution_graph(tiny_model("opt"), [random_dictionary("resid_post.1")], "cat")


def small(probability=(0.0, 0.0, 1.0)):
    """a feeds b with 3 of 4, an error with 1 of 4; b alone feeds the logit; c, which a feeds, leads nowhere."""
    names = ("embedding", "error", "latent", "latent", "logit")
    vertices = tuple(Vertex(kind, unit=i) for i, kind in enumerate(names))
    weight = np.array([[3.0, -1.0, 0, 0, 0], [2.0, 0, 0, 0, 0], [0, 0, -5.0, 0, 0]])
    return AttributionGraph(vertices, np.array([2, 3, 4]), weight, weight.sum(1), np.array(probability))


def test_influence_is_the_sum_over_paths():
    np.testing.assert_allclose(small().influence(), [0.75, 0.25, 1.0, 0.0, 0.0])
    large = small()
    scaled = AttributionGraph(large.vertices, large.reader, large.weight * 1e300, large.value, large.probability)
    np.testing.assert_allclose(scaled.influence(), large.influence())


def test_pruning_keeps_what_reaches_the_logits():
    graph = small()
    assert graph.pruned(1.0, 1.0).tolist() == [
        [True, True, False, False, False],
        [False] * 5,
        [False, False, True, False, False],
    ]
    assert graph.pruned(0.8, 1.0).tolist() == [
        [True, False, False, False, False],
        [False] * 5,
        [False, False, True, False, False],
    ]
    with pytest.raises(UserError, match="above 0"):
        graph.pruned(0.0)
