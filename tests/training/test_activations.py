"""Where activations come from: texts, rows, rounds of forwards, the thread, the cache, and several processes."""

import gc
import json
import logging
import os
import subprocess
import sys
import threading
import weakref
from dataclasses import asdict, replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from runs_of_training import documents, small
from safetensors.torch import load_file
from tiny import tiny_model

from saepatch.errors import UserError
from saepatch.model.hooks import capture
from saepatch.model.loading.load import wrap_model
from saepatch.model.sites import Site
from training.data import activations
from training.data.activations import START, ActivationStream, Position, forward
from training.data.cache import RoundCache
from training.data.document import has_content
from training.data.prefetch import Stopped
from training.data.rows import rows, token_batches
from training.data.texts import Streamed, as_documents, fingerprint, in_order, split, texts
from training.ranks import Ranks

pytestmark = pytest.mark.whole

TESTS = Path(__file__).parents[1]
SITES = [Site(0), Site(2), Site(1, "mlp_out")]
LONG = " ".join(documents(30, seed=5))  # far more tokens than one round holds


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def sized(**changes):
    return small(**({"batch_size": 128, "buffer": 512, "prefetch": False} | changes))


def stream(model, docs=None, sites=SITES, epochs=1, ranks=None, **changes):
    extra = {} if ranks is None else {"ranks": ranks}
    docs = documents() if docs is None else docs
    return ActivationStream(model, docs, sites, sized(**changes), epochs=epochs, **extra)


def written(path, docs):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in docs))
    return str(path)


def assert_same_rows(got, want):
    """The same rows up to order and rounding (sorting would trip over near ties)."""
    assert got.shape == want.shape
    distance = torch.cdist(got, want)
    torch.testing.assert_close(got, want[distance.argmin(1)], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(want, got[distance.argmin(0)], atol=1e-4, rtol=1e-4)


def assert_identical(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[site], b[site]) for site in b)


def plain_rows(model, ids):
    """Activations by one forward a row, without padding, special tokens left out."""
    out = {site: [] for site in SITES}
    for row in ids:
        ordinary = torch.tensor([token > 2 for token in row])
        seen = capture(model.hf, model.layout, SITES, {"input_ids": torch.tensor([row])}, stop=False)
        for site, x in seen.items():
            out[site].append(x[0, ordinary])
    return {site: torch.cat(parts) for site, parts in out.items()}


@pytest.fixture(scope="module")
def plain(model):
    return plain_rows(model, rows(model, documents(), context=32))


def joined(batches, site):
    return torch.cat([batch[site] for batch in batches])


# What a batch holds


def test_activations_are_those_of_a_plain_forward(model, plain):
    batches = list(stream(model))
    for site in SITES:
        assert {len(batch[site]) for batch in batches} <= set(range(1, 129))
        assert {batch[site].dtype for batch in batches} == {torch.float32}
        assert_same_rows(joined(batches, site), plain[site])


def test_packed_activations_are_those_of_a_plain_forward(model):
    docs = documents()
    # An epoch in one round: the packing then is that of all documents in the order of the epoch.
    order = [text for _, text in in_order(docs, 0, 0)]
    found = list(stream(model, docs, pack=True, buffer=100_000))
    want = plain_rows(model, rows(model, order, context=32, pack=True))
    for site in SITES:
        assert_same_rows(joined(found, site), want[site])


def test_sites_of_a_batch_are_of_the_same_tokens(model, plain):
    batch = next(iter(stream(model)))
    token = torch.cdist(batch[SITES[1]], plain[SITES[1]]).argmin(-1)
    for site in SITES:
        torch.testing.assert_close(batch[site], plain[site][token], atol=1e-4, rtol=1e-4)


def test_order_follows_from_the_seed(model, plain):
    first, again, other = (list(stream(model, seed=seed)) for seed in (0, 0, 1))
    assert_identical(first, again)
    assert not torch.equal(first[0][SITES[0]], other[0][SITES[0]])
    assert not torch.allclose(first[0][SITES[0]], plain[SITES[0]][:128])


def test_a_round_is_shuffled(model):
    """Neighbours in a document do not come out as neighbours, nor in the order of their rows' lengths."""
    one = ["abcdefghijklmnopqrstuvwxyz"]
    got = joined(stream(model, one, buffer=128), SITES[0])
    want = plain_rows(model, rows(model, one, context=32))[SITES[0]]
    order = torch.cdist(got, want).argmin(-1)
    assert sorted(order.tolist()) == list(range(26))
    assert int((order.diff() == 1).sum()) < 6


