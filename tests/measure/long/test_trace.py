"""Sparse traces: the dense case, masses against whole patterns, planted needles, and what is refused."""

import numpy as np
import pytest
import torch
from planted import Attending, planted_model
from tiny import FAMILIES, random_dictionary, tiny_model

import saepatch as sp
from saepatch.errors import UserError
from saepatch.measure.attention import attention_patterns
from saepatch.measure.long.choosing import Scores, block_keys, choose, span_keys
from saepatch.measure.long.masks import EDGES

WINDOWED = ("mistral", "gemma2", "gemma3_text")
TEXT = "A long text, of which every block differs from the one before it: 0123456789 abc"


def windowed(family="gemma2", window=40):
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return tiny_model(family, sliding_window=window, layer_types=kinds, max_position_embeddings=256)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss"])
@pytest.mark.parametrize("piece", [8, 512])
def test_with_every_block_kept_the_pass_is_the_models_own(family, piece):
    changes = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8} if family == "gpt_oss" else {}
    model = tiny_model(family, **changes)
    text = TEXT[:60]
    trace = sp.trace_attention(model, text, k=20, block=4, piece=piece, measured=None)
    assert trace.against.kept
    assert trace.against.kl == pytest.approx(0, abs=1e-6)
    assert trace.against.difference_traced == pytest.approx(trace.against.difference, abs=1e-4)
    assert trace.layers == (0, 1, 2)
    for layer in trace.layers:
        assert trace.dropped(layer).shape == (4, 61)
        assert np.abs(trace.dropped(layer)).max() == 0
        if family != "gpt_oss":  # its sinks take a share
            np.testing.assert_allclose(trace.read(layer).sum(-1), 1, atol=1e-5)


def kept_by_hand(trace, layer, query, window):
    """The key positions that a query's heads keep: chosen blocks, the first, the own and the one before, cut ones."""
    own, size = query // trace.block, trace.block
    forced = {0, own - 1, own}
    first, last = own * size, min((own + 1) * size, len(trace.tokens)) - 1
    if window:  # blocks that the window of some, but not all of the block's queries covers whole
        forced |= {at for at in range(own) if max(0, first - window + 1) <= at * size + size - 1 < last - window + size}
    chosen = trace.chosen[layer][:, own].tolist()
    return [
        {at for block in {*forced, *some} if block >= 0 for at in range(block * size, block * size + size)}
        for some in chosen
    ]


@pytest.mark.parametrize(("family", "window"), [("llama", 0), ("gemma2", 40), ("qwen3", 0), ("gpt2", 0)])
def test_dropped_masses_are_those_of_the_whole_pattern(family, window):
    model = windowed(family, window) if window else tiny_model(family, max_position_embeddings=256, n_positions=256)
    text = TEXT + TEXT
    trace = sp.trace_attention(model, text, k=2, block=4, measured=None, piece=64)
    patterns = attention_patterns(model, model.tokenize([text]))[0][0].double().numpy()  # layer 0 has the same inputs
    dropped, seen = trace.dropped(0), 0
    for query in range(len(trace.tokens)):
        for head, kept in enumerate(kept_by_hand(trace, 0, query, window)):
            others = [at for at in range(query + 1) if at not in kept]
            expected = patterns[head, query, others].sum()
            assert dropped[head, query] == pytest.approx(expected, abs=1e-6), (query, head)
            seen += expected > 0.01
    assert seen > 10
    end = np.add.reduceat(patterns[:, -1], np.arange(0, len(trace.tokens), 4), axis=1)
    np.testing.assert_allclose(trace.read(0), end, atol=1e-6)


def test_recall_is_the_share_of_the_truly_most_read_blocks():
    model, text = tiny_model("llama", max_position_embeddings=256), TEXT
    trace = sp.trace_attention(model, text, k=3, block=4, measured=0)
    pattern = attention_patterns(model, model.tokenize([text]))[0][0].numpy()
    own = trace.blocks_of_prompt - 1
    mean = pattern[:, own * 4 :].mean(1)
    by_block = np.add.reduceat(mean, np.arange(0, len(trace.tokens), 4), axis=1)[:, 1 : own - 1]
    for head in range(4):
        top = set((np.argsort(-by_block[head])[:3] + 1).tolist())
        assert trace.recall(0)[head] == pytest.approx(len(top & set(trace.chosen[0][head, -1].tolist())) / 3)


def test_pieces_do_not_change_a_sparse_pass():
    model = windowed()
    whole, pieces = (
        sp.trace_attention(model, TEXT * 2, k=1, block=4, piece=piece, measured=None) for piece in (512, 16)
    )
    for layer in whole.layers:
        assert torch.equal(whole.chosen[layer], pieces.chosen[layer])
        np.testing.assert_allclose(whole.dropped(layer), pieces.dropped(layer), atol=1e-5)
    assert whole.against.kl == pytest.approx(pieces.against.kl, abs=1e-5)


# a query "?" reads the needle "N" with score 30, "b" with score 5 and everything else with 0; "d" is far from all keys
LETTERS = {"N": {1: 5.0, 4: 1.0}, "?": {2: 6.0}, "b": {1: 5 / 6}, "d": {7: 50.0}}


