"""Long sweeps: cut anywhere, stopped anywhere, resumed: the same rows, each once."""

import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny import random_sae, tiny_model

from saepatch.cli.main import main
from saepatch.data.pairs import PromptPair, load_pairs
from saepatch.dictionaries.loading import load_sae
from saepatch.engine.components import Edit, EditPart, ErrorTerm, LatentUnits
from saepatch.engine.corruptions import GaussianNoise, Mean, Zero
from saepatch.engine.metrics import logit_difference, read_metric
from saepatch.errors import UserError
from saepatch.measure.attribution import FirstOrder, GradDrop, IntegratedGradients, attribute
from saepatch.measure.patching import patch_components, patch_edits
from saepatch.measure.results.screen import Verification
from saepatch.model.loading.load import load_model
from saepatch.model.positions import At
from saepatch.model.sites import Site
from saepatch.records.rows import read_about, read_rows
from saepatch.runs.interpret import distinct_names, read_pairs, read_positions, read_shard
from saepatch.runs.parts import cut_parts, edit_facts, read_edit
from saepatch.runs.progress import Check, stoppable
from saepatch.settings.sweeps import PatchConfig

pytestmark = pytest.mark.whole

KEY = ("example", "site", "component", "latent", "role", "position", "token", "direction", "metric", "method", "task",
       "corruption")  # fmt: skip
VALUES = ("clean", "corrupted", "patched", "effect")


def rows_of(out):
    """Values by key; a key that occurs twice fails."""
    rows = read_rows(Path(out) / "results.parquet")
    found = {tuple(row[k] for k in KEY): [row[v] for v in VALUES] for row in rows}
    assert len(found) == len(rows) > 0
    return found