@pytest.mark.parametrize("sizes", [{"forward_tokens": 100}, {"batch_size": 64}, {"buffer": 100_000}])
def test_sizes_change_the_order_alone(model, plain, sizes):
    assert_same_rows(joined(stream(model, **sizes), SITES[1]), plain[SITES[1]])


@pytest.mark.parametrize("pack", [False, True])
def test_no_special_token_is_in_a_batch(model, pack):
    docs = [f"ab<eos>cd{i}<pad>ef<bos>g" for i in range(20)] + ["<bos>own", "<eos>", "", "<pad><pad>"]
    ids = rows(model, docs, context=16, pack=pack)
    assert all(any(token > 2 for token in row) for row in ids)
    n = sum(token > 2 for row in ids for token in row)
    found = list(stream(model, docs, pack=pack, context=16, buffer=100_000))
    assert len(joined(found, SITES[0])) == n
    if not pack:
        assert_same_rows(joined(found, SITES[0]), plain_rows(model, ids)[SITES[0]])


def test_special_tokens_are_learnt_from_where_asked_for(model):
    docs = [f"ab<eos>cd{i}<pad>ef<bos>g" for i in range(20)]
    found = list(stream(model, docs, special_tokens=True, context=16, buffer=100_000))
    n = sum(token not in (model.bos_id, model.tokenizer.pad_token_id) for text in docs for token in model.encode(text))
    assert len(joined(found, SITES[0])) == n > 20 * 8


def test_text_is_read_again_when_it_ends(model):
    endless = stream(model, documents(5), epochs=None, batch_size=64, buffer=128)
    batches = list(islice(endless, 40))
    assert {len(batch[SITES[0]]) for batch in batches} == {64}
    want = plain_rows(model, rows(model, documents(5), context=32))[SITES[0]]
    distance = torch.cdist(joined(batches, SITES[0]), want, compute_mode="donot_use_mm_for_euclid_dist")
    assert float(distance.amin(1).max()) < 1e-3
    assert float(distance.amin(0).max()) < 1e-3


def test_the_forward_stops_at_the_last_site(model):
    ran = []
    handles = [
        block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(model.layout.blocks)
    ]
    try:
        list(stream(model, sites=[Site(1)]))
    finally:
        for handle in handles:
            handle.remove()
    assert 0 in ran
    assert 2 not in ran


def test_rows_are_kept_in_the_models_dtype(model):
    hf = tiny_model().hf.to(torch.bfloat16)
    half = wrap_model(hf, model.tokenizer, "half")
    config = sized()
    found = next(ActivationStream(half, documents(), SITES, config)._rounds(START, threading.Event()))
    assert {x.dtype for x in found.rows.values()} == {torch.bfloat16}
    batch = next(iter(ActivationStream(half, documents(), SITES, config)))
    assert {x.dtype for x in batch.values()} == {torch.float32}
    assert set(forward(half, SITES, half.tokenize(["a cat"]), ())) == set(SITES)


def test_a_batch_that_is_kept_does_not_keep_its_round(model):
    found = iter(stream(model, epochs=None))
    kept = [next(found) for _ in range(3)]
    assert all(x.untyped_storage().nbytes() == x.numel() * 4 for batch in kept for x in batch.values())


@pytest.mark.parametrize("prefetch", [False, True])
def test_at_most_two_rounds_exist(model, monkeypatch, prefetch):
    alive, most = weakref.WeakSet(), []
    real = activations._Round

    def counted(*args):
        found = real(*args)
        alive.add(found)
        most.append(len(alive))
        return found

    monkeypatch.setattr(activations, "_Round", counted)
    list(islice(stream(model, epochs=None, prefetch=prefetch), 30))
    assert max(most) == 2
    assert len(most) > 6


# Rows


def test_rows_begin_with_bos_and_lose_no_token(model):
    docs = [*documents(8), "x" * 100]
    ids = [model.encode(text)[1:] for text in docs]
    whole = rows(model, docs, context=16)
    assert all(row[0] == model.bos_id and model.bos_id not in row[1:] and len(row) <= 16 for row in whole)
    assert [token for row in whole for token in row[1:]] == [token for document in ids for token in document]
    packed = rows(model, docs, context=16, pack=True)
    assert {len(row) for row in packed[:-1]} == {16}
    assert all(row[0] == model.bos_id for row in packed)
    assert [t for row in packed for t in row if t != model.bos_id] == [t for document in ids for t in document]
    assert sum(row[1:].count(model.bos_id) for row in packed) <= len(docs)  # one between two documents


