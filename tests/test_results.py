"""Rows out are rows in, files appear whole or not at all."""

import json
import math

import pytest

from saepatch.errors import UserError
from saepatch.results import Provenance, Row, atomic, output_folder, read_rows, write_json, write_rows

ROW = Row(
    "ioi", "e1", "resid_post.3", "4,17", "top", "all", "denoise", "logit_difference", "exact", 2.0, -1.0, 0.5, math.nan
)


def test_rows_and_provenance_survive_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    write_rows([([ROW], Provenance("m", "a1", "d", "b2", 7)), ([ROW, ROW], Provenance("m", "a1", "e", "b3", 7))], path)
    rows = read_rows(path)
    assert [row["dictionary_hash"] for row in rows] == ["b2", "b3", "b3"]
    assert rows[0]["latents"] == "4,17"
    assert math.isnan(rows[0]["effect"])
    assert json.loads(rows[0]["versions"])["torch"]
    assert "pytest" in rows[0]["command"]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.parquet"]


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
