"""The table of mutants keeps up with the code: see `python -m mutants`."""

from pathlib import Path

from mutants.table import MUTANTS

ROOT = Path(__file__).parents[2]


def test_every_mutants_text_is_found_once():
    assert {(m.file, m.old): m.found(ROOT) for m in MUTANTS if m.found(ROOT) != 1} == {}


def test_no_mutant_is_listed_twice_and_each_has_tests():
    assert len({(m.file, m.old, m.new) for m in MUTANTS}) == len(MUTANTS) >= 40
    named = {test.partition("::")[0] for m in MUTANTS for test in m.tests}
    assert {name for name in named if not (ROOT / name).exists()} == set()