def test_rows_of_a_tokenizer_without_bos(model, monkeypatch):
    bare = tiny_model()
    encoder = bare.tokenizer.backend_tokenizer
    encoder.post_processor = __import__("tokenizers").processors.TemplateProcessing(single="$A", special_tokens=[])
    docs = documents(8)
    ids = [bare.encode(text) for text in docs]
    assert all(0 not in document for document in ids)
    assert [token for row in rows(bare, docs, 16) for token in row] == list(chain.from_iterable(ids))
    assert [token for row in rows(bare, docs, 16, pack=True) for token in row] == list(chain.from_iterable(ids))
    with_bos = replace(bare, prepend_bos=True)
    assert rows(with_bos, docs, 16) == rows(model, docs, 16)
    assert rows(with_bos, docs, 16, pack=True) == rows(model, docs, 16, pack=True)


def test_batches_keep_to_their_size(model):
    ids = rows(model, documents(), context=32)
    batches = list(token_batches(model, ids, forward_tokens=100))
    assert all(batch.input_ids.numel() <= 100 for batch in batches)
    assert sum(int(batch.attention_mask.sum()) for batch in batches) == sum(map(len, ids))


def test_token_batches_for_other_uses(model):
    found = stream(model, epochs=None)
    first, again, other = (list(islice(found.token_batches(seed, 100), 9)) for seed in (1, 1, 2))
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(first, again))
    assert not all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(first, other))
    assert all(batch.input_ids.numel() <= 512 for batch in first)


# Beginning anywhere


@pytest.mark.parametrize(
    ("changes", "docs"),
    [
        ({}, [*documents(12), LONG]),
        ({"pack": True}, [*documents(12), LONG]),
        ({"pack": True, "buffer": 128, "context": 16}, documents(8)),
        ({"prefetch": True}, documents(20)),
        ({"epochs": 2}, [*documents(12), LONG]),
    ],
)
def test_resuming_gives_what_an_uninterrupted_stream_gives(model, changes, docs):
    options = {"sites": SITES[:1], "epochs": None} | changes
    with_positions = list(islice(stream(model, docs, **options).batches(), 30))
    batches, after = [batch for batch, _ in with_positions], [position for _, position in with_positions]
    assert len({position.round for position in after}) > 3
    assert len({position.epoch for position in after}) > 1
    assert len(set(after)) == len(after)
    if LONG in docs:
        assert any(position.offset for position in after)
    for i, position in enumerate(after):
        told = Position(**json.loads(json.dumps(asdict(position))))
        got = list(islice(stream(model, docs, **options).batches(told), 2 if i % 8 else 30))
        want = with_positions[i + 1 : i + 1 + len(got)]
        assert_identical([batch for batch, _ in got][: len(want)], [batch for batch, _ in want])
        assert [p for _, p in got][: len(want)] == [p for _, p in want]
        assert len(got) >= min(2, len(batches) - i - 1)


def test_resuming_runs_the_forwards_of_one_round(model, monkeypatch):
    docs = documents(100)
    position = [position for _, position in islice(stream(model, docs, epochs=None).batches(), 8)][-1]
    assert position.round > 1
    ran = counted_forwards(monkeypatch)
    next(stream(model, docs, epochs=None).batches(position))
    assert sum(ran) <= 512 + 32


def test_a_long_document_is_read_in_rounds(model):
    found = stream(model, [LONG], sites=SITES[:1], buffer=256)
    sizes = [len(next(iter(item.rows.values()))) for item in found._rounds(START, threading.Event())]
    assert len(sizes) > 3
    assert max(sizes) < 256 + 32
    want = plain_rows(model, rows(model, [LONG], context=32))[SITES[0]]
    assert_same_rows(joined(found, SITES[0]), want)


def counted_forwards(monkeypatch):
    """A list that gets the number of tokens of every forward."""
    ran = []
    real = activations.forward

    def counted(model, sites, tokens, special):
        ran.append(int(tokens.ordinary.sum()))
        return real(model, sites, tokens, special)

    monkeypatch.setattr(activations, "forward", counted)
    return ran


# The thread


def test_prefetching_changes_nothing(model):
    found = [list(islice(stream(model, epochs=None, prefetch=on).batches(), 30)) for on in (False, True)]
    assert_identical(*([batch for batch, _ in each] for each in found))
    assert [p for _, p in found[0]] == [p for _, p in found[1]]


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "activations"]


