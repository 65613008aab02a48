"""Tokens that a dictionary was not trained on have no nodes: no edges, no path patches, no members that act."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from bare_hooks import forward
from tiny import random_dictionary, tiny_model

import saepatch as sp
from saepatch.circuits.edges.paths import path_patches
from saepatch.circuits.nodes import node_sites
from saepatch.errors import UserError
from saepatch.model.sites import Site

PAIR = sp.PromptPair("cat", "dot", "x", "y", "a")
UP, DOWN, TARGET = Site(0), Site(1), sp.Node(None, kind="logits")
UNKNOWN = 2  # the second letter differs; its token in the corrupted prompt is unknown


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def dictionaries(model):
    up, down = random_dictionary("resid_post.0", seed=1), random_dictionary("resid_post.1", "jumprelu", seed=2)
    up.sae.cfg.metadata.exclude_special_tokens = model.encode("o")[1:]
    return [up, down]


@pytest.fixture(scope="module")
def everywhere(dictionaries):
    return [replace(dictionary, every_position=True) for dictionary in dictionaries]


@pytest.mark.parametrize("steps", [0, 2])
def test_edges_start_and_end_at_known_tokens(model, dictionaries, everywhere, steps):
    how = sp.EdgeOptions(sp.Linear(steps=steps), verify=20, sample=20)
    few, all_of_them = (sp.edges(model, some, [PAIR], how) for some in (dictionaries, everywhere))
    starts = [
        {int(p) for p, c in zip(r.names[3], r.names[1], strict=True) if r.parts[c][0] == UP} for r in (few, all_of_them)
    ]
    assert starts == [{1, 3}, {1, 2, 3}]
    assert {int(p) for p, c in zip(few.names[6], few.names[4], strict=True) if few.parts[c][0] == DOWN} == {1, 2, 3}
    if not steps:
        kept = {few.edge(i): few.score[i] for i in range(len(few))}
        same = {all_of_them.edge(i): all_of_them.score[i] for i in range(len(all_of_them))}
        assert kept == pytest.approx({edge: same[edge] for edge in kept}, rel=1e-3, abs=1e-5)


def test_a_path_patch_at_an_unknown_token_is_refused(model, dictionaries, everywhere):
    edge = sp.Edge(sp.Node(UP, 0, UNKNOWN, "error"), sp.Node(DOWN, 0, 3, "error"))
    assert path_patches(model, node_sites(model, everywhere), [PAIR], [(0, edge)], sp.Paths(), sp.SweepOptions())[0]
    with pytest.raises(UserError, match="not trained on the token there"):
        path_patches(model, node_sites(model, dictionaries), [PAIR], [(0, edge)], sp.Paths(), sp.SweepOptions())
    with pytest.raises(UserError, match="positions 2 select tokens"):
        sp.edges(model, dictionaries, [PAIR], positions=UNKNOWN)
    with pytest.raises(UserError, match="positions 2 select tokens"):
        sp.NodeRuns(model, dictionaries, [PAIR], [], options=sp.SweepOptions(positions=UNKNOWN))


@torch.no_grad()
def test_members_at_unknown_tokens_do_not_act(model, dictionaries, everywhere):
    """Without members, the site holds the corrupted run's value at known tokens, and passes on at the others."""
    corrupted = model.capture(model.tokenize([PAIR.corrupted]), [UP])[UP]

    def hold(x):
        return torch.where(torch.tensor([False, True, False, True])[:, None], corrupted, x)

    logits = forward(model, PAIR.clean, {UP: hold})
    members = [sp.Node(UP, unit, p) for unit in range(48) for p in (UNKNOWN, None) if (unit % 2) == (p is None)]
    runs = sp.NodeRuns(model, dictionaries[:1], [PAIR], members)
    x, y = (model.encode(answer)[-1] for answer in "xy")
    assert runs.empty[0] == pytest.approx(float(logits[x] - logits[y]), abs=1e-4)
    at_unknown = torch.tensor([member.position == UNKNOWN for member in members])
    act = torch.stack([torch.zeros_like(at_unknown), at_unknown])
    assert np.ptp(runs.run(act)) == 0
    assert np.ptp(sp.NodeRuns(model, everywhere[:1], [PAIR], members).run(act)) > 1e-3


def test_edges_at_unknown_tokens_carry_nothing(model, dictionaries, everywhere):
    up = sp.Node(UP, 0, UNKNOWN, "error")
    down = [sp.Node(DOWN, 0, position, "error") for position in (2, 3)]
    listed = [sp.Edge(up, node) for node in down] + [sp.Edge(node, TARGET) for node in down]
    act = torch.tensor([[False, False, True, True], [True] * 4])
    assert np.ptp(sp.EdgeRuns(model, dictionaries, [PAIR], listed).run(act)) == 0
    assert np.ptp(sp.EdgeRuns(model, everywhere, [PAIR], listed).run(act)) > 1e-3
