"""Tokenisation, alignment, padding, answers, and the errors that show what does not fit."""

import json

import pytest
import torch
from tiny import tiny_model

from saepatch.errors import UserError
from saepatch.prompts import PromptPair, batch_pairs, load_pairs, same_length_batches

PAIR = PromptPair("the cat", "the dog", "x", "y")


def test_batches_align_and_hold_answers_in_context():
    model = tiny_model()
    for side in ("left", "right"):
        batch = batch_pairs(model, [PAIR, PromptPair("abcdefghij", "abcdefghiz", "p", "q")], side)
        assert batch.clean.input_ids.shape == batch.corrupted.input_ids.shape == (2, 11)
        assert model.tokenizer.decode(batch.answer) == "xp"
        assert model.tokenizer.decode(batch.counter) == "yq"
        assert batch.clean.lengths.tolist() == [8, 11]
        last = batch.clean.input_ids[torch.arange(2), batch.clean.last]
        assert model.tokenizer.decode(last) == "tj"
        assert not batch.clean.ordinary[batch.clean.input_ids == model.bos_id].any()
        assert batch.clean.ordinary.sum(-1).tolist() == [7, 10]


def test_a_text_with_its_own_bos_gets_no_second():
    model = tiny_model()
    assert model.encode("<bos>ab") == model.encode("ab")
    assert model.encode("ab").count(model.bos_id) == 1


@pytest.mark.parametrize(
    ("pair", "complaint"),
    [
        (
            PromptPair("the cat", "the horse", "x", "y", "p7"),
            r"pair p7: .*8 tokens.*10: \[.*c\|a\|t\] against \[.*h\|o\|r",
        ),
        (PromptPair("the cat", "the dog", "xx", "y"), r"answer 'xx' is not one token .*x\|x"),
        (PromptPair("the cat", "the dog", "x", ""), "answer '' is not one token"),
        (PromptPair("", "", "x", "y"), "empty prompt ''"),
        (PromptPair("a" * 70, "b" * 70, "x", "y"), "71 tokens is longer than the context of 64"),
    ],
)
def test_bad_pairs(pair, complaint):
    with pytest.raises(UserError, match=complaint):
        batch_pairs(tiny_model(), [pair])


def test_alignment_from_the_right_takes_unequal_lengths():
    model = tiny_model()
    batch = batch_pairs(model, [PromptPair("a cat", "the horse", "x", "y")], align="right")
    assert batch.clean.input_ids.shape == batch.corrupted.input_ids.shape
    assert batch.clean.last.tolist() == batch.corrupted.last.tolist()


def test_same_length_batches_hold_every_row_once_and_trim_padding():
    model = tiny_model()
    pairs = [PromptPair("a" * n, "b" * n, "x", "y", str(i)) for i, n in enumerate([3, 5, 3, 4, 5, 3])]
    for side in ("left", "right"):
        parts = list(same_length_batches(batch_pairs(model, pairs, side), 2))
        assert sorted(int(i) for part in parts for i in part.index) == list(range(6))
        assert all(not part.clean.padded for part in parts)
        for part in parts:
            assert [pairs[i].example for i in part.index] == [p.example for p in part.pairs]


def test_pairs_from_a_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"clean": "a", "corrupted": "b", "answer": "c", "counter": "d"} for _ in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert len(load_pairs(str(path), n=2)) == 2
    for text, complaint in [
        ("{", "line 1, is not JSON"),
        ("[1]", "line 1, is not a JSON object"),
        ('{"clean": "a"}', "line 1 lacks text for corrupted, answer, counter"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=complaint):
            load_pairs(str(path))
    with pytest.raises(UserError, match="cannot read pairs"):
        load_pairs(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="unknown task 'nosuch': use one of ioi"):
        load_pairs("nosuch")
