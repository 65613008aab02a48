"""Tokenisation, alignment, padding, answers, and the errors that show what does not fit."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict
from tiny import tiny_model

from saepatch.data.batches import batch_pairs, same_length_batches
from saepatch.data.pairs import PromptPair, load_pairs
from saepatch.errors import UserError

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


ROWS = [{"clean": f"a, {i}", "corrupted": 'b "b"\n', "answer": " c", "counter": " d"} for i in range(3)]


def write(path, rows):
    """Rows in a file of the format that its name says."""
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)) + "\n\n")
    return str(path)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_pairs_from_a_file(tmp_path, suffix):
    source = write(tmp_path / f"pairs.{suffix}", ROWS)
    pairs = load_pairs(source, n=2)
    assert [(p.clean, p.corrupted, p.answer, p.counter) for p in pairs] == [tuple(row.values()) for row in ROWS[:2]]
    assert len({p.example for p in pairs} | {f"pairs-{i}" for i in range(9)}) == 9
    assert len(load_pairs(source, n=0)) == 3
    named = load_pairs(write(tmp_path / f"pairs.{suffix}", [row | {"example": "x7", "more": "z"} for row in ROWS]))
    assert {p.example for p in named} == {"x7"}
    lacking = write(tmp_path / f"pairs.{suffix}", [{"clean": "a", "counter": "d"}])
    with pytest.raises(
        UserError, match=r"corrupted, answer.*(needs|name its columns) clean, corrupted, answer, counter"
    ):
        load_pairs(lacking)
    with pytest.raises(UserError, match="cannot read pairs"):
        load_pairs(str(tmp_path / f"none.{suffix}"))


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("p.jsonl", "{", "line 1, is not JSON"),
        ("p.jsonl", "\n[1]", "line 2, is not a JSON object"),
        ("p.jsonl", '{"clean": "a"}', "line 1 lacks text for corrupted, answer, counter"),
        ("p.json", "[1]", "item 1, is not a JSON object"),
        ("p.json", "[", "is not JSON"),
        ("p.csv", "", r"has no column clean, corrupted, answer, counter \(it has none\)"),
        ("p.csv", "clean,corrupted,answer,counter\na,b,c,d,e", "line 2, has more cells than the header"),
        ("p.csv", "clean,corrupted,answer,counter\na,b,c", "line 2 lacks text for counter"),
        ("p.csv", 'clean,corrupted,answer,counter\n"a,b,c,d', "line 2, is not CSV"),
        ("p.parquet", "no parquet", "cannot read pairs"),
    ],
)
def test_files_that_will_not_do(tmp_path, name, text, complaint):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=complaint):
        load_pairs(str(tmp_path / name))


def test_pairs_from_datasets(tmp_path, monkeypatch):
    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "plain")
    assert [p.example for p in load_pairs(str(tmp_path / "plain"), n=2)] == ["plain-0", "plain-1"]
    DatasetDict({"train": rows, "report": rows.select([2])}).save_to_disk(tmp_path / "split")
    assert load_pairs(str(tmp_path / "split"))[0].clean == "a, 2"
    with pytest.raises(UserError, match="has no split 'tune': give one of train, report with --split"):
        load_pairs(str(tmp_path / "split"), "tune")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is not a dataset saved by `datasets` with save_to_disk"):
        load_pairs(str(tmp_path / "empty"))
    Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "other")
    with pytest.raises(UserError, match="pair 0 of .*other' lacks text for clean, corrupted, answer, counter"):
        load_pairs(str(tmp_path / "other"))
    asked = []

    def loader(*given, split):
        asked.append((*given, split))
        return rows

    monkeypatch.setattr("datasets.load_dataset", loader)
    assert load_pairs("me/pairs:hard", "train", 1)[0].example == "pairs-0"
    assert asked == [("me/pairs", "hard", "train")]


def test_sources_that_are_not_there(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("Couldn't reach 'me/pairs' on the Hub\nand more")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(
        UserError, match=r"cannot load dataset 'me/pairs', split 'train' \(Couldn't reach .* Hub\): check"
    ):
        load_pairs("me/pairs", "train")
    with pytest.raises(UserError, match="'./here/pairs' is neither a file or folder nor a dataset's OWNER/NAME"):
        load_pairs("./here/pairs")
    with pytest.raises(UserError, match=r"unknown task 'nosuch': use one of ioi.* a file \(.jsonl, .*\) of pairs"):
        load_pairs("nosuch")
    with pytest.raises(UserError, match="n = -1 asks for no pairs"):
        load_pairs("ioi", n=-1)


@pytest.mark.whole  # types that are checked at run time refuse it first
def test_a_row_in_place_of_a_pair_is_named():
    row = {"clean": "my pig ran", "corrupted": "my fox ran", "answer": "x", "counter": "y"}
    with pytest.raises(UserError, match="a pair is a dict, not a PromptPair"):
        batch_pairs(tiny_model("llama"), [row])