@pytest.mark.parametrize("start", [0, 3])
def test_no_more_rounds_are_computed_than_are_needed(model, start, monkeypatch):
    """Twice as many tokens are not read ahead; and a limit changes no batch."""
    options = {"epochs": None, "prefetch": True}
    want = list(islice(stream(model, **options).batches(), start + 20))
    position = want[start - 1][1] if start else START
    made, real = [], ActivationStream._filled

    def filled(self, ids, number, stopping):
        made.append(number)
        return real(self, ids, number, stopping)

    monkeypatch.setattr(ActivationStream, "_filled", filled)
    left = sum(p.round == position.round and p.batch > position.batch for _, p in want) + 1  # to the end of a round
    for count in (1, 4, left, 20):
        made.clear()
        got = list(islice(stream(model, **options).batches(position, count), count))
        for thread in threads():
            thread.join(10)
        assert_identical([batch for batch, _ in got], [batch for batch, _ in want[start : start + count]])
        assert made == list(range(position.round, got[-1][1].round + (got[-1][1].batch > 0)))


@pytest.mark.parametrize("how", ["close", "forget", "exception", "end", "unused"])
def test_no_thread_is_left(model, how):
    found = stream(model, epochs=1 if how == "end" else None, prefetch=True).batches()
    if how == "unused":
        found.close()
    elif how == "end":
        assert len(list(found)) > 3
    else:
        next(found)
        assert len(threads()) == 1
    if how == "close":
        found.close()
    elif how == "forget":
        del found
        gc.collect()
    elif how == "exception":
        with pytest.raises(KeyboardInterrupt):
            found.throw(KeyboardInterrupt())
    assert not threads()


def test_a_failure_in_the_thread_is_raised_where_batches_are_taken(model, monkeypatch):
    real, ran = activations.forward, []

    def failing(*args):
        ran.append(1)
        if len(ran) == 12:
            raise RuntimeError("the model broke")
        return real(*args)

    monkeypatch.setattr(activations, "forward", failing)
    with pytest.raises(RuntimeError, match="the model broke"):
        list(islice(stream(model, epochs=None, prefetch=True), 1000))
    assert not threads()
    with pytest.raises(UserError, match="no tokens besides special ones"):
        next(iter(stream(model, ["", "<eos>"], prefetch=True)))
    assert not threads()


def test_closing_does_not_wait_for_the_round(model, monkeypatch):
    """The second round never ends by itself."""
    real, second, go = activations.forward, threading.Event(), threading.Event()

    def slow(model, sites, tokens, special):
        if threads() and len(ran) > first:
            second.set()
            go.wait(10)
        ran.append(1)
        return real(model, sites, tokens, special)

    ran, first = [], 0
    monkeypatch.setattr(activations, "forward", slow)
    go.set()
    found = stream(model, documents(200), epochs=None, prefetch=True, buffer=4096, forward_tokens=64).batches()
    next(found)
    first = len(ran)
    go.clear()
    second.clear()
    assert second.wait(10)
    before = len(ran)
    threading.Timer(0.05, go.set).start()
    found.close()
    assert not threads()
    assert len(ran) <= before + 2


def test_a_pass_is_given_up_before_its_next_block(model):
    stopping, ran = threading.Event(), []

    def stop(module, *_):
        ran.append(module)
        stopping.set()

    hooks = [block.register_forward_hook(stop) for block in model.layout.blocks]
    try:
        with pytest.raises(Stopped):
            stream(model)._forward(model, model.tokenize(["the cat sat"]), stopping)
    finally:
        for hook in hooks:
            hook.remove()
    assert ran == [model.layout.blocks[0]]


def test_pausing_keeps_the_model_to_oneself(model, monkeypatch):
    found = stream(model, documents(200), epochs=None, prefetch=True, buffer=2048, forward_tokens=64)
    real, inside = activations.forward, []

    def watched(*args):
        inside.append(1)
        assert not paused.is_set(), "a forward ran while the stream was paused"
        out = real(*args)
        assert not paused.is_set(), "the stream was paused in the midst of a forward"
        return out

    paused = threading.Event()
    monkeypatch.setattr(activations, "forward", watched)
    batches = found.batches()
    next(batches)
    for _ in range(20):
        with found.paused():
            paused.set()
            threading.Event().wait(0.002)
            paused.clear()
    list(islice(batches, 20))
    batches.close()
    assert inside


# The cache


