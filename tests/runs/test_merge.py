"""Rows of a run read back as numbers and summarised, against the library's own results made by hand; no model."""

from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saepatch.engine.components import Edit
from saepatch.errors import UserError
from saepatch.measure.results.effects import Effects
from saepatch.measure.results.screen import Attribution
from saepatch.model.sites import Site
from saepatch.records.provenance import Provenance
from saepatch.records.rows import ADDED, read_rows, write_rows
from saepatch.runs.commands.screens import read_screens, screen_about, screen_rows
from saepatch.runs.merge import _merge_rows, _q_values, summarise
from saepatch.runs.parts import KEYS, EditKey, Pairs, Record, RowChanges, cut_parts, edit_facts, read_changes

SITE = Site(1)
EXAMPLES = tuple(f"e{number}" for number in range(8))
GROUPS = [Edit(SITE, (3,), role="given"), Edit(SITE, (5, 7), role="given")]
CONTROL_SETS = [
    Edit(SITE, units, role=role, beside=group.units)
    for group, sets in zip(GROUPS, [((10,), (11,)), ((12, 13), (14, 15))], strict=True)
    for units, role in zip(sets, ("random", "random"), strict=True)
] + [Edit(SITE, (20,), role="matched", beside=(3,))]


def as_table(rows):
    columns = {name: [getattr(row, name) for row in rows] for name in asdict(rows[0])}
    encoded = {name: pa.array(columns[name]).dictionary_encode() for name in (*KEYS, "example")}
    numbers = {name: columns[name] for name in ("clean", "corrupted", "patched", "effect")}
    return pa.table(encoded | numbers)


def record_of(edits=None, work="patch", **settings):
    given = {"direction": "both", "seed": 3, "min_gap": 0.01, "positions": "all", "each_position": False, "metric": "m"}
    facts = None if edits is None else [edit_facts(edit) for edit in edits]
    dictionaries = {str(SITE): {"name": "d", "hash": "h"}, "resid_post.2": {"name": "e", "hash": "i"}}
    return Record(work, given | settings, {"name": "m", "hash": "h"}, dictionaries, {"hash": "p"}, 0, 1, 1, facts)


def swept(direction, flip=1.0):
    rng = np.random.default_rng(0 if direction == "denoise" else 1)
    edits = [*GROUPS, *CONTROL_SETS]
    clean = rng.normal(0, 0.3, 8) + flip * 2
    corrupted = rng.normal(0, 0.3, 8)
    change = flip * np.abs(rng.normal(0.5, 0.2, (8, len(edits)))) * np.linspace(1, 0.3, len(edits))
    ran = np.ones(change.shape, dtype=bool)
    ran[:, 4] = False  # a control that changed one pair alone, by little
    ran[2, 4] = True
    change[~ran] = 0.0
    base, sign = (corrupted, 1) if direction == "denoise" else (clean, -1)
    patched = base[:, None] + sign * change
    return Effects(direction, "m", "all", tuple(edits), EXAMPLES, clean, corrupted, patched, ran)


@pytest.mark.parametrize("flip", [1.0, -1.0])
def test_a_summary_is_that_of_the_effects_whose_rows_it_reads(flip):
    both = {}
    for direction in ("denoise", "noise"):
        both[direction] = replace(swept(direction, flip), clean=swept("denoise", flip).clean)
        both[direction] = replace(both[direction], corrupted=swept("denoise", flip).corrupted)
    rows = [row for effects in both.values() for row in effects.rows("t")]
    pairs = Pairs(EXAMPLES, both["denoise"].clean, both["denoise"].corrupted, 0.01)
    changes = read_changes(as_table(rows), pairs, [])
    record = record_of([*GROUPS, *CONTROL_SETS])
    summary = summarise(record, pairs, changes, [{"rounding": 1e-4}, {"rounding": 1e-5}])
    for direction, effects in both.items():
        top = summary.top[direction]
        assert [line.key.latent for line in top] == [",".join(map(str, edit.units)) for edit in effects.top(9)]
        # as one set of edits: controls are left out, and what the two directions share is not mixed
        own = [effects.edits.index(edit) for edit in effects.top(9)]
        q = effects.q_values()
        for line, number in zip(top, own, strict=True):
            edit = effects.edits[number]
            np.testing.assert_allclose(changes.of(line.key), effects.change[:, number], atol=1e-12)
            for name in ("value", "low", "high"):
                expected = getattr(effects.of(number, seed=3), name)
                assert getattr(line.effect, name) == pytest.approx(expected, abs=1e-9)
            assert line.q == pytest.approx(q[number])
            assert line.pairs == 8
            assert line.controls.keys() == ({"random", "matched"} if edit.units == (3,) else {"random"})
            for role, interval in line.controls.items():
                assert interval.value == pytest.approx(effects.controls(edit, role, seed=3).value)
                assert interval.high == pytest.approx(effects.controls(edit, role, seed=3).high)
        assert [line.key.latent for line in summary.curves[direction]] == ["3", "5,7"]  # one group of each size
    text = summary.table()
    assert str(both["noise"].of(0, seed=3)) in text
    assert "8 pairs (0 with a gap below 0.01)" in text


