"""States of one prompt written into another: plain hooks, identities, and a planted look-up that comes too early."""

import numpy as np
import pytest
import torch
from bare_hooks import forward
from planted import Mixing, Rectified, planted_model
from tiny import random_dictionary, tiny_model

from saepatch.errors import UserError
from saepatch.model.positions import At
from saepatch.model.sites import Site
from saepatch.reading.cosine_lens import Mention, cosine_lens
from saepatch.reading.cross_patch import CrossQuery, Move, TwoHop, cross_patch, cross_queries, layer_moves

SITES = [Site(0, "resid_pre"), Site(0), Site(1), Site(2)]
MOVES = [Move(read, write) for read in SITES for write in SITES]
QUERIES = [
    CrossQuery("the cat sat", "a dog ran off", "x", "y", At("cat"), At("dog")),
    CrossQuery("the cat sat", "some hen lay", "z", "x", -1, 2),
    CrossQuery("one cow", "a dog ran off", "x", "z"),
]


def columns(model, text, positions):
    if positions == "last":
        return [len(model.encode(text)) - 1]
    if isinstance(positions, int):
        return [positions % len(model.encode(text))]
    ids, word = model.encode(text), model.encode(positions.text)[-len(positions.text) :]
    start = next(i for i in range(len(ids)) if ids[i : i + len(word)] == word)
    return list(range(start, start + len(word)))


def by_hand(model, query, move, take=lambda new, old: new):
    """Log-probabilities after the target, with plain hooks and no cache."""
    held = {}
    read, write = (columns(model, *pair) for pair in ((query.source, query.read), (query.target, query.write)))
    forward(model, query.source, {move.read: lambda x: held.setdefault("x", x)})

    def put(x):
        x = x.clone()
        x[:, write] = take(held["x"][:, read], x[:, write])
        return x

    return forward(model, query.target, {move.write: put}).log_softmax(-1)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_every_move_is_that_of_plain_hooks(family):
    model = tiny_model(family)
    found = cross_patch(model, QUERIES, MOVES, ["w"], rows=2)
    assert found.answers == ("w", "x", "y", "z")
    for i, query in enumerate(QUERIES):
        for j, move in enumerate(MOVES):
            truth = by_hand(model, query, move)
            ids = [model.encode(query.target + answer)[-1] for answer in found.answers]
            assert found.log_p[i, j] == pytest.approx(truth[ids].numpy(), abs=1e-4)
            assert found.likeliest[i, j] == int(truth.argmax())
        plain = forward(model, query.target, {}).log_softmax(-1)
        assert found.plain_log_p[i] == pytest.approx(plain[ids].numpy(), abs=1e-4)
        assert found.plain_likeliest[i] == int(plain.argmax())
    assert found.first_among().shape == (3, 16)
    assert (found.first_among()[1] == (found.log_p[1].argmax(-1) == 3)).all()


@torch.no_grad()
def test_chosen_latents_take_over_alone():
    model, dictionary, ids = tiny_model("llama"), random_dictionary(), [3, 9, 20]
    move = Move(Site(2), Site(0))
    found = cross_patch(model, QUERIES[:1], [move], dictionary=dictionary, latents=ids)

    def take(new, old):
        gap = dictionary.encode(new).acts - dictionary.encode(old).acts
        return old + gap[..., ids] @ dictionary.W_dec[ids]

    truth = by_hand(model, QUERIES[0], move, take)
    answers = [model.encode(QUERIES[0].target + answer)[-1] for answer in found.answers]
    assert found.log_p[0, 0] == pytest.approx(truth[answers].numpy(), abs=1e-4)
    whole = cross_patch(model, QUERIES[:1], [move])
    assert abs(found.log_p - whole.log_p).max() > 1e-3


@pytest.mark.parametrize("latents", [None, [3, 9, 20]])
def test_a_site_into_itself_changes_nothing(latents):
    model, dictionary = tiny_model("llama"), random_dictionary() if latents else None
    own = [CrossQuery(text, text, "x", "x", at, at) for text, at in (("the cat sat", At("cat")), ("one cow", "last"))]
    found = cross_patch(model, own, [Move(site, site) for site in SITES], dictionary=dictionary, latents=latents)
    assert abs(found.log_p - found.plain_log_p[:, None]).max() < 1e-5
    assert (found.likeliest == found.plain_likeliest[:, None]).all()


def early_lookup():
    """Block 0 looks answers up by bridge, block 1 bridges by subject: too late for block 0.

    Subjects are `s` and `t`, bridges dimensions 2 and 5, answers `x` and `z`; without an answer `y` is likeliest.
    """
    unit = torch.eye(8)
    second = Rectified(unit[[2, 5]].tolist(), (3 * unit[[3, 6]]).tolist())
    first = Rectified(unit[[1, 4]].tolist(), unit[[2, 5]].tolist())
    letters, reads = {"s": {1: 1.0}, "t": {4: 1.0}}, {"x": {3: 3.0}, "z": {6: 3.0}, "y": {0: 1.0}}
    return planted_model(8, [second, first, Mixing(8)], letters, reads)


