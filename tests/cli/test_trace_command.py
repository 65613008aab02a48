"""`saepatch trace`: the library's trace as text, JSON and a page, and its mistakes."""

import json

import pytest
from tiny import tiny_model

import saepatch as sp
from saepatch.cli.main import main

TEXT = " ".join(f"the {animal} sat by the door" for animal in ("cat", "dog", "cow", "pig", "hen", "ant", "bee"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trace")
    model = tiny_model("llama", max_position_embeddings=256)
    model.hf.save_pretrained(folder / "model")
    model.tokenizer.save_pretrained(folder / "model")
    (folder / "document.txt").write_text(f"\ufeff{TEXT}\n", encoding="utf-8")
    return folder


def trace(place, *more):
    return main(
        ["trace", str(place / "document.txt"), "--model", str(place / "model"), "--block", "8", *map(str, more)]
    )


def test_what_is_printed_and_written_is_the_librarys(place, capsys):
    given = ("--k", 1, "--measured", -1, "--answer", "x", "--counter", "y")
    page = place / "trace.html"
    assert trace(place, *given, "--html", page) == 0
    printed = capsys.readouterr().out
    assert trace(place, *given, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    model = sp.load_model(str(place / "model"))
    traced = sp.trace_attention(model, TEXT, 1, block=8, measured=None, answer="x", counter="y")
    assert traced.summary() in printed
    assert "What the last position reads" in page.read_text(encoding="utf-8")
    assert facts["against"]["difference_traced"] == pytest.approx(traced.against.difference_traced)
    assert facts["tokens"] == len(model.encode(TEXT))
    for layer in traced.layers:
        assert facts["layers"][str(layer)]["dropped"] == pytest.approx(float(traced.dropped(layer).mean()))
        assert facts["layers"][str(layer)]["read"] == pytest.approx(traced.read(layer))
    first = facts["most_read"][0]
    share = traced.read(first["layer"])[first["head"], first["first"] // 8]
    assert first["attention"] == pytest.approx(share)
    assert share == max(traced.read(layer)[:, 1:-2].max() for layer in traced.layers)
    tokens = model.encode(TEXT)[first["first"] :]
    assert "".join(model.token_texts(tokens)).startswith(first["begins"])


def test_the_least_number_of_blocks(place, capsys):
    assert trace(place, "--k", 0, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tried"][str(facts["k"])]
    assert facts["against"]["kept"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--answer", "x"], "give both --answer and --counter"),
        (["--k", -1], "k = -1"),
        (["--measured", -2], "measured = -2"),
        (["--answer", "xy", "--counter", "y"], "'xy'"),
        (["--track", "wandb:offline"], "give --html FILE"),
    ],
)
def test_settings_that_make_no_sense(place, capsys, more, message):
    assert trace(place, *more) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_documents_that_cannot_be_traced(place, capsys):
    (place / "empty.txt").write_text("\n")
    (place / "latin.txt").write_bytes(b"caf\xe9")
    (place / "long.txt").write_text(TEXT * 3)
    for name, message in (
        ("none.txt", "cannot read a document"),
        ("empty.txt", "is empty"),
        ("latin.txt", "not UTF-8"),
        ("long.txt", "longer than the context of 256"),
    ):
        assert main(["trace", str(place / name), "--model", str(place / "model")]) == 2
        error = capsys.readouterr().err
        assert message in error, name
        assert error.count("\n") == 1