def test_rounding_is_that_of_the_coarsest_part_and_too_few_pairs_are_not_tested():
    clean, corrupted = np.full(8, 2.0), np.zeros(8)
    edits = tuple(Edit(SITE, (n,), role="given") for n in range(3))
    change = np.zeros((8, 3))
    change[:, 0], change[:, 1], change[0, 2] = 0.5, 1e-3, 0.7
    change[:, 0] += np.linspace(-0.1, 0.1, 8)
    ran = np.ones((8, 3), dtype=bool)
    ran[1:, 2] = False
    effects = Effects("denoise", "m", "all", edits, EXAMPLES, clean, corrupted, change, ran)
    pairs = Pairs(EXAMPLES, clean, corrupted, 0.01)
    changes = read_changes(as_table(effects.rows("t")), pairs, [])
    record = record_of(edits, direction="denoise")
    found = summarise(record, pairs, changes, [{"rounding": 1e-5}, {"rounding": 1e-2}])
    q = {line.key.latent: line.q for line in found.top["denoise"]}
    assert q["0"] < 0.02 < q["1"] == 1.0
    assert np.isnan(q["2"])
    assert [line.key.latent for line in found.top["denoise"] if line.within_rounding] == ["1"]
    assert found.facts()["rounding"] == 1e-2
    assert [line.facts().get("within_rounding") for line in found.top["denoise"]].count(True) == 1
    assert "0.001 [" in found.table()
    assert "°: within rounding, which alone may change the metric by 0.01" in found.table()
    assert {line.key.latent: line.pairs for line in found.top["denoise"]} == {"0": 8, "1": 8, "2": 1}
    assert found.curves["denoise"] == []  # three groups of one size
    fine = summarise(record, pairs, changes, [{"rounding": 1e-5}])
    assert {line.key.latent: line.q for line in fine.top["denoise"]}["1"] < 0.02
    flat = summarise(record, replace(pairs, clean=np.full(8, 1e-3)), changes, [{"rounding": 1e-5}])
    assert np.isnan([line.effect.value for line in flat.top["denoise"]]).all()
    assert "too little to divide by" in flat.table()
    assert [line.key.latent for line in flat.top["denoise"]] == ["0", "2", "1"]


def test_parts_of_before_get_the_columns_they_lack(tmp_path):
    (new,) = swept("denoise").rows("t")[:1]
    parts = [tmp_path / "old.parquet", tmp_path / "new.parquet"]
    write_rows([([new], Provenance("m", "h", "d", "i", 0))], parts[1])
    pq.write_table(pq.read_table(parts[1]).drop_columns(list(ADDED)), parts[0])
    _merge_rows(parts, tmp_path)
    rows = read_rows(tmp_path / "results.parquet")
    assert [row["precision"] for row in rows] == ["", new.precision]
    assert np.isnan(rows[0]["rounding"])
    assert rows[1]["rounding"] == new.rounding
    assert rows[0]["patched"] == rows[1]["patched"] == new.patched


def test_what_was_asked_for_and_ran_nowhere_is_an_edit_and_rows_are_each_once():
    effects = swept("denoise")
    pairs = Pairs(EXAMPLES, effects.clean, effects.corrupted, 0.01)
    rows = effects.rows("t")
    asked = EditKey("denoise", str(SITE), "latent", "given", "40", "all")
    changes = read_changes(as_table(rows), pairs, [asked])
    assert changes.keys[-1] == asked
    assert (changes.of(asked) == 0).all()
    assert changes.counts[-1] == 0
    np.testing.assert_allclose(changes.totals[-1], 0)
    assert (changes.of(EditKey("noise", str(SITE), "latent", "given", "3", "all")) == 0).all()
    with pytest.raises(UserError, match="several rows"):
        read_changes(as_table([*rows, rows[0]]), pairs, [])


