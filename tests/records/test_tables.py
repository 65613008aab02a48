"""The one printer of tables."""

from saepatch.records.tables import text_table


def test_columns_are_as_wide_as_what_they_hold():
    text = text_table(["what", "n", "share"], [["a long name", 3, "0.25"], ["b", 1200, "–"]])
    assert text.splitlines() == ["what            n  share", "a long name     3   0.25", "b            1200      –"]
    text = text_table(["name", "path", "n"], [["x", "runs/one", "1.0"], ["yy", "r", "001"]], left=2)
    assert text.splitlines() == [
        "name  path        n",
        "x     runs/one  1.0",
        "yy    r         001",
    ]  # numbers stay as written


def test_wide_characters_take_two_columns():
    lines = text_table(["what", "n"], [["日本", 1], ["abcd", 22]]).splitlines()
    assert lines == ["what   n", "日本   1", "abcd  22"]


def test_empty_tables_and_cells():
    assert text_table([], []) == ""
    assert text_table(["what", "n"], []) == "what  n"
    assert text_table([], [["a", 1], ["bb", 22]]) == "a    1\nbb  22"
    assert text_table(["", "n"], [["", ""], ["a"]]).splitlines() == ["   n", "", "a"]
    assert text_table([], [[]]) == ""
    assert text_table(["what", "n"], [["a", None]]).splitlines()[1] == "a     –"
