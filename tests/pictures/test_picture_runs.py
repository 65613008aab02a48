"""Pictures by the command line: pairs in a file, `patch` and `attribute`, the report."""

import base64
import io
import json
import re

import pytest
from PIL import Image
from tiny import random_sae

from pictures.tiny_vision import FAMILIES, picture, random_weights
from saepatch.cli.main import main
from saepatch.data.batches import batch_pairs
from saepatch.data.pairs import load_pairs
from saepatch.errors import UserError
from saepatch.model.loading.load import load_model
from saepatch.model.positions import At
from saepatch.records.rows import read_rows
from saepatch.splicing.splice import whole_prompt

pytestmark = [pytest.mark.whole, pytest.mark.slow]
ANSWERS = {"answer": "x", "counter": "y"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A saved model with its processor, a dictionary, and a file of pairs beside the folder of its pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    config, processor = FAMILIES["gemma3"]()
    random_weights(config).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    sae = random_sae(seed=1)
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    sae.save_model(folder / "saes" / "resid_post.1")
    (folder / "shown").mkdir()
    for name in ("red", "blue", "green"):
        picture(folder / "shown", name, name)
    rows = [
        {"clean": "a <image> b", "corrupted": "a <image> b", "clean_image": f"shown/{one}.png",
         "corrupted_image": f"shown/{other}.png"} | ANSWERS
        for one, other in (("red", "blue"), ("green", "red"))
    ]  # fmt: skip
    rows.append({"clean": "a <image> b", "corrupted": "c <image> b", "image": "shown/red.png"} | ANSWERS)
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def run(place, command, *more):
    given = ["--model", place / "model", "--sae", place / "saes", "--pairs", place / "pairs.jsonl", "--quiet"]
    assert main([command, *map(str, given), *more, "--out", str(place / command)]) == 0
    out = place / command
    return (out / "report.html").read_text(encoding="utf-8"), read_rows(out / "results.parquet")


def test_attribution_is_drawn_over_the_pictures(place):
    page, rows = run(place, "attribute", "--positions", "image", "--verify", "4", "--sample", "2")
    places = {row["position"] for row in rows}
    assert places == set(map(str, range(6, 10)))  # the image tokens
    uris = re.findall(r'href="data:image/jpeg;base64,([^"]+)"', page)
    assert uris
    with Image.open(io.BytesIO(base64.b64decode(uris[0]))) as shown:
        assert shown.size == (24, 16)
        assert shown.convert("RGB").getpixel((20, 12)) == (255, 255, 255)
    assert "Over the pictures" in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page)  # the page loads nothing


@pytest.mark.slow
def test_patching_a_box_between_two_pictures_in_both_directions(place):
    box = ["--positions", "image: 0,0,12,8", "--direction", "both", "--component", "stream", "--site", "resid_post.1"]
    _, rows = run(place, "patch", *box, "--each_position")
    assert {row["position"] for row in rows} == {"6"}
    assert {row["direction"] for row in rows} == {"denoise", "noise"}


def test_what_cannot_be_is_refused_in_a_line(place):
    model = load_model(str(place / "model"))
    lone, wide = str(place / "shown" / "red.png"), picture(place / "shown", "wide", size=(48, 16))

    def refused(match, row):
        path = place / "odd.jsonl"
        path.write_text(json.dumps(ANSWERS | {"clean": "a <image> b", "corrupted": "a <image> b"} | row))
        with pytest.raises(UserError, match=match):
            batch_pairs(model, load_pairs(str(path)))

    refused("has a picture's mark but no picture", {"clean": f"a {model.pictures.mark} b", "corrupted": "abcd"})
    refused("cannot read picture", {"image": "nosuch.png"})
    refused("cannot read picture", {"image": "pairs.jsonl"})
    refused("has 0 marks of pictures, but 1", {"clean": "ab", "corrupted": "ac", "image": lone})
    refused("has 1 marks of pictures, but 2", {"image": [lone, wide]})
    refused("tokens of its prompts .4 and 0. do not corr", {"corrupted": "abcdefghijklm", "clean_image": lone})
    refused("its image is 3, not a file", {"image": 3})
    (prompt,) = {load_pairs(str(place / "pairs.jsonl"))[0].clean}
    with pytest.raises(UserError, match="not for generation"):
        model.generate([prompt])
    tokens = model.tokenize([prompt])
    with pytest.raises(UserError, match="holds the centre of no part"):
        whole_prompt(model, tokens).select(At.image((0, 0, 2, 2)))
    with pytest.raises(UserError, match="there is no picture 1"):
        whole_prompt(model, tokens).select(At.image(picture=1))
    with pytest.raises(UserError, match="is empty"):
        At.image((3, 0, 3, 4))
    with pytest.raises(UserError, match="prompts without pictures"):
        whole_prompt(model, model.tokenize(["text"])).select(At.image())
