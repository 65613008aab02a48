"""Hostile settings, files and texts: whatever is given, the answer is a value or a `UserError`.

`make fuzz` runs it whole (more than 20,000 cases); the default tests run a slice of it, the same each time.
"""

import json
import shutil
from contextlib import suppress
from dataclasses import MISSING, fields
from functools import partial
from random import Random
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import yaml
from fuzz.hostile import CASES, CHANGES, NAMES, SCALE, SPECIAL, TEXTS, VALUES, changed, fuzz
from hypothesis import strategies as st
from tiny import save_model_and_sae

from saepatch.cli.main import COMMANDS, main
from saepatch.data.pairs import load_pairs
from saepatch.data.texts import load_texts
from saepatch.dictionaries.latent_set import LatentSet
from saepatch.dictionaries.loading import load_sae
from saepatch.errors import UserError
from saepatch.model.sites import Site
from saepatch.pages import write_report
from saepatch.records.documents import bounded_yaml
from saepatch.records.rows import read_about
from saepatch.report import read_page
from saepatch.runs.catalogue import reading, runs_table
from saepatch.runs.interpret import read_positions
from saepatch.runs.merge import merge_run
from saepatch.settings.checks import check_values
from saepatch.settings.mixins import check_shard
from saepatch.tracking.open import read_spec
from training.config import SAEConfig, TrainingConfig


@pytest.fixture(scope="module", autouse=True)
def count(request):
    yield
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and SCALE > 1:
        reporter.write_line(f"\n{sum(CASES.values()):,} cases: {dict(CASES)}")


WHOLE = [-1, 0, 1, 2, 3, 100, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 10**4200]
REAL = [-1.0, -0.0, 0.0, 0.5, 1.0, 1e308, 5e-324, float("inf"), float("nan"), *WHOLE]
POOLS: dict[Any, list[Any]] = {int: WHOLE, float: REAL, bool: [False, True], str: SPECIAL + NAMES, NoneType: [None]}
CONFIGS = [*(config for config, _ in COMMANDS.values()), TrainingConfig, SAEConfig]


def of_type(hint: Any, chance: Random) -> Any:
    """A value of a setting's type, as the parser lets it through."""
    if hint in POOLS:
        return chance.choice(POOLS[hint])
    if get_origin(hint) is Literal:
        return chance.choice(get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return of_type(chance.choice(get_args(hint)), chance)
    if get_origin(hint) is list:
        return [of_type(get_args(hint)[0], chance) for _ in range(chance.randrange(3))]
    return None


@fuzz(70, seed=st.integers(0, 2**32))
def test_settings(seed):
    """A few settings of a command (of many hostile values, one is nearly always refused at once)."""
    CASES["settings"] += 1
    chance = Random(seed)
    config = chance.choice(CONFIGS)
    hints = get_type_hints(config)
    values = {f.name: chance.choice(NAMES) for f in fields(config) if f.default is f.default_factory is MISSING}
    for field in chance.sample(fields(config), min(3, len(fields(config)))):
        values[field.name] = of_type(hints[field.name], chance) if chance.random() < 0.9 else None
    with suppress(UserError):
        check_values(config, values)
        config(**values)


FRAGMENTS = [
    "a",
    ": ",
    "\n",
    "  ",
    "- ",
    "&a ",
    "*a",
    "[",
    "]",
    "{",
    "}",
    ",",
    "'",
    '"',
    "!!int ",
    "<<: *a",
    "|",
    "#",
    "1e3",
]


@fuzz(50, text=st.one_of(st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join), st.text(max_size=40)))
def test_yaml(text):
    CASES["yaml"] += 1
    with suppress(yaml.YAMLError):
        bounded_yaml(text, yaml.safe_load)


def mutations(text: str) -> st.SearchStrategy:
    """A text with pieces cut out, doubled or put in."""
    places = st.tuples(st.integers(0, len(text)), st.integers(0, 8), st.one_of(TEXTS, st.just(""), st.just(text[:30])))
    return st.lists(places, min_size=1, max_size=3).map(partial(_mutated, text))


def _mutated(text: str, places: list[tuple[int, int, str]]) -> str:
    for start, length, new in places:
        text = text[:start] + new + text[start + length :]
    return text


ROW = {"clean": "a b", "corrupted": "a c", "answer": " x", "counter": " y", "text": "t", "example": "e"}
CSV = ",".join(ROW) + "\n" + ",".join(ROW.values()) + '\n"a, b",b,c,d,e,f\n'
FILES = {
    ".jsonl": json.dumps(ROW) + "\n" + json.dumps(ROW) + "\n",
    ".json": json.dumps([ROW, ROW]),
    ".csv": CSV,
    ".txt": "one\ntwo\n",
    ".parquet": "PAR1" + CSV + "PAR1",
}


