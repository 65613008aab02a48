"""Runs read back from their folders, as notebooks do."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from saepatch.errors import UserError
from saepatch.pages.loaded import load_run
from saepatch.pages.sweeps.run_data import read_run_data

FOLDERS = Path(__file__).parents[1] / "runs" / "folders"


@pytest.mark.parametrize("kind", ["patch", "attribute"])
def test_a_run_comes_back_as_frames(kind):
    run, data = load_run(FOLDERS / kind), read_run_data(FOLDERS / kind)
    frame = run.to_frame()
    assert len(frame) == len(data.changes.keys)
    np.testing.assert_array_equal(frame["ratio_of_means"], data.effects)
    assert str(frame.dtypes["latent"]) == str(frame.dtypes["position"]) == "Int64"
    cells = data.intervals([0, 1])
    np.testing.assert_array_equal(frame["low"][:2], [np.nan if c.low is None else c.low for c in cells])
    rows = run.to_pandas()
    assert len(rows) == len(data.changes.key)
    assert {"latent", "clean", "corrupted", "patched"} <= set(rows)
    assert run.settings["pairs"] == data.settings["pairs"]


@pytest.mark.parametrize("kind", ["patch", "attribute", "restore"])
def test_a_run_shows_its_headline_and_writes_its_page(kind, tmp_path):
    run = load_run(str(FOLDERS / kind))
    assert repr(run).startswith(f"{kind} in ")
    assert len(repr(run).splitlines()) <= 3
    html = run._repr_html_()
    assert 1_000 < len(html) < 20_000
    page = run.report(tmp_path / "page.html")
    assert run.page().title.replace("'", "&#39;") in page.read_text(encoding="utf-8")


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not finished"):
        load_run(FOLDERS / "stopped")
    with pytest.raises(UserError, match="give the folder of a finished run"):
        load_run(tmp_path)
    run = load_run(FOLDERS / "restore")
    with pytest.raises(UserError, match="no run of patch or attribute"):
        run.to_frame()
    shutil.copy(FOLDERS / "restore" / "summary.json", tmp_path)
    with pytest.raises(UserError, match="no table of rows"):
        load_run(tmp_path).to_pandas()
