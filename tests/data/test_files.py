"""One reader of rows for pairs, requests and texts: every format, byte order marks, places in messages."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import tiny_model

from saepatch.data.files import read_rows
from saepatch.data.pairs import load_pairs
from saepatch.data.requests import Request, read_requests
from saepatch.data.texts import load_texts
from saepatch.errors import UserError

ROWS = [
    {"text": "a, 1", "prompt": "p", "clean": "c", "corrupted": "k", "answer": "x", "counter": "y", "harmful": True},
    {
        "text": "b\u2028",
        "prompt": "q",
        "clean": "d",
        "corrupted": "l",
        "answer": "x",
        "counter": "y",
        "harmful": False,
    },
]


@pytest.fixture(params=["jsonl", "json", "csv", "parquet"])
def file(request, tmp_path):
    path = tmp_path / f"rows.{request.param}"
    if request.param == "csv":
        with path.open("w", newline="", encoding="utf-8-sig") as out:
            writer = csv.DictWriter(out, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    elif request.param == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
        text = f"[{','.join(lines)}]" if request.param == "json" else "\n\n".join(lines)
        path.write_text(text, encoding="utf-8-sig")
    return path


def test_every_format_serves_pairs_requests_and_texts(file):
    assert load_texts(str(file)) == ["a, 1", "b\u2028"]
    assert [pair.clean for pair in load_pairs(str(file))] == ["c", "d"]
    assert read_requests(str(file), tiny_model(), False, 0) == [
        Request("rows-0000", "p", "c", "yes"),
        Request("rows-0001", "q", "d", "no"),
    ]
    assert len(read_requests(str(file), tiny_model(), False, 1)) == 1


def test_rows_say_where_they_stand(file):
    where = {"jsonl": ["line 1", "line 3"], "json": ["item 1", "item 2"], "csv": ["line 2", "line 3"]}
    expected = where.get(file.suffix[1:], ["row 0", "row 1"])
    assert [row.where for row in read_rows(file, "rows")] == [f"{file}, {place}" for place in expected]
    with pytest.raises(UserError, match="column 'story'" if file.suffix in (".jsonl", ".json") else "no column story"):
        load_texts(str(file), "story")


def test_what_cannot_be_read(tmp_path):
    for read in (lambda path: load_texts(path), lambda path: read_requests(path, tiny_model(), False, 0)):
        with pytest.raises(
            UserError,
            match=r"cannot read (texts|prompts) from '.*none' \(No such file.*(the path|one text per line)",
        ):
            read(str(tmp_path / "none"))
        (tmp_path / "latin").write_bytes("\xe9".encode("latin-1"))
        with pytest.raises(UserError, match=r"(texts|prompts) in .*latin' are not UTF-8 .*save"):
            read(str(tmp_path / "latin"))
    (tmp_path / "plain").write_text("\ufeffone\n\ntwo", encoding="utf-8")
    assert load_texts(str(tmp_path / "plain")) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.csv", "text,text\na,b\n", "several columns 'text'"),
        ("rows.jsonl", '{"text": "a", "text": "b"}\n', "line 1, is not JSON: key 'text' appears twice"),
        ("rows.json", '[{"text": "a"}, {"text": "b", "text": "c"}]', "key 'text' appears twice"),
        ("rows.jsonl", '{"text": "\\ud83d"}', "a lone surrogate"),
        ("rows.jsonl", f'{{"text": {"[" * 9000}', "nested too deeply"),
        ("rows.jsonl", f'{{"text": {"1" * 5000}}}', "4300 digits"),
        ("rows.parquet", "PAR1", "cannot read texts"),
    ],
)
def test_files_that_could_be_read_in_two_ways_or_none(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load_texts(str(tmp_path / name))


def test_parquet_columns_of_one_name(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="several columns 'text'"):
        load_texts(str(tmp_path / "rows.parquet"))