@fuzz(30, case=st.sampled_from(sorted(FILES)).flatmap(lambda end: st.tuples(st.just(end), mutations(FILES[end]))))
def test_rows_of_mutated_files(tmp_path_factory, case):
    CASES["files"] += 1
    ending, text = case
    path = tmp_path_factory.getbasetemp() / f"rows{ending}"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    for read in (load_pairs, load_texts):
        with suppress(UserError):
            read(str(path))


@fuzz(10, row=st.dictionaries(st.sampled_from(sorted(ROW)), VALUES), ending=st.sampled_from([".jsonl", ".json"]))
def test_rows_of_other_types(tmp_path_factory, row, ending):
    CASES["rows"] += 1
    path = tmp_path_factory.getbasetemp() / f"retyped{ending}"
    try:
        text = json.dumps(ROW | row)
    except ValueError:  # Python writes no integer of so many digits
        return
    path.write_text(f"[{text}]" if ending == ".json" else text)
    for read in (load_pairs, load_texts):
        with suppress(UserError):
            read(str(path))


FORMS = [Site.parse, LatentSet.parse, read_positions, read_spec, check_shard]


@fuzz(40, form=st.sampled_from(FORMS), text=st.one_of(TEXTS, *map(mutations, NAMES)))
def test_forms(form, text):
    CASES["forms"] += 1
    with suppress(UserError):
        form(text)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzzed")
    save_model_and_sae(folder)
    pair = ROW | {"clean": "abc", "corrupted": "adc", "answer": "x", "counter": "y"}
    (folder / "pairs.jsonl").write_text(json.dumps(pair))
    arguments = ["--model", folder / "model", "--sae", folder / "saes", "--pairs", folder / "pairs.jsonl"]
    out = folder / "runs" / "one"
    assert main(["patch", *map(str, arguments), "--latents", "3;5", "--quiet", "--out", str(out)]) == 0
    shutil.copytree(out, folder / "whole")
    return folder


@fuzz(6, changes=CHANGES)
def test_metadata_of_dictionaries(run, tmp_path_factory, changes):
    CASES["metadata"] += 1
    folder, whole = tmp_path_factory.getbasetemp() / "sae", run / "saes" / "resid_post.1"
    if not folder.exists():
        shutil.copytree(whole, folder)
    if (text := changed(json.loads((whole / "cfg.json").read_text()), changes)) is None:
        return
    (folder / "cfg.json").write_text(text)
    with suppress(UserError):
        load_sae(str(folder))


@fuzz(4, changes=CHANGES, name=st.sampled_from(["summary.json", "parts/shard-0-of-1/run.json", "reading.json"]))
def test_files_of_runs(run, changes, name):
    CASES["runs"] += 1
    out, whole = run / "runs" / "one", run / "whole"
    if (text := changed(json.loads((whole / name).read_text()), changes)) is None:
        return
    (out / name).write_text(text)
    try:
        runs_table(run / "runs")
        with suppress(UserError), reading(out):
            merge_run(out) if "run.json" in name else write_report(out)
    finally:
        shutil.copy(whole / name, out / name)
        shutil.copy(whole / "summary.json", out / "summary.json")


@fuzz(10, place=st.integers(0, 100_000), new=st.binary(min_size=1, max_size=8))
def test_damaged_parts(run, tmp_path_factory, place, new):
    CASES["parts"] += 1
    whole = (run / "whole/parts/shard-0-of-1/part-00000.parquet").read_bytes()
    at = place % len(whole)
    path = tmp_path_factory.getbasetemp() / "part.parquet"
    path.write_bytes(whole[:at] + new + whole[at + len(new) :])
    about = read_about(path)
    assert about is None or isinstance(about, dict)


PAGE = {
    "block": "Page",
    "title": "t",
    "lead": "l",
    "sections": [
        {
            "block": "Section",
            "title": "s",
            "blocks": [
                {
                    "block": "Table",
                    "columns": ["a"],
                    "rows": [[1.5]],
                    "formats": {"block": "mapping", "items": [["a", ".1f"]]},
                }
            ],
        }
    ],
}


@fuzz(10, changes=CHANGES)
def test_kept_pages(changes):
    CASES["pages"] += 1
    if (text := changed(PAGE, changes)) is not None:
        with suppress(UserError):
            read_page(json.loads(text))
