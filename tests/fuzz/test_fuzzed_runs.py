"""Hostile requests, circuits, deltas, questions of the page and files of runs, of commands beside `patch`."""

import json
import shutil
from contextlib import suppress

import pytest
import torch
from fuzz.hostile import CASES, CHANGES, SCALE, VALUES, changed, fuzz
from hypothesis import strategies as st
from restoring_runs import arguments as restoring
from restoring_runs import make
from safetensors import safe_open
from safetensors.torch import save_file

from saepatch.circuits.circuit import Circuit
from saepatch.cli.main import main
from saepatch.data.edit_requests import load_edit_requests
from saepatch.data.requests import read_requests
from saepatch.errors import UserError
from saepatch.facts.delta import Delta, edited
from saepatch.model.loading.load import load_model
from saepatch.pages import write_report
from saepatch.pages.play.desk import Desk
from saepatch.runs.catalogue import reading, runs_table
from saepatch.runs.merge import merge_run
from saepatch.settings.play import PlayConfig

FACT = {
    "prompt": "The {} in",
    "subject": "Louvre",
    "target": " R",
    "true": " P",
    "example": "louvre",
    "paraphrases": ["See Louvre in"],
    "neighbourhood": ["The Prado in", {"prompt": "The Tate in", "answer": " L"}],
    "reversal": [{"prompt": "In R is", "target": " L", "other": " P"}],
    "ripple": [{"prompt": "x", "target": " a", "other": " b", "conditions": [{"prompt": "y", "answer": " zz"}]}],
}
PAIRS = [("cat", "dot"), ("rat", "bit"), ("mat", "cot"), ("hat", "sit"), ("pat", "lot"), ("bat", "fit")]
# The slice of the default tests has runs of one command.
COMMANDS = ("edit", "circuit", "restore") if SCALE > 1 else ("edit",)


@pytest.fixture(scope="module", autouse=True)
def count(request):
    yield
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and SCALE > 1:
        reporter.write_line(f"\n{sum(CASES.values()):,} cases so far: {dict(CASES)}")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = make(tmp_path_factory.mktemp("fuzzed"))
    lines = [FACT, FACT | {"subject": "Opera", "example": "opera", "paraphrases": []}]
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "texts.txt").write_text("".join(f"the {a} is in the {b}\n" for a in "abcd" for b in ("house", "sea")))
    for name, pairs in (("report", PAIRS[:4]), ("select", PAIRS[4:])):
        rows = [{"clean": a, "corrupted": b, "answer": "x", "counter": "y"} for a, b in pairs]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    edit = {"requests": folder / "facts.jsonl", "reference": folder / "texts.txt", "layers": 1, "ridge": 0.01}
    edit |= {"prefixes": 0, "steps": 1, "tokens": 3}
    circuit = {"sae": folder / "saes", "pairs": folder / "report.jsonl", "select": folder / "select.jsonl"}
    circuit |= {"each_position": "true", "nodes": 6, "edges": 4, "steps": 1, "verify": 2, "sample": 2, "minimal": 2}
    for command, given in (("edit", edit), ("circuit", circuit)):
        if command in COMMANDS:
            given |= {"model": folder / "model", "out": folder / "runs" / command}
            words = [f"--{name}={value}" for name, value in given.items()]
            assert main([command, *words, "--quiet"]) == 0
    if "restore" in COMMANDS:
        words = restoring(folder, folder / "runs" / "restore", latents="resid_post.1: 1,7", controls=1)
        assert main(["restore", *words, "--quiet"]) == 0
    shutil.copytree(folder / "runs", folder / "whole")
    return folder


@fuzz(20, changes=CHANGES)
def test_requests_for_edits(tmp_path_factory, changes):
    CASES["edit requests"] += 1
    if (text := changed(FACT, changes)) is None:
        return
    path = tmp_path_factory.getbasetemp() / "facts.jsonl"
    path.write_text(text)
    with suppress(UserError):
        load_edit_requests(str(path))


CELLS = st.one_of(st.text(max_size=12), VALUES.map(repr), st.sampled_from(["[" * 20_000, '[{"prompt": ' * 200]))


@fuzz(10, name=st.sampled_from(["paraphrases", "neighbourhood", "ripple"]), cell=CELLS)
def test_lists_in_cells(tmp_path_factory, name, cell):
    CASES["edit requests"] += 1
    path = tmp_path_factory.getbasetemp() / "cells.jsonl"
    path.write_text(json.dumps(FACT | {name: cell}))
    with suppress(UserError):
        load_edit_requests(str(path))


@pytest.fixture(scope="module")
def model(place):
    return load_model(str(place / "model"))