def test_cached_rounds_are_read_and_not_computed(model, tmp_path, monkeypatch):
    options = {"epochs": None, "buffer": 512}
    without = list(islice(stream(model, **options).batches(), 20))
    ran = counted_forwards(monkeypatch)
    cached = {**options, "cache": str(tmp_path / "cache")}
    first = list(islice(stream(model, **cached).batches(), 20))
    assert ran
    ran.clear()
    for again in (cached, {**cached, "prefetch": True}):
        second = list(islice(stream(model, **again).batches(), 20))
        for found in (first, second):
            assert_identical([batch for batch, _ in found], [batch for batch, _ in without])
            assert [p for _, p in found] == [p for _, p in without]
    fewer = list(islice(stream(model, sites=SITES[1:2], **cached), 20))
    assert_identical(fewer, [{SITES[1]: batch[SITES[1]]} for batch, _ in without])
    # Batches of another size are cut from the same rounds; what is left out at the end of a round differs.
    smaller = list(islice(stream(model, batch_size=64, **cached), 8))
    assert torch.equal(joined(smaller, SITES[0]), joined([batch for batch, _ in without[:4]], SITES[0]))
    position = without[9][1]
    resumed = list(islice(stream(model, **cached).batches(position), 10))
    assert_identical([batch for batch, _ in resumed], [batch for batch, _ in without[10:]])
    assert not ran
    list(islice(stream(model, **cached), 40))  # goes on by computing where the cache ends
    assert ran


def test_the_cache_ends_in_the_midst_of_a_stream(model, tmp_path, monkeypatch):
    """Read, computed, read again: the rounds are those of a stream without a cache."""
    cached = {"epochs": None, "cache": str(tmp_path), "docs": [*documents(12), LONG], "pack": True}
    without = list(islice(stream(model, **{**cached, "cache": ""}), 24))
    assert_identical(list(islice(stream(model, **cached), 24)), without)
    files = sorted(tmp_path.rglob("*.safetensors"))
    for path in files[1:4:2]:
        path.unlink()
    ran = counted_forwards(monkeypatch)
    assert_identical(list(islice(stream(model, **cached), 24)), without)
    assert 2 * 512 <= sum(ran) <= 2 * (512 + 32)
    assert sorted(tmp_path.rglob("*.safetensors")) == files


@pytest.mark.parametrize(
    "change",
    [
        *({"seed": 1}, {"context": 16}, {"buffer": 256}, {"forward_tokens": 100}, {"pack": True}, {"epochs": 1}),
        *({"docs": documents(61)}, {"docs": documents()[::-1]}, {"model": 1}, {"sites": [*SITES, Site(1)]}),
    ],
)
def test_what_determines_activations_misses_the_cache(model, tmp_path, monkeypatch, change):
    cached = {"epochs": None, "cache": str(tmp_path)}
    list(islice(stream(model, **cached), 2))
    other = tiny_model(seed=change["model"]) if "model" in change else model
    change = {name: value for name, value in change.items() if name != "model"}
    ran = counted_forwards(monkeypatch)
    next(iter(stream(other, **(cached | change))))
    assert ran


def test_the_cache_leaves_the_files_of_others(model, tmp_path):
    other = tmp_path / "Downloads" / "film.partial"
    other.parent.mkdir()
    other.write_bytes(b"half of it")
    os.utime(other, (0, 0))
    list(islice(stream(model, epochs=None, cache=str(tmp_path)), 3))
    assert other.exists()


def test_the_cache_keeps_to_its_size(model, tmp_path, caplog):
    one = 512 * 16 * 4 * len(SITES)
    options = {"epochs": None, "cache": str(tmp_path), "cache_gb": 2.6 * one / 1e9}
    with caplog.at_level(logging.WARNING):
        found = list(islice(stream(model, **options), 24))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 2.6 * one
    assert [record.message.count("further activations are not cached") for record in caplog.records] == [1]
    assert_identical(found, list(islice(stream(model, epochs=None), 24)))


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_a_damaged_file_is_computed_again(model, tmp_path, caplog, damage):
    options = {"epochs": None, "cache": str(tmp_path)}
    want = list(islice(stream(model, **options), 8))
    path = sorted(tmp_path.rglob("*.safetensors"))[1]
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    path.write_bytes({"cut": whole[:-10], "flipped": bytes(flipped), "empty": b"", "other": b"x" * 900}[damage])
    with caplog.at_level(logging.WARNING):
        assert_identical(list(islice(stream(model, **options), 8)), want)
    assert [record.message.count("are damaged") for record in caplog.records] == [1]
    assert load_file(path).keys() == {str(site) for site in SITES}
    assert path.stat().st_size == len(whole)