def test_back_patching_alone_repairs_a_lookup_that_comes_too_early():
    model = early_lookup()
    queries = [CrossQuery(text, text, wanted, wanted) for text, wanted in (("as", "x"), ("at", "z"))]
    sites = [Site(0, "resid_pre"), Site(0), Site(1), Site(2)]
    found = cross_patch(model, queries, [Move(a, b) for a in sites for b in sites])
    assert not found.given_unpatched().any()
    for number, move in enumerate(found.moves):
        repaired = move.write == sites[0] and move.read in sites[2:]
        assert found.given()[:, number].tolist() == [repaired] * 2, str(move)
    assert not found.given(["z", "x"]).any()  # the same search for the other answer
    best = found.moves[found.best()]
    assert (best.write, found.share(found.best()).value) == (sites[0], 1.0)
    assert not cross_patch(model, queries, layer_moves([0, 1, 2], "forward")).given().any()
    # the bridge of one prompt in another one: the answer is the other bridge's
    asked = [TwoHop(f"a{s}", s, b, "letter", a) for s, b, a in (("s", "2", "x"), ("t", "5", "z"))]
    crossed = cross_queries(asked, asked, {("letter", "2"): "x", ("letter", "5"): "z"})
    assert crossed.left_out == {"equal bridges": 2, "the target's own answer": 0, "no answer known": 0}
    assert [query.wanted for query in crossed.queries] == ["x", "z"]
    found = cross_patch(model, crossed.queries, [Move(Site(1), sites[0]), Move(Site(0), sites[0])])
    assert found.given().tolist() == [[True, False], [True, False]]


def test_pairs_that_could_not_tell_are_left_out():
    asked = [TwoHop(p, p, b, "r", a) for p, b, a in (("p", "1", "x"), ("q", "2", "x"), ("o", "3", "z"))]
    crossed = cross_queries(asked[:2], asked, {("r", "1"): "x", ("r", "3"): "z"})
    assert crossed.left_out == {"equal bridges": 2, "the target's own answer": 1, "no answer known": 2}
    (query,) = crossed.queries
    assert (query.source, query.target, query.wanted, query.own) == ("p", "o", "x", "z")


def test_the_cosine_lens_tells_late_from_never():
    """`b` and `c` are the bridges of `s` and `t` themselves; `s` becomes like `b` in block 1, or never."""
    model = early_lookup()
    with torch.no_grad():
        for letter, dimension in (("b", 2), ("c", 5)):
            model.hf.get_input_embeddings().weight[model.encode(letter)[-1], dimension] = 1
    mentions = {letter: [Mention(f"{before}{letter}") for before in "adef"] for letter in "bc"}
    held = {"b": [Mention("as"), Mention("os")], "c": [Mention("at")]}
    sites = ["resid_pre.0", "resid_post.0", "resid_post.1"]
    lens = cosine_lens(model, mentions, held, sites)
    assert lens.cohesion == pytest.approx(np.ones((3, 2)))
    assert lens.own == (0, 0, 1)
    # after block 1 a subject's own dimension and its bridge's, against the bridge's and the answer's (three times)
    assert lens.alignment == pytest.approx(np.outer([0, 0, (1 / 20) ** 0.5], np.ones(3)), abs=1e-12)
    assert lens.share_nearest()[2].value == 1.0
    same = {"b": [Mention("sa")], "c": [Mention("ta")]}  # the letter that is read is one and the same
    assert not cosine_lens(model, mentions, same, sites).cosines.any()
    with torch.no_grad():
        model.layout.blocks[1].into.zero_()
    assert not cosine_lens(model, mentions, held, sites).cosines.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"read": "all"}, "choose as many"),
        ({"wanted": "xy"}, "not one token"),
        ({"write": At("bird")}, "whole tokens 0 times"),
    ],
)
def test_bad_queries(change, message):
    query = {"source": "the cat", "target": "a dog", "wanted": "x", "own": "y"} | change
    with pytest.raises(UserError, match=message):
        cross_patch(tiny_model("llama"), [CrossQuery(**query)], MOVES)


def test_other_mistakes():
    model = tiny_model("llama")
    with pytest.raises(UserError, match="0 moves"):
        cross_patch(model, QUERIES, [])
    with pytest.raises(UserError, match="width of the residual stream"):
        cross_patch(model, QUERIES, [Move(Site(0), Site(0, "z"))])
    with pytest.raises(UserError, match="without a dictionary"):
        cross_patch(model, QUERIES, MOVES, latents=[1])
    with pytest.raises(UserError, match="out of range"):
        cross_patch(model, QUERIES, MOVES, dictionary=random_dictionary(), latents=[10**6])
    with pytest.raises(UserError, match="back, forward"):
        layer_moves([0, 1], "up")
    with pytest.raises(UserError, match="two mentions"):
        cosine_lens(model, {"a": [Mention("a")], "b": [Mention("b")]}, {}, ["resid_post.0"])
    with pytest.raises(UserError, match="no mentions"):
        cosine_lens(model, {n: [Mention(n)] * 2 for n in "ab"}, {"c": [Mention("c")]}, ["resid_post.0"])
