"""Circuits between two pictures, against plain hooks on the plain model, which reads pixels."""

import numpy as np
import pytest
import torch
from tiny import random_dictionary

from pictures.test_families import FEW, plain
from pictures.tiny_vision import picture, vision_model
from saepatch.circuits.edges.edge_runs import EdgeRuns
from saepatch.circuits.edges.estimates import EdgeOptions, edges
from saepatch.circuits.find import FindOptions, find_circuit
from saepatch.circuits.node_runs import NodeRuns
from saepatch.circuits.nodes import Node
from saepatch.data.pairs import PromptPair
from saepatch.errors import UserError
from saepatch.model.inputs.images import ImagePrompt

pytestmark = pytest.mark.whole


@pytest.fixture
def pair(tmp_path):
    clean, corrupted = (picture(tmp_path, name, name) for name in ("red", "blue"))
    return PromptPair(ImagePrompt("a <image> b", clean), ImagePrompt("a <image> b", corrupted), "x", "y")


def dictionaries():
    return [random_dictionary("resid_post.0", seed=1), random_dictionary("resid_post.1", "jumprelu", seed=2)]


def difference(model, logits):
    x, y = (model.encode(text)[-1] for text in ("ax", "ay"))
    return float(logits[x] - logits[y])


def literal(model, saes, pair, acting):
    """The metric of one pass in which `acting` nodes (site, kind, unit, position) have what they compute from the
    clean picture, and all others what they hold on the other picture."""
    _, held = plain(model, pair.corrupted)
    places = model.tokenize([pair.clean]).ordinary[0].nonzero().flatten().tolist()

    def edit(sae):
        other = sae.encode(held[sae.site.layer])

        def run(x):
            mine = sae.encode(x)
            for place in places:
                acts, error = other.acts[0, place].clone(), other.error[0, place]
                for unit in range(sae.d_sae):
                    if (sae.site, "latent", unit, place) in acting:
                        acts[unit] = mine.acts[0, place, unit]
                if (sae.site, "error", 0, place) in acting:
                    error = mine.error[0, place]
                x[:, place] = acts @ sae.rows + sae.sae.b_dec + error

        return run

    return difference(model, plain(model, pair.clean, {sae.site.layer: edit(sae) for sae in saes})[0])


@torch.no_grad()
@pytest.mark.parametrize("family", FEW)
def test_runs_of_nodes_are_those_of_plain_hooks(family, pair):
    """At image tokens and the text after them; one node stands for all positions."""
    model, saes = vision_model(family), dictionaries()
    tokens = model.tokenize([pair.clean])
    here = tokens.images.here[0].nonzero().flatten().tolist()
    nodes = [Node(sae.site, unit, place) for sae in saes for unit in range(1, 48, 2) for place in (here[1], here[-1])]
    nodes += [Node(sae.site, unit) for sae in saes for unit in range(0, 48, 2)]
    nodes += [Node(sae.site, 0, place, "error") for sae in saes for place in (here[0], tokens.width - 1)]
    runs = NodeRuns(model, saes, [pair], nodes)
    act = torch.rand(2, len(nodes), generator=torch.Generator().manual_seed(0)) < 0.5
    expected = []
    for mask in act.tolist():
        chosen = [node for node, acts in zip(nodes, mask, strict=True) if acts]
        acting = {
            (node.site, node.kind, node.unit, place)
            for node in chosen
            for place in (range(tokens.width) if node.position is None else [node.position])
        }
        expected.append(literal(model, saes, pair, acting))
    np.testing.assert_allclose(runs.run(act)[:, 0], expected, rtol=1e-3, atol=1e-4)
    assert abs(expected[0] - expected[1]) > 1e-3
    whole, empty = (difference(model, plain(model, prompt)[0]) for prompt in (pair.clean, pair.corrupted))
    assert runs.whole[0] == pytest.approx(whole, abs=1e-4)
    # features of the clean picture are no nodes: where blocks add some, they stay when no node acts
    assert (runs.empty[0] == pytest.approx(empty, abs=1e-4)) == (family == "gemma3")


@torch.no_grad()
def path_patch(model, saes, edge, pair):
    """The change of the metric by one edge, in three passes of the plain model that reads pixels."""
    known = {sae.site: sae for sae in saes}
    (base, here), (_, there) = plain(model, pair.corrupted), plain(model, pair.clean)

    def written(node, x):
        latents = known[node.site].encode(x)
        return (
            latents.error if node.kind == "error" else latents.acts[..., [node.unit]] * known[node.site].rows[node.unit]
        )

    def moved(node, before, after):
        x, place = before.clone(), slice(node.position, node.position + 1)
        x[:, place] += written(node, after[:, place]) - written(node, before[:, place])
        return x

    up, down = edge.up, edge.down
    patched = moved(up, here[up.site.layer], there[up.site.layer])
    logits, reached = plain(model, pair.corrupted, {up.site.layer: lambda x: x.copy_(patched)})
    if down.site is not None:
        final = moved(down, here[down.site.layer], reached[down.site.layer])
        logits, _ = plain(model, pair.corrupted, {down.site.layer: lambda x: x.copy_(final)})
    return difference(model, logits) - difference(model, base)


def test_edges_are_path_patches_by_plain_hooks(pair):
    """In a model that adds features of the picture between the two sites."""
    model, saes = vision_model("qwen3_vl"), dictionaries()
    result = edges(model, saes, [pair], EdgeOptions(verify=5, sample=5))
    expected = [path_patch(model, saes, edge, pair) for _, edge in result.checked]
    np.testing.assert_allclose(result.verified.exact, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    here = model.tokenize([pair.clean]).images.here[0]
    assert any(bool(here[edge.up.position]) for _, edge in result.checked)


def test_edges_are_refused_where_tokens_of_a_picture_read_later_ones(pair):
    """An edge to an earlier position would be missing; nodes are found."""
    model, saes = vision_model("gemma3"), dictionaries()
    with pytest.raises(UserError, match="read later ones"):
        edges(model, saes, [pair])
    found = find_circuit(model, saes, [pair], how=FindOptions(least=0.5, each_position=True, edges=None))
    assert len(found.circuit.nodes) < len(found.ranked)
    assert {node.position for node in found.ranked} >= set(range(6, 10))  # the image tokens
    with pytest.raises(UserError, match="read later ones"):
        EdgeRuns(model, saes, [pair], [])