def test_a_full_disk_does_not_stop_the_stream(model, tmp_path, caplog, monkeypatch):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.data.cache.save_file", full)
    with caplog.at_level(logging.WARNING):
        found = list(islice(stream(model, epochs=None, cache=str(tmp_path)), 12))
    assert_identical(found, list(islice(stream(model, epochs=None), 12)))
    assert [record.message.count("No space left") for record in caplog.records] == [1]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    left, new = tmp_path / "key/a.safetensors.1.partial", tmp_path / "key/b.safetensors.2.partial"
    left.parent.mkdir()
    left.write_bytes(b"half")
    new.write_bytes(b"half")
    os.utime(left, (1, 1))
    RoundCache(tmp_path, "other", 1e9)
    assert not left.exists()
    assert new.exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to cache"):
        RoundCache(tmp_path / "file", "key", 1e9)


# Several processes


def test_a_batch_must_be_divisible(model):
    with pytest.raises(UserError, match="128 cannot be divided among 3 processes: use a multiple, as in 129"):
        stream(model, ranks=Ranks(0, 3))


WORKER = """
import os, sys
from datetime import timedelta
from itertools import islice
from pathlib import Path
import torch
from torch import distributed
torch.set_num_threads(1)
from safetensors.torch import save_file
from runs_of_training import documents, small
from tiny import tiny_model
from saepatch.errors import UserError
from saepatch.model.sites import Site
from training.data import activations
from training.data.activations import ActivationStream
from training.ranks import Ranks

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
wait = timedelta(seconds=60)
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=wait)
ranks = Ranks(rank, 2, distributed.new_group(backend="gloo", timeout=wait))
model, ran = tiny_model(), []
real = activations.forward

def counted(model, sites, tokens, special):
    ran.append(1)
    if failing and rank == 1 and len(ran) == failing:
        raise ValueError("only here")
    return real(model, sites, tokens, special)

failing = 0
activations.forward = counted
kinds = {"padded": {}, "packed": {"pack": True, "prefetch": False}, "cache": {"cache": str(folder / "cache")}}
# Without prefetching: the thread would be a round ahead, which the run before may not have come to keep.
for name, changes in [*kinds.items(), ("cached", kinds["cache"] | {"prefetch": False})]:
    distributed.barrier()  # the first process writes the cache: the other must not read before it has
    ran.clear()
    config = small(**({"batch_size": 128, "buffer": 512} | changes))
    found = ActivationStream(model, documents(), [Site(0), Site(2)], config, ranks).batches()
    out = {}
    for i, (batch, _) in enumerate(islice(found, 12)):
        out |= {f"{i}/{site}": x for site, x in batch.items()}
    found.close()
    save_file(out, folder / f"{name}.{rank}.safetensors", metadata={"ran": str(len(ran))})
    if name == "cached":
        assert not ran, ran
ran.clear()
failing = 5
try:
    list(islice(ActivationStream(model, documents(), [Site(0)], small(batch_size=128, buffer=512), ranks), 1000))
except (ValueError, UserError) as error:
    (folder / f"failed.{rank}").write_text(f"{type(error).__name__}: {error}")
distributed.barrier()
distributed.destroy_process_group()
"""


@pytest.mark.slow  # test_ranks.py compares what two processes train
def test_two_processes_give_the_batches_of_one(model, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}/common", "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "worker.py"), str(rank), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [run.communicate(timeout=120)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], "\n".join(said)
    for name in ("padded", "packed", "cache", "cached"):
        parts = [load_file(tmp_path / f"{name}.{rank}.safetensors") for rank in range(2)]
        alone = stream(model, sites=[Site(0), Site(2)], epochs=None, pack=name == "packed")
        for i, batch in enumerate(islice(alone, 12)):
            for site, want in batch.items():
                ours = [part[f"{i}/{site}"] for part in parts]
                assert [len(x) for x in ours] == [64, 64]
                assert torch.equal(torch.stack(ours, 1).flatten(0, 1), want), (name, i, site)
    assert (tmp_path / "failed.1").read_text() == "ValueError: only here"
    assert "another process of the run failed" in (tmp_path / "failed.0").read_text()


# Documents


