"""Rows out are rows in, files appear whole or not at all."""

import json
import math

import pyarrow.parquet as pq
import pytest
import yaml

from saepatch.errors import UserError
from saepatch.records.files import atomic, output_folder, write_json, write_yaml
from saepatch.records.provenance import Provenance, command_line
from saepatch.records.rows import Row, read_about, read_rows, write_rows

ROW = Row(
    task="ioi",
    example="e1",
    site="resid_post.3",
    component="latent",
    latent="4,17",
    role="top",
    position="all",
    token="",
    direction="denoise",
    metric="logit_difference",
    method="exact",
    clean=2.0,
    corrupted=-1.0,
    patched=0.5,
    effect=math.nan,
    precision="bfloat16",
    rounding=0.06,
)


def test_rows_and_provenance_survive_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    write_rows([([ROW], Provenance("m", "a1", "d", "b2", 7)), ([ROW, ROW], Provenance("m", "a1", "e", "b3", 7))], path)
    rows = read_rows(path)
    assert [row["dictionary_hash"] for row in rows] == ["b2", "b3", "b3"]
    assert rows[0]["latent"] == "4,17"
    assert math.isnan(rows[0]["effect"])
    assert json.loads(rows[0]["versions"])["torch"]
    assert rows[0]["command"] == command_line() != ""
    assert {key: rows[0][key] for key in vars(ROW) if key != "effect"} == {
        key: value for key, value in vars(ROW).items() if key != "effect"
    }
    assert [p.name for p in tmp_path.iterdir()] == ["rows.parquet"]


def test_what_is_said_about_rows_is_found_without_them(tmp_path):
    path, provenance = tmp_path / "rows.parquet", Provenance("m", "a1", "d", "b2", 7)
    assert read_about(path) is None
    assert write_rows([], path, {"run": "x", "pairs": [[0, "e\N{LATIN SMALL LETTER E WITH ACUTE}", 1.5]]}) == 0
    assert read_about(path) == {"run": "x", "pairs": [[0, "eé", 1.5]]}
    assert read_rows(path) == []
    empty = pq.read_schema(path)
    assert write_rows((([ROW] * n, provenance) for n in (2, 0, 1)), path) == 3
    assert read_about(path) is None
    assert empty.remove_metadata().equals(pq.read_schema(path))  # parts without a row go together with others
    path.write_bytes(path.read_bytes()[:-9])
    assert read_about(path) is None


def test_settings_come_back_from_yaml(tmp_path):
    path = tmp_path / "c.yaml"
    write_yaml({"z": " Mary| John", "a": 0.01, "n": 3, "s": "3:7", "t": "null"}, path)
    assert yaml.safe_load(path.read_text()) == {"z": " Mary| John", "a": 0.01, "n": 3, "s": "3:7", "t": "null"}
    assert path.read_text().startswith("z:")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_json({"x": 1.0, "missing": math.nan, "list": (1, 2)}, path)
    assert json.loads(path.read_text()) == {"x": 1.0, "missing": None, "list": [1, 2]}
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text())["x"] == 1.0
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*give another folder with --out"):
        output_folder(blocked / "inside")
