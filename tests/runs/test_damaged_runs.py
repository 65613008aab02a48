"""Files of a run that were cut, retyped or replaced: one line and exit code 2, whatever reads them."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
from runs_of_training import documents, small
from tiny import save_model_and_sae, tiny_model

from saepatch.cli.main import main
from saepatch.errors import UserError
from saepatch.records.provenance import Provenance
from saepatch.records.rows import read_about, write_rows
from saepatch.report import read_page
from saepatch.report.text import number
from saepatch.runs.catalogue import find_runs
from saepatch.runs.driver import locked
from training.__main__ import main as train
from training.loop.trainer import train_saes


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    save_model_and_sae(folder)
    pairs = [{"clean": f"ab{c}", "corrupted": f"ad{c}", "answer": "x", "counter": "y"} for c in "cde"]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    assert main(command(folder, folder / "run")) == 0
    return folder


def command(folder, out):
    given = ["patch", "--model", folder / "model", "--sae", folder / "saes", "--pairs", folder / "pairs.jsonl"]
    return [*map(str, given), "--latents", "3;5", "--controls", "1", "--part", "1", "--quiet", "--out", str(out)]


@pytest.fixture
def run(whole, tmp_path):
    shutil.copytree(whole / "run", tmp_path / "run")
    return tmp_path / "run"


def refused(capsys, *arguments):
    assert main([str(each) for each in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_part_whose_rows_were_cut_is_run_again(whole, run, capsys):
    part = run / "parts/shard-0-of-1/part-00001.parquet"
    table = pq.read_table(part)
    assert read_about(part) is not None
    pq.write_table(table.slice(0, 1).replace_schema_metadata(table.schema.metadata | metadata(part)), part)
    assert read_about(part) is None
    assert "lacks part 1 of 3" in refused(capsys, "merge", run)
    assert main(command(whole, run)) == 0
    assert pq.read_table(part).num_rows == table.num_rows


def metadata(part):
    return {key: value for key, value in pq.read_metadata(part).metadata.items() if key.startswith(b"saepatch")}


def test_a_part_with_other_columns_is_named(run, capsys):
    part = run / "parts/shard-0-of-1/part-00002.parquet"
    table = pq.read_table(part)
    effect = table.schema.get_field_index("effect")
    retyped = table.set_column(effect, "effect", table["effect"].cast("string"))
    pq.write_table(retyped.replace_schema_metadata(table.schema.metadata | metadata(part)), part)
    assert "part-00002.parquet have other columns" in refused(capsys, "merge", run)


@pytest.mark.parametrize(
    "values",
    [{"shards": "many"}, {"settings": []}, {"work": "conjure"}, {"parts": -1}, {"pairs": {"hash": []}}, {"x": 1}],
)
def test_a_record_that_was_changed(run, capsys, values):
    change(run / "parts/shard-0-of-1/run.json", **values)
    refused(capsys, "merge", run)


@pytest.mark.parametrize(
    "values",
    [{"top": []}, {"top": {"denoise": [{}]}}, {"settings": 3}, {"dictionaries": [1]}, {"model": 7, "top": None}],
)
def test_a_summary_that_was_changed(whole, run, capsys, values):
    change(run / "summary.json", **values)
    refused(capsys, "report", run)
    assert main(["runs", str(run.parent)]) == 0
    refused(capsys, "compare", run, whole / "nothing")


def test_a_foreign_summary_is_no_run_in_a_list(tmp_path):
    for place, text in (("a", "[1]"), ("b", '{"work": "patch"}'), ("c", "{"), ("d", '{"work": "patch", "work": "x"}')):
        (tmp_path / place).mkdir()
        (tmp_path / place / "summary.json").write_text(text)
    assert find_runs(tmp_path) == []


@pytest.mark.parametrize("spec", ["1000000000d", "{}", ">99999999", "x", 3, None])
def test_a_number_format_of_a_file_is_one_that_pages_use(spec):
    table = {"block": "Table", "columns": ["a"], "rows": [[1.5]]}
    formats = {"block": "mapping", "items": [["a", spec]]}
    section = {"block": "Section", "title": "t", "blocks": [table | {"formats": formats}]}
    with pytest.raises(UserError, match="no number format"):
        read_page({"block": "Page", "title": "t", "lead": "l", "sections": [section]})
    assert number(1.5, "d") == "1.50"


def test_a_folder_belongs_to_one_run(whole, run, tmp_path, capsys):
    for left in ("summary.json", "metrics.jsonl", "config.yaml"):  # of something else, or of training that has begun
        (tmp_path / left).mkdir()
        (tmp_path / left / left).write_text('{"sites": {}, "identity": {}}')
        assert "another command" in refused(capsys, *command(whole, tmp_path / left))
        assert [path.name for path in (tmp_path / left).iterdir()] == [left]
    assert "another command" in refused(capsys, "demo", "--out", tmp_path / "summary.json")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for given in (["--resume", "true"], ["--overwrite", "true"], []):
        assert train(["--model", str(whole / "model"), "--out", str(run), "--context", "16", "--dry_run", *given]) == 2
        assert "another command" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_one_training_at_a_time_works_in_a_folder(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match="is working in"):
        train_saes(tiny_model(), documents(), small(), tmp_path)


def test_rows_are_counted(tmp_path):
    provenance = Provenance("m", "h", "d", "h", 0)
    write_rows([([], provenance)], tmp_path / "rows.parquet", {"run": "x"})
    assert read_about(tmp_path / "rows.parquet") == {"run": "x"}