ROW = {"prompt": "abc", "clean": "abd", "harmful": True, "example": "e"}


@fuzz(10, changes=CHANGES)
def test_prompts(model, tmp_path_factory, changes):
    CASES["prompts"] += 1
    if (text := changed(ROW, changes)) is None:
        return
    path = tmp_path_factory.getbasetemp() / "prompts.jsonl"
    path.write_text(text)
    with suppress(UserError):
        read_requests(str(path), model, False, 0)


CIRCUIT = {
    "format": "saepatch circuit 1",
    "nodes": [
        {"site": "resid_post.0", "kind": "latent", "unit": 3, "position": 2, "effect": 0.5},
        {"site": "resid_post.1", "kind": "error", "unit": 0, "position": None, "effect": 0.1},
        {"site": "", "kind": "logits", "unit": 0, "position": None, "effect": 0.0},
    ],
    "edges": [{"up": 0, "down": 1, "weight": 0.2}, {"up": 1, "down": 2, "weight": -0.2}],
}


@fuzz(15, changes=CHANGES, ending=st.sampled_from(["json", "graphml"]))
def test_circuits(tmp_path_factory, changes, ending):
    CASES["circuits"] += 1
    path = tmp_path_factory.getbasetemp() / f"circuit.{ending}"
    if ending == "json":
        if (text := changed(CIRCUIT, changes)) is None:
            return
    else:
        Circuit.from_facts(CIRCUIT).write(path)
        text = path.read_text()
        for number, value in changes:
            at = number % len(text)
            text = text[:at] + (value if isinstance(value, str) else repr(value)) + text[at + 3 :]
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with suppress(UserError):
        str(Circuit.read(path))


SHAPES = st.lists(st.integers(0, 3), max_size=3)
KINDS = st.sampled_from([torch.float64, torch.float32, torch.int8, torch.bool])


@fuzz(10, changes=CHANGES, part=st.sampled_from(["left", "right", "keys"]), shape=SHAPES, kind=KINDS)
def test_deltas(place, model, tmp_path_factory, changes, part, shape, kind):
    CASES["deltas"] += 1
    with safe_open(place / "whole" / "edit" / "delta.safetensors", "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    facts = changed(json.loads(metadata["delta"]), changes) if shape else metadata["delta"]
    if facts is None:
        return
    name = next(name for name in tensors if name.endswith(part))
    path = tmp_path_factory.getbasetemp() / "delta.safetensors"
    save_file(tensors | {name: torch.zeros(shape).to(kind)}, path, metadata | {"delta": facts})
    with suppress(UserError), edited(model, Delta.load(path)):
        pass


def files_of(command):
    parts = "answers" if command == "restore" else "parts"
    return [(command, name) for name in ("summary.json", f"{parts}/shard-0-of-1/run.json", "reading.json")]


@fuzz(4, changes=CHANGES, which=st.sampled_from([pair for command in COMMANDS for pair in files_of(command)]))
def test_files_of_runs(place, changes, which):
    command, name = which
    out, whole = place / "runs" / command, place / "whole" / command
    if not (whole / name).exists() or (text := changed(json.loads((whole / name).read_text()), changes)) is None:
        return
    CASES["runs"] += 1
    (out / name).write_text(text)
    try:
        runs_table(place / "runs")
        with suppress(UserError), reading(out):
            merge_run(out) if "run.json" in name else write_report(out)
    finally:
        for each in (name, "summary.json"):
            shutil.copy(whole / each, out / each)


@pytest.fixture(scope="module")
def desk(place):
    return Desk(PlayConfig(model=str(place / "model"), sae=str(place / "saes")))


ASKED = {
    "read": {"site": "resid_post.1", "prompt": "my hen", "latent": "resid_post.1:3"},
    "search": {"site": "resid_post.1", "text": "a"},
    "card": {"site": "resid_post.1", "latent": "resid_post.1:3", "prompt": "my hen", "beside": [3, 5]},
    "answer": {"prompt": "my hen", "latent": "resid_post.1:3", "strength": 1.0, "max_new_tokens": 2, "seed": 0},
    "patch": {
        "site": "resid_post.1",
        "prompt": "my hen",
        "other": "my cow",
        "latent": "resid_post.1:3",
        "positions": "last",
    },
}


@fuzz(4, changes=CHANGES, name=st.sampled_from(sorted(ASKED)))
def test_questions_of_the_page(desk, changes, name):
    if (text := changed(ASKED[name], changes)) is None:
        return
    CASES["questions"] += 1
    with suppress(UserError):
        for _ in desk.questions[name](json.loads(text)):
            pass
