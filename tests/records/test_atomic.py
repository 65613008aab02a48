"""Files that appear whole or not at all, and what processes that were killed while they wrote have left."""

import fcntl
import json
import resource

import pytest
import torch

from saepatch.records.files import check_writable, write_json, write_tensors


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    path = tmp_path / "summary.json"
    dead, locked, editor, other = (
        tmp_path / name
        for name in (".summary.json.abc_12de", ".summary.json.zzzzzzzz", ".summary.json.swp", ".other.json.abc_12de")
    )
    for leftover in (dead, locked, editor, other):
        leftover.write_text("half")
    with locked.open() as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        write_json({"a": 1}, path)
    assert json.loads(path.read_text()) == {"a": 1}
    assert {each.name for each in tmp_path.iterdir()} == {path.name, locked.name, editor.name, other.name}
    write_json({"a": 2}, path)
    assert not locked.exists()


def test_files_are_written_where_there_are_no_locks(tmp_path, monkeypatch):
    def none(*_):
        raise OSError("Function not implemented")

    monkeypatch.setattr("fcntl.flock", none)
    for value in (1, 2):
        write_json(value, tmp_path / "value.json")
    (tmp_path / ".value.json.abcdefgh").touch()
    write_json(3, tmp_path / "value.json")
    assert {path.name for path in tmp_path.iterdir()} == {"value.json", ".value.json.abcdefgh"}


def test_a_folder_that_is_looked_at_stays_empty(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("tempfile._os.unlink", lambda *given, **more: seen.append(given))
    check_writable(tmp_path)
    assert seen == []
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_cannot_be_written_are_an_error_of_the_system(tmp_path):
    """As on a full disk: commands say so in a line, and leave the file as it was."""
    path = tmp_path / "delta.safetensors"
    write_tensors({"a": torch.zeros(3)}, path, {})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_tensors({"a": torch.zeros(100_000)}, path, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
