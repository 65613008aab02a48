"""The study of two-hop facts: its questions, its null for a maximum, and a small whole run."""

import json

import numpy as np
import pytest

from experiments.two_hop.facts import RELATIONS, SUBJECTS
from experiments.two_hop.study import MoveSweep, TwoHopConfig, main
from saepatch.errors import UserError
from saepatch.model.sites import Site
from saepatch.reading.cross_patch import CrossPatched, CrossQuery, Move
from saepatch.records.rows import read_rows

pytestmark = pytest.mark.whole

MOVES = (Move(Site(2), Site(0)), Move(Site(1), Site(0)), Move(Site(0), Site(2)), Move(Site(1), Site(1)))
ANSWERS = ("a", "b", "c")


def found(likeliest):
    """Six questions whose answer is `a` (token 0); rows of the likeliest token after each move."""
    queries = tuple(CrossQuery("s", "t", "a", "a", example=str(i)) for i in range(6))
    log_p = np.log(np.full((6, 4, 3), 1 / 3))
    ids = np.tile(np.arange(3), (6, 1))
    return CrossPatched(queries, MOVES, ANSWERS, log_p, np.array(likeliest), log_p[:, 0], np.full(6, 7), ids)


def test_the_best_move_is_chosen_on_select_and_a_maximum_has_a_null():
    select = found([[0, 9, 0, 9]] * 6)
    report = found([[9, 0, 0, 9]] * 3 + [[1, 2, 9, 9]] * 3)
    sweep = MoveSweep("x", {"select": select, "report": report}, {})
    assert sweep.among(back=True) == [0, 1]
    assert sweep.among(back=False) == [2]
    assert sweep.among() == [0, 1, 2, 3]
    move, share = sweep.chosen(back=True)
    assert (move, share.value) == (MOVES[0], 0.0)  # the better move on report is not looked at
    assert sweep.chosen(back=False)[1].value == 0.5
    some, null, gap = sweep.any_of(back=True, seed=0)
    assert (some.value, null.value) == (0.5, 0.5)  # three rows give both wrong answers, whichever is drawn
    assert gap.value == 0.0


def test_the_written_facts_agree_with_each_other():
    countries = set().union(*SUBJECTS.values())
    for _, answers in RELATIONS.values():
        assert set(answers) <= countries
    subjects = [subject for by_country in SUBJECTS.values() for some in by_country.values() for subject in some]
    assert len(subjects) == len(set(subjects))


@pytest.mark.slow
def test_a_small_run_says_where_the_chain_breaks(tmp_path):
    config = TwoHopConfig(str(tmp_path), sae="", queries=6, layer_step=5)
    main(config)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["shares"]["composed"][0] < 0.1
    assert summary["shares"]["recalled"][0] > 0.9
    assert summary["shares"]["bridge"][0] > 0.5
    assert summary["lens"]["as answer, at the last token"]["nearest"]["resid_post.0"][0] > 0.9
    assert summary["lens"]["as answer, at the last token"]["alignment"]["resid_pre.0"] == 0.0
    for name, sweep in summary["moves"].items():
        assert sweep["unpatched"] == 0.0, name
    rows = read_rows(tmp_path / "results.parquet")
    assert {row["split"] for row in rows} == {"select", "report"}
    before = (tmp_path / "summary.json").read_text()
    main(config)
    assert (tmp_path / "summary.json").read_text() == before
    with pytest.raises(UserError):
        main(TwoHopConfig(str(tmp_path), sae="", queries=7))


def test_bad_settings():
    with pytest.raises(UserError, match="at least 6"):
        TwoHopConfig(queries=2)