def test_held_out_text_is_never_trained_on():
    docs = documents(50) * 3 + ["often"] * 200
    train, held = split(docs, 0.1, seed=0)
    assert not set(train) & set(held)
    assert set(train) | set(held) == set(docs)
    assert len(held) == len(set(held)) == 5
    assert split(docs, 0.1, seed=0)[1] == held != split(docs, 0.1, seed=1)[1]
    assert list(train[2:4]) == [train[2], train[3]]
    assert len(split(["one", "two"], 0.99, seed=0)[0]) == 1
    assert set(split((text for text in docs), 0.1, seed=0)[0]) == set(train)
    with pytest.raises(UserError, match="none to train on"):
        split(["same", "same"], 0.5, seed=0)
    with pytest.raises(UserError, match="a document is int, not text"):
        has_content(2)
    with pytest.raises(UserError, match=r"one string \('abc'…\): give a list of strings"):
        as_documents("abc")
    with pytest.raises(UserError, match="document 1 is None: leave it out"):
        as_documents(text for text in ["a", None])


@pytest.mark.parametrize(("name", "text"), [("a.txt", "one\ntwo\n"), ("a.jsonl", '{"text": "one"}\n{"text": "two"}\n')])
def test_a_byte_order_mark_is_no_part_of_a_document(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert list(texts(str(tmp_path / name))) == ["one", "two"]


def test_the_split_is_the_same_in_every_process():
    """Python's own hash of a text is not."""
    code = (
        "from training.data.texts import split, fingerprint; from runs_of_training import documents;"
        "train, held = split(documents(), 0.1, 3); print(held, fingerprint(train))"
    )
    environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}/common", "PYTHONHASHSEED": "77"}
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    train, held = split(documents(), 0.1, 3)
    assert there.stdout.strip() == f"{held} {fingerprint(train)}"


def test_fingerprints_tell_documents_apart():
    docs = documents()
    marks = [fingerprint(each) for each in (docs, docs[:-1], docs[::-1], [*docs[:-1], "x"])]
    marks += [fingerprint(split(docs, 0.1, seed)[0]) for seed in (0, 1)]
    assert len(set(marks)) == len(marks)
    assert fingerprint(tuple(docs)) == marks[0]


# datasets leaves it to the garbage collector to close a .csv file that is streamed
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "json", "txt", "csv", "parquet", "folder"])
def test_texts_of_every_format(tmp_path, kind, streaming):
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = [json.dumps({"id": i, "story": text}) + "\n" for i, text in enumerate(["one", "", "two"])]
    path, column = tmp_path / f"a.{kind}", "story"
    if kind == "jsonl":
        path.write_text("".join(lines))
    elif kind == "json":
        path.write_text("[" + ",".join(lines) + "]")
    elif kind == "txt":
        path.write_text("one\n\ntwo\n")
        column = "text"
    elif kind == "csv":
        path.write_text("id,story\n0,one\n1,\n2,two\n")
    elif kind == "parquet":
        pq.write_table(pa.table({"story": ["one", None, "two"], "id": [0, 1, 2]}), path)
    else:
        (tmp_path / "a.jsonl").write_text(lines[0])
        (tmp_path / "b.jsonl").write_text(lines[2])
        path = tmp_path
    found = texts(str(path), column, streaming=streaming)
    if streaming:
        assert [text for _, text in found.read()] == ["one", "two"]
    else:
        assert list(found) == ["one", "two"]
        assert len(found) == 2


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pickle", "x", "kind of file that cannot be read"),
        ("empty.jsonl", "", "empty.jsonl"),
        ("broken.jsonl", "{'text", "cannot read data '.*broken.jsonl'"),
        ("blank.jsonl", '{"text": " "}\n', "contains no text"),
        ("numbers.jsonl", '{"text": 3}\n', "int, not text"),
        ("other.jsonl", '{"story": "x"}\n', r"no column 'text': .*\(story\)"),
    ],
)
def test_texts_that_cannot_be_read(tmp_path, name, content, message, streaming):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        texts(str(tmp_path / name), streaming=streaming)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": ""}, "no data to train on"),
        ({"data": "nowhere.jsonl"}, "no file or folder 'nowhere.jsonl'"),
        ({"data": "good.jsonl", "split": "test"}, "cannot read data 'good.jsonl'.*test"),
    ],
)
def test_texts_that_are_not_there(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "good.jsonl", ["one", "two"])
    with pytest.raises(UserError, match=message):
        texts(**arguments)


# Streamed documents


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streamed")
    docs = [*documents(30), LONG, " ", *documents(30), "last"]
    return texts(written(folder / "a.jsonl", docs), streaming=True), docs