def screened(direction, sizes):
    rng = np.random.default_rng(5)
    nodes = [(pair, site, unit, at) for pair in range(8) for site in (0, 1) for unit in (-1, 2, 4) for at in (1, 3)]
    pair, site, unit, position = (np.array(column) for column in zip(*nodes, strict=True))
    score = rng.normal(0, 1, len(nodes))
    clean, corrupted = rng.normal(2, 0.3, 8), rng.normal(0, 0.3, 8)
    clean[3], clean[5] = corrupted[3] + 1e-3, corrupted[5] - 1  # too small a gap to divide by, and one the other way
    screen = Attribution(
        direction, "m", "graddrop" if sizes else "first order", "all", (SITE, Site(2)), ("latent", "latent"), EXAMPLES,
        clean, corrupted, pair, site, unit, position, np.abs(score) if sizes else score, sizes=sizes,
    )  # fmt: skip
    exact = 0.5 * score + rng.normal(0, 0.1, len(nodes))
    base, sign = (corrupted, 1) if direction == "denoise" else (clean, -1)

    def run(edits):
        known = {(p, s, u, at): n for n, (p, s, u, at) in enumerate(nodes)}
        places = [
            known[p, 0 if e.site == SITE else 1, -1 if e.kind == "error" else e.units[0], e.position] for p, e in edits
        ]
        return np.array([base[p] + sign * exact[n] for (p, _), n in zip(edits, places, strict=True)])

    return screen.verify(9, 12, run, seed=1)


@pytest.mark.parametrize("sizes", [False, True])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_a_screen_is_read_back_as_it_was_written(direction, sizes):
    screen = screened(direction, sizes)
    rows = [row for some in screen_rows(screen, "t", [["?"] * 5] * 8) for row in some]
    pairs = Pairs(EXAMPLES, screen.clean, screen.corrupted, 0.01)
    about = screen_about(screen) | {"direction": direction, "pairs": [[n, name] for n, name in enumerate(EXAMPLES)]}
    record = record_of(work="attribute", direction=direction)
    read = read_screens(record, pairs, read_changes(as_table(rows), pairs, []), [about])
    (back,) = read.by_direction
    place = {key: n for n, key in enumerate(zip(*(getattr(back, c) for c in ("pair", "site", "unit", "position"))))}
    order = [place[key] for key in zip(*(getattr(screen, c) for c in ("pair", "site", "unit", "position")))]
    assert len(back) == len(screen)
    np.testing.assert_allclose(back.score[order], screen.score, atol=1e-9)
    one, other = back.verified, screen.verified
    assert (one.largest, one.others, one.sizes) == (other.largest, other.others, sizes)
    exact = dict(zip(other.index.tolist(), other.exact.tolist(), strict=True))
    inverse = np.argsort(order)
    assert {inverse[n] for n in one.index[:9].tolist()} == set(other.index[:9].tolist())
    for number, value, estimate in zip(inverse[one.index].tolist(), one.exact, one.estimated, strict=True):
        usable = screen.pair[number] != 3 or not sizes
        assert value == pytest.approx(exact[number], abs=1e-9)
        if usable:
            assert estimate == pytest.approx(screen.score[number])
    assert one.missed() == other.missed()
    facts = read.facts()["screens"][direction]
    assert facts["missed_in_sample"] == other.missed()[0]
    edits, means = screen.means()
    best = edits[int(np.argmax(means))]
    assert (facts["top"][0]["site"], facts["top"][0]["position"]) == (str(best.site), best.position)
    assert facts["top"][0]["effect"] == pytest.approx(means.max() / abs(screen.gap.mean()))


def test_parts_hold_every_pair_of_a_shard_once_in_each_direction():
    for shard in (0, 1, 2):
        parts = cut_parts(11, shard, 3, 2, 2, ["denoise", "noise"])
        assert [part.number for part in parts] == list(range(len(parts)))
        for components in (0, 1):
            for direction in ("denoise", "noise"):
                mine = [part.pairs for part in parts if (part.components, part.direction) == (components, direction)]
                assert [pair for some in mine for pair in some] == list(range(shard, 11, 3))
                assert all(len(some) <= 2 for some in mine)


def test_a_run_in_which_no_edit_changed_anything_has_no_q():
    """Rows of controls alone: each position of latents that are never active."""
    control = EditKey("denoise", "resid_post.1", "latent", "random", "3", "2")
    changes = RowChanges((control,), np.zeros(2, dtype=np.int64), np.arange(2), np.ones(2), 2)
    assert _q_values(changes, [], 0.1).shape == (0,)