def assert_same_rows(one, other):
    assert one.keys() == other.keys()
    keys = list(one)
    np.testing.assert_allclose([one[k] for k in keys], [other[k] for k in keys], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, a dictionary for each of two sites, and pairs in a file."""
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_model()
    model.hf.save_pretrained(folder / "model")
    model.tokenizer.save_pretrained(folder / "model")
    for layer in (0, 1):
        sae = random_sae(seed=layer)
        sae.cfg.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
        sae.save_model(folder / "saes" / f"resid_post.{layer}")
    lines = [
        {"clean": f"the {a} sat{x}", "corrupted": f"the {b} sat{x}", "answer": "x", "counter": "y"}
        for a, b in (("cat", "dog"), ("cow", "pig"), ("big bear", "red deer"))
        for x in ("", " by", " down", " up")
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines[:11])))
    return folder


def arguments(place, out, *more):
    given = ("--model", place / "model", "--sae", place / "saes", "--pairs", place / "pairs.jsonl", "--out", out)
    return [*map(str, given), "--quiet", *more]


def run(command, place, out, *more):
    assert main([command, *arguments(place, out, *more)]) == 0
    return rows_of(out)


def patch(place, out, *more):
    return run("patch", place, out, *more)


def failed(capsys, *given):
    capsys.readouterr()
    assert main([str(each) for each in given]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def test_rows_are_those_of_one_sweep_and_the_summary_is_theirs(place, tmp_path, capsys):
    """Through the command line, against the library called directly."""
    out = tmp_path / "run"
    rows = patch(place, out, "--site", "resid_post.1", "--latents", "3;5,7", "--part", "3", "--controls", "2")
    printed = capsys.readouterr().out
    model, dictionary = load_model(str(place / "model")), load_sae(str(place / "saes"), "resid_post.1")
    _, pairs = read_pairs(PatchConfig(pairs=str(place / "pairs.jsonl")))
    site = Site(1)
    effects = patch_components(model, dictionary, pairs, [Edit(site, (3,)), Edit(site, (5, 7))])
    for column, latent in enumerate(("3", "5,7")):
        mine = {key[0]: values for key, values in rows.items() if key[3] == latent and key[4] == "given"}
        assert mine.keys() == {pair.example for pair in pairs}  # with a row where it changes nothing, too
        for number, pair in enumerate(pairs):
            expected = [effects.clean[number], effects.corrupted[number], effects.patched[number, column]]
            np.testing.assert_allclose(mine[pair.example][:3], expected, atol=1e-5)
    summary = json.loads((out / "summary.json").read_text())
    found = {line["latent"]: line for line in summary["top"]["denoise"]}
    for column, latent in enumerate(("3", "5,7")):
        assert found[latent]["effect"]["value"] == pytest.approx(effects.of(column).value, abs=1e-5)
        low = effects.of(column).low  # NaN where so few pairs moved that there is no interval
        assert found[latent]["effect"]["low"] == (None if np.isnan(low) else pytest.approx(low, abs=1e-5))
        assert found[latent]["pairs"] == effects.ran[:, column].sum()
        q = float(effects.q_values()[column])
        assert found[latent]["q"] == (None if np.isnan(q) else pytest.approx(q, rel=1e-2))
        assert {"random_controls", "matched_controls"} <= found[latent].keys()
        assert f"resid_post.1 {latent}" in printed
    assert summary["pairs"] == 11
    assert summary["clean"] == pytest.approx(effects.clean.mean(), abs=1e-5)
    assert "11 pairs (1 with a gap below 0.01)" in printed


SWEEPS = {
    "every latent at two sites": (),
    "groups with controls": ("--site", "resid_post.0", "--latents", "3;5,7"),
    "each position": ("--site", "resid_post.1", "--latents", "3;5,7", "--each_position", "--controls", "2"),
    "heads": ("--component", "head", "--positions", "-3"),
    "streams, from the right": ("--component", "stream", "--each_position", "--align", "right"),
    "error terms": ("--component", "error", "--positions", "at: sat"),
    "latents of each site": ("--latents", "resid_post.1: 3,7; 5 | resid_post.0: 3", "--controls", "1"),
    "noise": ("--latents", "resid_post.0: 3; 5,7", "--corruption", "noise: sat", "--controls", "1"),
    "mean": ("--component", "stream", "--site", "resid_post.0", "--corruption", "mean", "--each_position"),
}


MORE_SWEEPS = {
    "heads",
    "error terms",
    "groups with controls",
    "each position",
    "streams, from the right",
    "latents of each site",
    "mean",
}


@pytest.mark.parametrize(
    "sweep", [pytest.param(name, marks=pytest.mark.slow) if name in MORE_SWEEPS else name for name in SWEEPS]
)
def test_rows_do_not_depend_on_how_pairs_are_cut(place, tmp_path, capsys, sweep):
    options = (*SWEEPS[sweep], "--direction", "both", "--n", "5")
    whole = patch(place, tmp_path / "whole", *options, "--part", "64")
    for shard in (1, 0):
        cut = ("--shard", f"{shard}/2", "--part", "2")
        assert main(["patch", *arguments(place, tmp_path / "cut", *options, *cut)]) == 0
    capsys.readouterr()
    assert main(["merge", str(tmp_path / "cut")]) == 0
    assert_same_rows(whole, rows_of(tmp_path / "cut"))
    one, other = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "cut"))
    for direction in ("denoise", "noise"):
        key = lambda line: (line["site"], line["latent"], line["position"])  # noqa: E731
        effects = [{key(line): line["effect"]["value"] for line in s["top"][direction]} for s in (one, other)]
        for name in effects[0].keys() & effects[1].keys():
            assert effects[0][name] == pytest.approx(effects[1][name], abs=1e-4)
    positions = {key[5] for key in whole}
    assert {"heads": "-3", "error terms": "At(text='sat', occurrence=-1)"}.get(
        sweep, next(iter(positions))
    ) in positions
    if "--each_position" in options:
        assert all(key[6] for key in whole)  # the token there


CORRUPTIONS = {"noise: sat": "GaussianNoise(subject=At(text='sat'", "zero": "Zero(", "mean": "Mean("}


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["mean", *(pytest.param(text, marks=pytest.mark.slow) for text in ("noise: sat", "zero"))]
)
def test_corrupted_runs_are_made_as_the_library_makes_them(place, tmp_path, text):
    model, dictionary = load_model(str(place / "model")), load_sae(str(place / "saes"), "resid_post.1")
    _, pairs = read_pairs(PatchConfig(pairs=str(place / "pairs.jsonl"), n=6))
    mean = Mean.over(model, dictionary, model.tokenize([pair.clean for pair in pairs]), by_position=False)
    corruption = {"noise": GaussianNoise(At("sat"), seed=3), "zero": Zero(), "mean": mean}[text.split(":")[0]]
    options = ("--site", "resid_post.1", "--corruption", text, "--seed", "3", "--direction", "both")
    options += ("--n", "6", "--part", "4")
    rows = patch(place, tmp_path / "patch", *options)
    screened = run("attribute", place, tmp_path / "attribute", *options, "--verify", "2", "--sample", "2")
    found = {key[:1] + key[2:6] + key[7:8]: values for key, values in rows.items()}
    tokens = {pair.example: [model.tokenizer.decode([t]) for t in model.encode(pair.clean)] for pair in pairs}
    for key in [*rows, *screened]:
        assert key[11].startswith(CORRUPTIONS[text])
        assert key[6] == "" if key in rows else tokens[key[0]][int(key[5])]  # the clean prompt is what is run
    for direction in ("denoise", "noise"):
        swept = patch_components(model, dictionary, pairs, direction=direction, corruption=corruption)
        for row in swept.rows("pairs"):
            values = found.pop((row.example, "latent", row.latent, "single", "all", direction))
            np.testing.assert_allclose(values[:3], [row.clean, row.corrupted, row.patched], atol=1e-4)
        screen = attribute(model, dictionary, pairs, direction=direction, corruption=corruption)
        for row in screen.rows("pairs"):
            token = tokens[row.example][int(row.position)]
            key = tuple({"token": token, "corruption": str(corruption)}.get(k, getattr(row, k)) for k in KEY)
            np.testing.assert_allclose(screened[key][:3], [row.clean, row.corrupted, row.patched], atol=1e-4)
    assert not found


MARGIN = """
def margin(logits, batch):
    rows = range(len(batch))
    return logits[rows, batch.answer] - logits.mean(-1)
"""


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("patch", "kl_divergence"),
        ("attribute", "metrics_of_test_runs:margin"),
        pytest.param("patch", "metrics_of_test_runs:margin", marks=pytest.mark.slow),
        pytest.param("attribute", "kl_divergence", marks=pytest.mark.slow),
    ],
)
def test_metrics_by_name_and_of_ones_own(place, tmp_path, capsys, monkeypatch, command, name):
    """Through the command line, both directions and two parts, against the library called directly."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "metrics_of_test_runs", raising=False)
    Path("metrics_of_test_runs.py").write_text(MARGIN)
    given = ("--site", "resid_post.1", "--metric", name, "--direction", "both", "--part", "6", "--min_gap", "1e-9")
    given += ("--latents", "3;5,7", "--controls", "0") if command == "patch" else ("--verify", "0", "--sample", "0")
    rows = run(command, place, tmp_path / "run", *given)
    model, dictionary = load_model(str(place / "model")), load_sae(str(place / "saes"), "resid_post.1")
    _, pairs = read_pairs(PatchConfig(pairs=str(place / "pairs.jsonl")))
    metric = read_metric(name)
    for direction in ("denoise", "noise"):
        options = {"metric": metric, "direction": direction, "min_gap": 1e-9}
        if command == "patch":
            edits = [Edit(Site(1), units, role="given") for units in ((3,), (5, 7))]
            found = patch_components(model, dictionary, pairs, edits, **options)
        else:
            found = attribute(model, dictionary, pairs, **options)
        expected = found.rows("pairs")
        assert {row.metric for row in expected} == {name.rpartition(":")[2]}
        here = {key: values for key, values in rows.items() if key[7] == direction}
        assert len(here) == len(expected) > 0
        by_node = {(key[0], key[2], key[3], key[5]): values for key, values in here.items()}
        for row in expected:
            values = by_node[row.example, row.component, row.latent, row.position]
            np.testing.assert_allclose(values[:3], [row.clean, row.corrupted, row.patched], rtol=1e-3, atol=1e-5)
        if name == "kl_divergence":
            assert max(abs(values[0]) for values in here.values()) < 1e-9 < min(values[1] for values in here.values())
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["settings"]["metric"] == name
    if ":" in name:  # parts of a metric that has changed since do not mix
        monkeypatch.delitem(sys.modules, "metrics_of_test_runs")
        Path("metrics_of_test_runs.py").write_text(MARGIN + "# changed\n")
        error = failed(capsys, command, *arguments(place, tmp_path / "run", *given))
        assert "holds a run that differs in metric's source" in error


def test_a_run_is_not_mixed_with_another(place, tmp_path, capsys):
    out = tmp_path / "run"
    options = ("--site", "resid_post.1", "--latents", "3", "--controls", "0", "--part", "4")
    patch(place, out, *options)
    command = ["patch", *arguments(place, out, *options)]
    told = failed(capsys, *command, "--seed", 1)
    assert "seed (0 there, 1 now): check that, give another --out, or remove that folder" in told
    assert "latents ('3' there, '4' now)" in failed(capsys, *command, "--latents", 4)
    assert "shards (1 there, 2 now)" in failed(capsys, *command, "--shard", "0/2")
    copy = tmp_path / "pairs.jsonl"
    lines = (place / "pairs.jsonl").read_text()
    copy.write_text(lines)
    other = ["patch", *arguments(place, tmp_path / "other", *options), "--pairs", copy]
    assert main([str(each) for each in other]) == 0
    copy.write_text(lines.replace("cat", "rat"))
    assert "pairs' texts" in failed(capsys, *other)
    (part := out / "parts/shard-0-of-1/part-00000.parquet").write_bytes(
        (tmp_path / "other/parts/shard-0-of-1/part-00000.parquet").read_bytes()
    )
    assert "belongs to another run" in failed(capsys, *command)
    part.write_bytes(b"PAR1 and no more")  # damaged: worked through again
    assert main(["patch", *arguments(place, out, *options), "--batch_size", "2"]) == 0
    assert read_about(part)["pairs"][0][0] == 0
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/results.parquet").touch()
    assert "results of another command" in failed(capsys, "patch", *arguments(place, tmp_path / "demo"))


@pytest.mark.parametrize(
    "method",
    ["integrated-gradients", *(pytest.param(name, marks=pytest.mark.slow) for name in ("first-order", "graddrop"))],
)
def test_attribute(place, tmp_path, capsys, method):
    """The command writes the rows of the library's screens, verified ones among them."""
    out = tmp_path / "run"
    command = [
        "attribute",
        *arguments(place, out, "--site", "resid_post.0,resid_post.1", "--direction", "both", "--n", "4"),
    ]
    more = ("--min_gap", "0.1", "--method", method, "--steps", "3", "--verify", "5", "--sample", "4")
    assert main([*command, *more]) == 0
    printed = capsys.readouterr().out
    model, pairs = load_model(str(place / "model")), load_pairs(str(place / "pairs.jsonl"), n=4)
    dictionaries = [load_sae(str(place / "saes"), f"resid_post.{layer}") for layer in (0, 1)]
    by_name = {"first-order": FirstOrder(), "integrated-gradients": IntegratedGradients(3), "graddrop": GradDrop()}
    found = rows_of(out)
    summary = json.loads((out / "summary.json").read_text())
    tokens = {pair.example: [model.encode(pair.clean), model.encode(pair.corrupted)] for pair in pairs}
    total = 0
    for side, direction in enumerate(("noise", "denoise")):
        screen = attribute(
            model, dictionaries, pairs, direction=direction, method=by_name[method], verify=5, sample=4, min_gap=0.1
        )
        assert screen.summary() in printed
        for row in screen.rows("pairs"):
            token = model.tokenizer.decode([tokens[row.example][side][int(row.position)]])
            values = found[tuple({"token": token}.get(key, getattr(row, key)) for key in KEY)]
            expected = [getattr(row, value) for value in VALUES]
            np.testing.assert_allclose(values, expected, atol=1e-5, rtol=1e-4)
            total += 1
        figures = summary["screens"][direction]
        assert figures["nodes"] == len(screen)
        assert figures["pearson"] == pytest.approx(screen.verified.pearson(), abs=1e-4)
        assert figures["spearman_random"] == pytest.approx(screen.verified.spearman(True), abs=1e-4, nan_ok=True)
        missed = [figures["missed_in_sample"], figures["missed_share_at_most"], figures["missed_at_most"]]
        assert missed == pytest.approx(screen.verified.missed())
        best = screen.top(1)[0]
        first = figures["top"][0]
        assert (first["site"], first["position"]) == (str(best.site), best.position)
        edits, means = screen.means()
        assert first["effect"] == pytest.approx(
            means[edits.index(best)] / (abs(screen.gap.mean()) if method == "graddrop" else screen.gap.mean()), rel=1e-3
        )
    assert total == len(found) == summary["rows"]
    assert yaml.safe_load((out / "config.yaml").read_text())["method"] == method
    assert "command ('attribute' there, 'patch' now)" in failed(capsys, "patch", *arguments(place, out))


@pytest.mark.slow
def test_a_screen_does_not_depend_on_how_pairs_are_cut(place, tmp_path, capsys):
    """Estimates do not; each part has exact rows of its own, and the summary is that of all of them together."""
    options = ("--direction", "both", "--steps", "2", "--n", "7", "--corruption", "noise: sat")
    whole = run("attribute", place, tmp_path / "whole", *options, "--verify", "0", "--sample", "0")
    out = tmp_path / "cut"
    for shard in (1, 0):
        cut = ("--shard", f"{shard}/2", "--part", "2", "--verify", "3", "--sample", "5")
        assert main(["attribute", *arguments(place, out, *options, *cut)]) == 0
    capsys.readouterr()
    assert main(["merge", str(out)]) == 0
    printed = capsys.readouterr().out
    rows = rows_of(out)
    assert_same_rows(whole, {key: values for key, values in rows.items() if key[9] != "exact"})
    one, other = (json.loads((tmp_path / name / "summary.json").read_text())["screens"] for name in ("whole", "cut"))
    model = load_model(str(place / "model"))
    dictionaries = [load_sae(str(place / "saes"), f"resid_post.{layer}") for layer in (0, 1)]
    pairs = load_pairs(str(place / "pairs.jsonl"), n=7)
    place_of = {pair.example: number for number, pair in enumerate(pairs)}
    components = [*map(LatentUnits, dictionaries), *map(ErrorTerm, dictionaries)]
    for direction, sign, base in (("denoise", 1, 1), ("noise", -1, 0)):
        mine = {key: sign * (values[2] - values[base]) for key, values in rows.items() if key[7] == direction}
        top, random = ([key for key in mine if key[4] == role] for role in ("top", "random"))
        assert (len(top), len(random)) == (4 * 3, 4 * 5)
        by_node = {key[:4] + key[5:6]: change for key, change in mine.items() if key[4] == "single"}
        estimate = {key: by_node[key[:4] + key[5:6]] for key in top + random}
        threshold, most = min(abs(mine[key]) for key in top), 0
        for part in {(shard, half) for shard in (0, 1) for half in (0, 1)}:
            inside = {name for name, number in place_of.items() if (number % 2, number // 4) == part}
            here = [key for key in estimate if key[0] in inside]
            drawn = np.array([threshold, *(mine[key] for key in random if key[0] in inside)])
            others = sum(key[0] in inside for key in by_node) - 3
            most += Verification(np.arange(6), drawn, drawn, 1, others).missed(level=1 - 0.05 / 4)[2]
            sizes = {role: [abs(estimate[key]) for key in here if key[4] == role] for role in ("top", "random")}
            assert (len(sizes["top"]), len(sizes["random"])) == (3, 5)
            assert max(sizes["random"]) <= min(sizes["top"])
        edits = [
            (place_of[example], Edit(Site.parse(site), (int(latent or 0),), int(position), kind))
            for example, site, kind, latent, _, position, *_ in top + random
        ]
        again = patch_edits(model, components, pairs, edits, direction=direction, corruption=GaussianNoise(At("sat")))
        np.testing.assert_allclose(again, [rows[key][2] for key in top + random], atol=1e-4)
        before, figures = one[direction], other[direction]
        assert [line | {"effect": 0} for line in figures["top"]] == [line | {"effect": 0} for line in before["top"]]
        np.testing.assert_allclose(*([line["effect"] for line in each["top"]] for each in (before, figures)), atol=1e-5)
        assert figures["nodes"] == before["nodes"] == len(by_node)
        assert "pearson" not in before
        for name, keys in (("pearson", top + random), ("pearson_random", random)):
            expected = np.corrcoef([estimate[key] for key in keys], [mine[key] for key in keys])[0, 1]
            assert figures[name] == pytest.approx(expected, abs=1e-4)
        left = len(by_node) - 32
        assert figures["missed_in_sample"] == sum(abs(mine[key]) >= threshold for key in random)
        assert figures["missed_at_most"] == pytest.approx(left * figures["missed_share_at_most"]) == most
        assert f"of the {left} nodes that were not run" in printed
    assert printed.count("from each of 4 parts of") == 2


def test_settings_that_turn_out_not_to_work_are_not_in_the_way_of_others(place, tmp_path, capsys):
    command = ["attribute", *arguments(place, tmp_path / "run", "--site", "resid_post.1", "--n", "2")]
    assert "answer_rank has no gradient" in failed(capsys, *command, "--metric", "answer_rank")
    assert main([*command, "--metric", "probability"]) == 0


def test_config_yaml_reproduces_a_run(place, tmp_path):
    out = tmp_path / "run"
    options = ("--site", "resid_post.0", "--latents", "3,5;7", "--controls", "1", "--positions", "-2")
    whole = patch(place, out, *options)
    assert yaml.safe_load((out / "config.yaml").read_text())["positions"] == "-2"
    assert main(["patch", "--config", str(out / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert_same_rows(whole, rows_of(tmp_path / "again"))


def test_merge_says_what_is_missing(place, tmp_path, capsys):
    out = tmp_path / "run"
    options = ("--site", "resid_post.1", "--latents", "3", "--part", "1", "--direction", "both")
    assert "there is no run" in failed(capsys, "merge", out)
    assert main(["patch", *arguments(place, out, *options, "--shard", "1/3")]) == 0
    assert "saepatch merge" in capsys.readouterr().out
    for number in (0, 3, 4, 5):
        (out / f"parts/shard-1-of-3/part-{number:05d}.parquet").unlink()
    told = failed(capsys, "merge", out)
    assert "shard 0 was never started; shard 1 lacks parts 0, 3-5 of 8; shard 2 was never started" in told
    config = out / "parts/shard-1-of-3/config.yaml"
    assert f"To finish: saepatch patch --config {config} --shard 0/3; saepatch patch --config {config};" in told
    for more in (("--shard", "0/3"), (), ("--shard", "2/3")):  # as it says
        assert main(["patch", "--config", str(config), *more]) == 0
    record = out / "parts/shard-2-of-3/run.json"
    kept = record.read_text()
    record.write_text(kept.replace('"role": "matched"', '"role": "random"'))
    assert "drew different controls" in failed(capsys, "merge", out)
    record.write_text(kept)
    assert main(["merge", str(out)]) == 0
    record.write_text("{")
    assert "cannot read" in failed(capsys, "merge", out)


def test_what_ran_nowhere_has_no_effect_and_pairs_without_a_gap_are_counted(place, tmp_path, capsys):
    out = tmp_path / "run"
    latents = ";".join(map(str, range(48)))
    options = ("--site", "resid_post.1", "--latents", latents, "--controls", "0", "--positions", "1")
    assert main(["patch", *arguments(place, out, *options)]) == 0  # the first letter is the same in both prompts
    summary = json.loads((out / "summary.json").read_text())
    assert summary["rows"] == 48 * summary["pairs"]  # what was asked for has its rows
    assert {line["pairs"] for line in summary["top"]["denoise"]} == {0}
    assert {line["effect"]["value"] for line in summary["top"]["denoise"]} == {0.0}
    assert main(["patch", *arguments(place, tmp_path / "gap", "--site", "resid_post.1", "--min_gap", "100")]) == 0
    assert "11 pairs (11 with a gap below 100.0)" in (told := capsys.readouterr().out)
    assert "too little to divide by" in told
    summary = json.loads((tmp_path / "gap/summary.json").read_text())
    assert summary["rows_without_effect"] == summary["rows"] > 0
    assert summary["top"]["denoise"][0]["effect"]["value"] is None


def test_pairs_that_cannot_differ_are_warned_about(place, tmp_path, caplog, capsys):
    same = {"clean": "the cat sat", "corrupted": "the cat sat", "answer": "x", "counter": "x"}
    (tmp_path / "same.jsonl").write_text(json.dumps(same))
    given = [*arguments(place, tmp_path / "run", "--latents", "3", "--site", "resid_post.0"), "--controls", "0"]
    given[given.index("--pairs") + 1] = str(tmp_path / "same.jsonl")
    given.remove("--quiet")
    assert main(["patch", *given]) == 0
    assert "1 of 1 pairs have the same answer and counter, such as same-1: their logit" in caplog.text
    assert "1 of 1 pairs have the same clean and corrupted prompt, such as same-1: patching" in caplog.text
    assert capsys.readouterr()


def test_mistakes_come_before_the_work(place, tmp_path, capsys):
    command = ["patch", *arguments(place, tmp_path / "run")]
    for more, complaint in [
        (
            ("--latents", "3"),
            "latents '3' name no site, and the sites are resid_post.0, ",
        ),
        (("--latents", "resid_post.0: 3", "--site", "resid_post.1"), "latents are given for resid_post.0, but site is"),
        (("--latents", "resid_post.1: 48"), "latent 48 is out of range"),
        (("--latents", "middle.1: 3"), "unknown stream 'middle'"),
        (("--corruption", "noise: cat"), "pair pairs-5: prompt 0 contains 'cat' as whole tokens 0 times"),
        (("--corruption", "zero"), "zero ablates the patched component: give one --site of resid_post.0, resid_post.1"),
        (("--latents", "48", "--site", "resid_post.1"), "latent 48 is out of range"),
        (("--site", "resid_post.2"), "has no dictionary for resid_post.2"),
        (("--site", "resid_post.1", "--component", "head"), "heads are at z.LAYER, as in --site z.1"),
        (("--positions", "first"), "unknown positions 'first'"),
        (("--positions", "40"), "pair pairs-1: position 40 is out of range"),
        (("--positions", "at: zebra"), "pair pairs-1: prompt 0 contains 'zebra' as whole tokens 0 times"),
        (("--metric", "surprise"), "unknown metric 'surprise': use one of answer_rank, "),
        (("--direction", "up"), "direction"),
        (("--out", str(place / "pairs.jsonl")), "cannot write to"),
        (("--device_map", "some"), "device_map 'some'"),
    ]:
        assert complaint in failed(capsys, *command, *more)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({}, "give either --pairs"),
        ({"pairs": "ioi", "clean": "a"}, "not both"),
        ({"clean": "a", "answers": "b|c"}, "an inline pair needs all"),
        ({"clean": "a", "corrupted": "b", "answers": " Mary, John"}, "write two, the clean"),
        ({"pairs": "ioi", "latents": "3-5"}, "write numbers, with semicolons"),
        ({"pairs": "ioi", "latents": "resid_post.3: 3 | 5"}, "for several sites as in 'resid_post.3: 417 |"),
        ({"pairs": "ioi", "corruption": "noise:"}, "write 'noise: TEXT', zero or mean"),
        ({"pairs": "ioi", "latents": "3", "component": "error"}, "latents are given, but component is error"),
        ({"pairs": "ioi", "shard": "2/2"}, "I from 0 to N-1"),
        ({"pairs": "ioi", "part": 0}, "part = 0"),
        ({"pairs": "ioi", "min_gap": 0.0}, "min_gap"),
        ({"pairs": "ioi", "n": -1}, "n = -1"),
        ({"pairs": "ioi", "out": ""}, "out is empty"),
    ],
)
def test_settings_that_make_no_sense(changes, complaint):
    with pytest.raises(UserError, match=complaint.replace("?", r"\?")):
        PatchConfig(**changes)


def test_texts_of_settings():
    assert [read_positions(text) for text in ("all", " last", "5", "-1", "3:7", "-3:", "1, 4", "at: Mary Ann")] == [
        "all", "last", 5, -1, slice(3, 7), slice(-3, None), [1, 4], At("Mary Ann")]  # fmt: skip
    assert read_metric("logit_difference") is logit_difference
    inline = PatchConfig(clean="a", corrupted="b", answers=" Mary| John")
    assert read_pairs(inline) == ("inline", [PromptPair("a", "b", " Mary", " John", "inline")])
    pairs = [PromptPair("a", "b", "c", "d", name) for name in ("x", "y", "x")]
    assert [pair.example for pair in distinct_names(pairs)] == ["x#0", "y", "x#2"]
    assert [part.pairs for part in cut_parts(7, 1, 3, 1, 1, ["denoise"])] == [(1,), (4,)]
    assert [(p.number, p.components, p.direction) for p in cut_parts(2, 0, 1, 9, 2, ["denoise", "noise"])] == [
        (0, 0, "denoise"), (1, 0, "noise"), (2, 1, "denoise"), (3, 1, "noise")]  # fmt: skip


def test_shards_from_torchrun_and_slurm():
    assert read_shard("3/8", {"RANK": "0", "WORLD_SIZE": "2"}) == (3, 8)
    assert read_shard("auto", {"RANK": "1", "WORLD_SIZE": "2"}) == (1, 2)
    slurm = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "4"}
    assert read_shard("auto", slurm | {"SLURM_ARRAY_TASK_STEP": "2"}) == (2, 4)
    with pytest.raises(UserError, match="without gaps"):
        read_shard("auto", slurm)
    with pytest.raises(UserError, match="neither under torchrun"):
        read_shard("auto", {"RANK": "1"})


def test_a_stop_that_was_swallowed_comes_again_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stoppable() as check:
        with contextlib.suppress(KeyboardInterrupt):  # as where Python runs a callback that cannot raise
            signal.raise_signal(signal.SIGTERM)
        check()
    assert signal.getsignal(signal.SIGTERM) is before
    Check()()


def test_logs_that_nobody_watches_get_a_line_now_and_then(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("saepatch.runs.progress.LOG_EVERY", 0.0)
    options = ("--site", "resid_post.0", "--latents", "3;5", "--controls", "0", "--part", "4")
    command = ["patch", *arguments(place, tmp_path / "run", *options)]
    assert main([*command, "--quiet", "false"]) == 0
    told = capsys.readouterr().err
    assert "\r" not in told
    assert re.search(r"^2 of 3 parts, [\d,]+ edits, [\d,]+ per second, about \d+ s left$", told, re.MULTILINE)
    assert main([*command, "--out", str(tmp_path / "quiet")]) == 0
    assert capsys.readouterr().err == ""
    assert main([*command, "--out", str(tmp_path / "bar"), "--quiet", "false", "--progress", "bar"]) == 0
    assert "3/3" in capsys.readouterr().err


# Importing everything takes seconds: one process does, and forks a fresh one for each command.
DRIVER = """
import os, sys, json
import torch, sae_lens, transformers.models.llama, datasets, pyarrow.parquet, scipy.stats, yaml
import saepatch.runs.merge
from saepatch.cli.main import main
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
        os._exit(main(json.loads(line)))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Commands:
    """Commands in processes of their own, to be killed."""

    def __init__(self, log: Path):
        self.log = log
        with log.open("w") as stderr:
            self.driver = subprocess.Popen(
                [sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
            )
        assert self.driver.stdout.readline() == "ready\n", log.read_text()

    def start(self, *given):
        self.driver.stdin.write(json.dumps([str(each) for each in given]) + "\n")
        self.driver.stdin.flush()
        return int(self.driver.stdout.readline())

    def wait(self):
        return int(self.driver.stdout.readline())


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    found = Commands(tmp_path_factory.mktemp("driver") / "stderr.txt")
    yield found
    found.driver.communicate(timeout=30)


def parts_of(out):
    """The name and time of each part; one (or their folder) that goes while it is being listed counts as not there."""
    with contextlib.suppress(FileNotFoundError):
        return {path.name: path.stat().st_mtime_ns for path in Path(out).glob("parts/*/part-*.parquet")}
    return {}


def kill_after(commands, out, parts, delay, number, *given):
    """Start a command, and send it a signal a moment after that many more parts are there; its exit code."""
    import os

    before, pid = len(parts_of(out)), commands.start(*given)
    limit = time.monotonic() + 60
    while len(parts_of(out)) < before + parts and time.monotonic() < limit:
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(pid, number)
    return commands.wait()


FEW = [signal.SIGKILL, signal.SIGINT]
MANY = [*[signal.SIGKILL] * 5, signal.SIGTERM, signal.SIGINT]


@pytest.mark.slow  # `make kills` tries signals at many more moments, and tests/cli/test_interrupts.py each handler
@pytest.mark.parametrize("signals", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize(
    ("work", "options"),
    [
        ("patch", ("--batch_size", "8")),
        pytest.param(
            "attribute",
            ("--site", "resid_post.0", "--verify", "3", "--sample", "3", "--steps", "40"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_killed_at_any_moment_nothing_is_lost_or_repeated(commands, place, tmp_path, work, options, signals):
    out, rng = tmp_path / "killed", random.Random(0)
    options = ("--part", "1", "--direction", "both", *options)
    command = [work, *arguments(place, out, *options)]
    whole = run(work, place, tmp_path / "whole", *options)
    total, said = len(parts_of(tmp_path / "whole")), len(commands.log.read_text())
    for number in signals:
        kept = parts_of(out)
        code = kill_after(commands, out, rng.randint(1, total // 11), rng.uniform(0, 0.05), number, *command)
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else 130)
        assert len(kept) < len(parts_of(out)) < total
        assert kept.items() <= parts_of(out).items()  # what was there was not done again
        assert not (out / "results.parquet").exists()
    told = commands.log.read_text()[said:].splitlines()
    config = out / "parts/shard-0-of-1/config.yaml"
    line = rf"interrupted: \d+ of {total} parts are written; to resume: saepatch {work} --config {config}"
    assert len(told) == len(signals) - signals.count(signal.SIGKILL)
    assert all(re.fullmatch(line, one) for one in told)
    commands.start(work, "--config", config)
    assert commands.wait() == 0
    assert_same_rows(whole, rows_of(out))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["parts"] == total
    edits = [line["edits"] for line in lines]
    assert edits == sorted(edits)
    assert edits[-1] == sum(read_about(path)["edits"] for path in out.glob("parts/*/*.parquet"))
    assert not list(out.glob("parts/*/.part-*"))


@pytest.mark.slow
def test_two_processes_under_torchrun(place, tmp_path):
    whole = patch(place, tmp_path / "whole", "--site", "resid_post.1")
    out = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "--", "saepatch"]
    command = [*launch, "patch", *arguments(place, out, "--site", "resid_post.1", "--shard", "auto")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert main(["merge", str(out)]) == 0
    assert_same_rows(whole, rows_of(out))


def test_an_error_that_an_interrupt_caused_is_an_interrupt():
    """numpy, hit in the middle of a comparison, reports a TypeError."""
    with pytest.raises(KeyboardInterrupt), stoppable() as check:
        check.stop_requested = True
        raise TypeError("cannot compare")
    with pytest.raises(TypeError), stoppable():
        raise TypeError("a mistake of ours")


def test_records_of_edits_are_read_back():
    """Those of one site as they were always written, and those of several with all that they hold."""
    old = {"site": "resid_post.1", "units": [3, 4], "role": "random", "beside": [5, 6]}
    edit = Edit(Site(1), (3, 4), role="random", beside=(5, 6))
    assert read_edit(old) == edit
    assert edit_facts(edit) == old
    parts = [
        EditPart(Site(0), (1,), 2, "error"),
        EditPart(Site(1), (3,), beside=(4,)),
        EditPart(Site(2), (5,), frozen=True),
    ]
    several = Edit.of(parts, "matched")
    assert read_edit(json.loads(json.dumps(edit_facts(several)))) == several