def needle_model():
    reader = Attending(query=[2, 3], key=[1, 7], value=[4], out=[5])
    return planted_model(8, [reader], LETTERS, {"Y": {5: 9.0}, "n": {0: 1.0}})


def with_needle(depth, blocks=64, decoy=False):
    """A document of "b" whose last letter asks for the needle, which stands in one of its blocks of 8."""
    rows = [["." if block == depth else "b"] * 8 for block in range(blocks)]
    rows[depth][3] = "N"
    if decoy:
        rows[depth][5] = "d"
    return "".join(map("".join, rows))[:-1] + "?"


@pytest.mark.parametrize("depth", [2, 4, 16, 31, 32, 33, 47, 60])
def test_a_needle_is_found_at_every_depth(depth):
    trace = sp.trace_attention(needle_model(), with_needle(depth), k=1, block=8)
    assert (trace.next_token, trace.against.kept) == ("Y", True)
    assert trace.dropped_at_end(0)[0] < 1e-6
    needle = (1 + 8 * depth + 3) // 8  # BOS moves it by one
    assert int(trace.read(0)[0].argmax()) == needle
    assert "kept" in trace.blocks()[2].rows[0]


@pytest.mark.parametrize("depth", [16, 33, 50])
def test_a_needle_whose_span_scores_low_is_missed_and_the_dropped_mass_shows_it(depth):
    model, text = needle_model(), with_needle(depth, decoy=True)
    trace = sp.trace_attention(model, text, k=1, block=8)
    assert (trace.next_token, trace.against.next_token, trace.against.kept) == ("n", "Y", False)
    assert trace.dropped_at_end(0)[0] > 0.999
    assert trace.against.kl > 1
    assert "dropped" in trace.blocks()[2].rows[0]
    least = sp.trace_attention(model, text, k=None, block=8)
    assert least.against.kept
    assert least.tried[least.k]
    assert not least.tried[least.k - 1]


def test_ranges_hold_each_block_once_and_only_seen_ones():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 37, 4, 8, generator=generator)
    for k in (1, 2, 5, 40):
        low = torch.randint(0, 37, (25,), generator=generator)
        high = torch.minimum(low + torch.randint(0, 38, (25,), generator=generator), torch.tensor(37))
        query, real = torch.randn(4, 25, 4, 8, generator=generator), torch.ones(25, 4, dtype=torch.bool)
        chosen = choose(query, real, span_keys(block_keys(keys), 2 * k), low, high, k, Scores(0.3))
        for head in range(4):
            for number in range(25):
                mine = [at for at in chosen[head, number].tolist() if at >= 0]
                assert len(set(mine)) == len(mine) == min(k, int(high[number] - low[number]))
                assert all(low[number] <= at < high[number] for at in mine)


def test_a_single_level_keeps_the_spans_with_the_best_bound():
    """At most 2k blocks: each is scored once, by the better of the two lower bounds of its mass."""
    generator = torch.Generator().manual_seed(1)
    keys, query = torch.randn(1, 6, 4, 8, generator=generator), torch.randn(1, 1, 4, 8, generator=generator)
    chosen = choose(
        query,
        torch.ones(1, 4, dtype=torch.bool),
        span_keys(block_keys(keys), 6),
        torch.tensor([0]),
        torch.tensor([6]),
        3,
        Scores(0.5),
    )
    best = []
    for block in keys[0]:
        far = block[(block - block.mean(0)).norm(dim=-1).argmax()]
        best.append(torch.maximum(query[0, 0] @ block.mean(0) * 0.5 + np.log(4), query[0, 0] @ far * 0.5))
    share = torch.stack(best, -1).softmax(-1).amax(0)
    assert set(chosen[0, 0].tolist()) == set(share.topk(3).indices.tolist())


def test_windows_cut_no_more_blocks_than_are_forced():
    for window in (3, 4, 5, 7, 8, 9, 17, 40):
        trace = sp.trace_attention(windowed(window=window), TEXT, k=30, block=8, measured=None)
        assert trace.against.kl == pytest.approx(0, abs=1e-6), window
    assert EDGES == 2


def test_what_cannot_be_traced_is_refused():
    model = tiny_model("llama")
    with pytest.raises(UserError, match="one prompt"):
        sp.trace_attention(model, model.tokenize(["one", "two"]))
    with pytest.raises(UserError, match="k = 0"):
        sp.trace_attention(model, "text", k=0)
    with pytest.raises(UserError, match="block = 0"):
        sp.trace_attention(model, "text", block=0)
    with pytest.raises(UserError, match="unknown option 'blocks'"):
        sp.trace_attention(model, "text", blocks=3)
    with pytest.raises(UserError, match="inside a splice"), sp.splice(model, random_dictionary(), sp.Steer(1, 1.0)):
        sp.trace_attention(model, "text")
    with pytest.raises(UserError, match="does not use transformers"):
        sp.trace_attention(tiny_model("bloom", n_head=4), "text")
    with pytest.raises(UserError, match="one token"):
        sp.trace_attention(model, "text", answer=" several tokens")