def test_a_stream_is_read_from_anywhere_in_the_order_of_its_seed(streamed):
    source, docs = streamed
    everything = [(i, text) for i, text in enumerate(docs) if text.strip()]
    assert list(source.read()) == everything
    assert list(source.read(start=40)) == everything[39:]
    mixed = list(source.read(seed=1))
    assert sorted(text for _, text in mixed) == sorted(text for _, text in everything)
    assert mixed != everything
    assert mixed != list(source.read(seed=2))
    for at in (0, 1, 17, 60, 100):
        assert list(source.read(1, at)) == [(i, text) for i, text in mixed if i >= at]


@pytest.mark.parametrize("prefetch", [False, True])
def test_resuming_a_stream_that_is_read_as_needed(model, streamed, prefetch):
    source, _ = streamed
    train, _ = split(source, 0.1, seed=0)
    options = {"sites": SITES[:1], "epochs": None, "prefetch": prefetch}
    want = list(islice(stream(model, train, **options).batches(), 60))
    assert max(position.epoch for _, position in want) >= 2
    assert any(position.offset for _, position in want)
    for i in range(0, 60, 7):
        got = list(islice(stream(model, train, **options).batches(want[i][1]), 6))[: 59 - i]
        assert_identical([batch for batch, _ in got], [batch for batch, _ in want[i + 1 : i + 1 + len(got)]])


def test_a_streams_epoch_holds_what_is_not_held_out(model, streamed):
    source, docs = streamed
    train, held = split(source, 0.2, seed=0)
    assert held == docs[: len(held)]
    assert len(held) == round(0.2 * 32)
    assert not {text for _, text in train.read()} & set(held)
    rest = [text for text in docs if text.strip() and text not in held]
    assert sorted(text for _, text in train.read(seed=3)) == sorted(rest)
    got = joined(stream(model, train, sites=SITES[:1]), SITES[0])
    assert_same_rows(got, plain_rows(model, rows(model, rest, context=32))[SITES[0]])


def test_a_streams_fingerprint(streamed, tmp_path):
    source, docs = streamed
    path = written(tmp_path / "a.jsonl", docs)
    first = texts(path, streaming=True)
    assert texts(path, streaming=True).fingerprint == first.fingerprint
    assert fingerprint(split(first, 0.1, 0)[0]) == fingerprint(split(texts(path, streaming=True), 0.1, 0)[0])
    # What one share trains on another holds out: a cache must not give the one what it kept for the other.
    assert fingerprint(split(first, 0.1, 0)[0]) != fingerprint(split(first, 0.3, 0)[0])
    written(tmp_path / "a.jsonl", [*docs, "more"])
    assert texts(path, streaming=True).fingerprint != first.fingerprint != source.fingerprint


def test_what_is_wrong_with_a_stream_shows_when_it_is_read(model, tmp_path):
    with pytest.raises(UserError, match="none to train on"):
        split(texts(written(tmp_path / "same.jsonl", ["same"] * 5), streaming=True), 0.5, 0)
    no_token = texts(written(tmp_path / "special.jsonl", ["<eos>", "<pad>", "<bos>"]), streaming=True)
    with pytest.raises(UserError, match="no tokens besides special ones"):
        next(iter(stream(model, no_token, epochs=None)))
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": "fine"}\n' * 3)
    broken = texts(str(path), streaming=True)
    path.unlink()
    with pytest.raises(UserError, match="cannot read data '.*broken.jsonl'") as raised:
        next(iter(stream(model, broken, prefetch=True)))
    assert "\n" not in str(raised.value)
    numbers = tmp_path / "numbers.jsonl"
    numbers.write_text('{"text": 1}\n')
    with pytest.raises(UserError, match="int, not text"):
        texts(str(numbers), streaming=True)


def test_long_documents_are_mixed_in_smaller_numbers(tmp_path, monkeypatch):
    source = texts(written(tmp_path / "a.jsonl", [f"{i}" * 100 for i in range(20)]), streaming=True)
    assert isinstance(source, Streamed)
    monkeypatch.setattr("training.data.texts._MIXED_CHARACTERS", 1000)
    assert 5 <= split(source, 0.1, 0)[0].mixed <= 10
    monkeypatch.setattr("training.data.texts._FIRST_CHARACTERS", 900)
    assert len(split(source, 0.25, 0)[1]) == 2  # a quarter of the nine documents that were looked at


def test_documents_are_indices_and_no_copies():
    docs = documents()
    train, _ = split(docs, 0.5, 0)
    assert train.source is docs
    assert isinstance(train.chosen, np.ndarray)
    assert [train[i] for i in range(len(train))] == list(train)
