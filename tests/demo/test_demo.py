"""The main job on the shipped model, smaller than `make demo`, and the files it leaves."""

import json
import math
import re
import shutil
from collections import defaultdict
from functools import partial

import pytest
import yaml

from saepatch import organism
from saepatch.cli.main import main
from saepatch.demo import looks, run, stages
from saepatch.dictionaries.loading import load_sae
from saepatch.measure.quality import latent_statistics
from saepatch.model.loading.load import load_model
from saepatch.organism.checks import evaluate_organism
from saepatch.records.rows import read_rows
from saepatch.report import Details, Link, read_page

pytestmark = pytest.mark.whole

PAIRS = 10  # the fewest that the command accepts


@pytest.fixture(scope="module")
def demo(tmp_path_factory, few_texts):
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "STRENGTHS", (1.0,))
        patch.setattr(stages, "ANSWER_TOKENS", 12)
        patch.setattr(stages, "DRAWS", 2)
        patch.setattr(run, "evaluate_organism", partial(evaluate_organism, n=50))
        patch.setattr(looks, "CARDS", 3)
        patch.setattr(looks, "LEADING", 1)
        assert main(["demo", "--out", str(out), "--pairs", str(PAIRS)]) == 0
    return out


@pytest.fixture(scope="module")
def summary(demo):
    return json.loads((demo / "summary.json").read_text())


def test_no_other_run_is_written_over(demo, tmp_path, capsys):
    for name in ("parts", "answers"):
        (tmp_path / name / name).mkdir(parents=True)
        assert main(["demo", "--out", str(tmp_path / name), "--pairs", str(PAIRS)]) == 2
        assert "holds a run of another command or experiment" in capsys.readouterr().err
    shutil.copy(demo / "results.parquet", tmp_path)
    assert main(["demo", "--out", str(tmp_path), "--pairs", str(PAIRS)]) == 2
    assert not (tmp_path / "page.json").exists()
    given = ["patch", "ioi", "--latents", "3", "--site", "resid_post.3", "--out", str(demo)]
    before = (demo / "report.html").read_bytes()
    assert main(given) == 2  # nor does it write over the demo's
    assert (demo / "report.html").read_bytes() == before


def test_splice_is_the_model_and_keeps_most_of_it(summary):
    assert [row["site"] for row in summary["splice"]] == [f"resid_post.{layer}" for layer in range(6)]
    for row in summary["splice"]:
        assert row["identity_error"] <= 1e-4
        assert row["ce_recovered"] >= 0.98
        assert row["alive_share"] >= 0.6


def test_top_latents_restore_indirect_objects_and_random_ones_do_not(summary):
    found = summary["patching"]
    assert found["pairs"] == PAIRS
    assert found["clean"] > 1 > -1 > found["corrupted"]
    assert found["self_patch_error"] <= 1e-4
    top, random = dict(found["denoise_top"]), dict(found["denoise_random"])
    assert top[16] >= 0.8
    assert abs(random[16]) <= 0.05
    assert abs(dict(found["denoise_differing"])[16]) <= 0.05
    assert dict(found["noise_top"])[16] > dict(found["noise_random"])[16] + 0.2


def test_restoration_brings_refusals_back_and_spares_harmless_requests(summary):
    found = summary["restoration"]
    assert found["share_of_dictionary"] <= 0.05
    assert found["refused_clean"] >= 0.95
    assert found["refused_jailbroken"] <= 0.1
    assert found["refused_restored"] >= 0.9
    assert found["refused_restored_generated"] >= 0.9
    assert found["refused_random_control"] <= 0.05
    assert found["refused_differing_control"] <= 0.05
    assert found["refused_harmless_restored"] <= 0.02


def test_steering_reports_every_condition(summary):
    for found in (summary["steering"], *summary["steering_all"]):
        assert set(found) == {"concept", "unsteered", "top1", "top10", "random", "random10"}
        for name in ("unsteered", "top1", "top10", "random"):
            assert 0 <= found[name]["success"] <= 1
            assert found[name]["perplexity"] > 1


def test_files(demo, summary):
    rows = read_rows(demo / "results.parquet")
    assert {row["direction"] for row in rows} == {"denoise", "noise"}
    assert {row["model_hash"] for row in rows} != {""}
    assert all(math.isfinite(row["patched"]) for row in rows)
    gap = summary["patching"]["clean"] - summary["patching"]["corrupted"]
    sixteen = [
        row
        for row in rows
        if row["method"] == "exact, ranked on select" and row["role"] == "top" and row["latent"].count(",") == 15
    ]
    assert len(sixteen) == PAIRS
    change = sum(row["patched"] - row["corrupted"] for row in sixteen) / PAIRS
    assert change / gap == pytest.approx(dict(summary["patching"]["denoise_fixed"])[16], abs=1e-6)
    assert {row["role"] for row in rows} == {"single", "top", "random", "matched", "differing", "every"}
    for name in ("denoise", "noise", "denoise_fixed"):
        assert (demo / f"{name}.svg").read_text().startswith("<svg")
    page = (demo / "report.html").read_text()
    assert "<script>" in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert yaml.safe_load((demo / "config.yaml").read_text())["pairs"] == PAIRS
    assert (demo / "metrics.jsonl").read_text().count("\n") == 6
    assert summary["seed"] == 0
    assert set(summary["seconds"]) == {
        "load",
        "tasks",
        "splice",
        "patching",
        "restoration",
        "steering",
        "single latents",
    }


def test_maps_of_the_report_are_means_over_rows_of_one_form(demo):
    page = read_page(json.loads((demo / "page.json").read_text()))
    (where,) = [section for section in page.sections if section.title == "Where: maps"]
    layers, _, heads, _, latents, *_ = where.blocks  # denoise beside noise, by kind
    site = json.loads((demo / "summary.json").read_text())["patching"]["site"]
    rows = [row for row in read_rows(demo / "results.parquet") if row["direction"] == "denoise"]
    for heat, component, single in ((layers, "stream", True), (latents, "latent", True), (heads, "head", False)):
        mine = [row for row in rows if row["component"] == component and row["position"].isdigit() == single]
        if component == "latent":
            mine = [row for row in mine if row["site"] == site and row["latent"] in heat.rows]
        gaps = {row["example"]: row["clean"] - row["corrupted"] for row in mine}
        totals = {}
        for row in mine:
            where_at = int(row["position"]) if single else int(row["latent"])
            name = {"stream": row["site"], "latent": row["latent"], "head": row["site"].removeprefix("z.")}[component]
            totals[name, where_at] = totals.get((name, where_at), 0.0) + row["patched"] - row["corrupted"]
        # columns in which nothing was run are left out
        at = (
            [next(int(key.split("/")[-1]) for key in column if key) for column in zip(*heat.keys)]
            if single
            else range(len(heat.columns))
        )
        told = {(name, where): v for name, values in zip(heat.rows, heat.values) for where, v in zip(at, values)}
        told = {key: value for key, value in told.items() if not math.isnan(value)}
        assert told.keys() == totals.keys()
        for key, total in totals.items():
            assert told[key] == pytest.approx(total / sum(gaps.values()), abs=1e-6)
    for values in latents.values:  # patched alone, the last of the streams is everything
        assert max(v for v in values if not math.isnan(v)) <= 1.2


def test_a_cell_of_a_map_leads_to_its_latents(demo):
    """The largest of each layer and position, found again in the rows; and each dictionary's rows bear its name."""
    page = read_page(json.loads((demo / "page.json").read_text()))
    (where,) = [section for section in page.sections if section.title == "Where: maps"]
    rows = [row for row in read_rows(demo / "results.parquet") if row["position"].isdigit()]
    assert {(row["site"], row["dictionary"]) for row in rows if row["component"] == "latent"} == {
        (f"resid_post.{layer}", f"organism/resid_post.{layer}") for layer in range(6)
    }
    *maps, tables = where.blocks
    for number, (direction, (table,)) in enumerate(tables.options):
        layers, heads, latents = maps[number::2]
        assert all(direction in heat.title for heat in (layers, heads, latents))
        listed = defaultdict(list)
        for row, keys in zip(table.rows, table.keys):
            for key in keys:
                listed[key].append(row)
        mine = [row for row in rows if row["direction"] == direction]
        gaps = {row["example"]: row["clean"] - row["corrupted"] for row in mine}
        totals = defaultdict(lambda: defaultdict(float))
        for row in mine:
            if row["component"] == "latent":
                change = row["patched"] - row["corrupted"] if direction == "denoise" else row["clean"] - row["patched"]
                cell = f"{direction}/{row['site']}/latent/{row['position']}"
                totals[cell][row["latent"]] += change / sum(gaps.values())
        assert len(totals) > 12
        for key, found in totals.items():
            wanted = sorted(map(abs, found.values()), reverse=True)[:4]
            shown = {getattr(row[1], "text", row[1]): row[3].value for row in listed[key]}
            assert sorted(map(abs, shown.values()), reverse=True)[:4] == pytest.approx(wanted, abs=1e-6)
            for latent, value in shown.items():
                assert value == pytest.approx(found[latent], abs=1e-6)
        for heat in (layers, heads, latents):
            cells = [(key, value) for keys, values in zip(heat.keys, heat.values) for key, value in zip(keys, values)]
            run = [key for key, value in cells if not math.isnan(value)]
            assert run
            # A layer may differ where none of its latents does: in its error term.
            assert [key for key in run if key not in listed and (heat is not layers or key in totals)] == []
        linked = [row[1] for row in table.rows if isinstance(row[1], Link)]
        assert {row[0] for row in table.rows if isinstance(row[1], Link)} == {f"resid_post.{n}" for n in range(6)}
        assert {link.anchor for link in linked} <= {
            card.anchor for section in page.sections for card in section.blocks if isinstance(card, Details)
        }


@pytest.mark.browser
def test_a_click_on_a_cell_in_a_browser(demo, browser):
    browser.get((demo / "report.html").as_uri())
    cells = browser.find_elements("css selector", ".pick[data-key^='denoise/resid_post.3/']")
    cell = [cell for cell in cells if cell.is_displayed()][-1]  # a chart has a form for narrow pages, too
    *_, position = cell.get_attribute("data-key").split("/")
    cell.click()
    (panel,) = [p for p in browser.find_elements("css selector", ".picked") if p.text]
    shown = [[cell.text for cell in row.find_elements("css selector", "td")] for row in
             panel.find_elements("css selector", "tbody tr")]  # fmt: skip
    assert shown
    assert all(site == "resid_post.3" and at.split()[0] == position for site, _, at, *_ in shown)
    assert browser.get_log("browser") == []


def test_the_report_is_written_anew_from_its_folder_alone(demo, tmp_path):
    for name in ("page.json", "summary.json"):
        shutil.copy(demo / name, tmp_path / name)
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_bytes() == (demo / "report.html").read_bytes()
    assert len((demo / "report.html").read_bytes()) < 3_000_000
    (tmp_path / "page.json").write_text('{"block": "Sculpture"}')
    assert main(["report", str(tmp_path)]) == 2


def test_every_latent_of_the_report_has_its_card(demo):
    page = read_page(json.loads((demo / "page.json").read_text()))
    cards = [block for section in page.sections for block in section.blocks if isinstance(block, Details)]
    assert len(cards) == len({card.anchor for card in cards}) >= 8
    source = (demo / "report.html").read_text()
    for name in set(re.findall(r'href="#(latent-[^"]+)"', source)):
        assert f'id="{name}"' in source


class _Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("stage", "function", "split"),
    [
        ("restoration", "change_scores", "select"),  # latents are ranked …
        ("restoration", "refused_first_token", "tune"),  # … then counted
        ("patching", "integrated_gradients", "select"),  # the fixed set
        ("choose_safety_site", "change_scores", "select"),
        ("choose_safety_site", "refused_first_token", "tune"),
    ],
)
def test_what_is_chosen_for_all_prompts_is_not_chosen_on_report(monkeypatch, stage, function, split):
    model, dictionary = load_model("organism"), load_sae("organism", "resid_post.3")
    stats = latent_statistics(model, dictionary, model.tokenize(organism.texts()[:40]))

    def spy(_model, _dictionary, pairs, *_rest):
        assert all(f"-{split}-" in pair.example for pair in pairs)
        raise _Stop

    monkeypatch.setattr(stages, function, spy)
    with pytest.raises(_Stop):
        if stage == "choose_safety_site":
            stages.choose_safety_site(model, {dictionary.site: dictionary}, 10, 0)
        else:
            getattr(stages, stage)(model, dictionary, stats, 10, 0)


def test_steering_keeps_its_splits_apart():
    for concept in stages.chosen_concepts(load_model("organism"), 20, 0):
        chosen_on, tuned_on, reported = {*concept.present, *concept.absent}, {*concept.tune}, {*concept.report}
        assert chosen_on
        assert not chosen_on & tuned_on
        assert not chosen_on & reported
        assert not tuned_on & reported


@pytest.mark.slow
def test_same_command_same_numbers(summary, tmp_path):
    assert main(["demo", "--out", str(tmp_path), "--pairs", str(PAIRS)]) == 0
    again = json.loads((tmp_path / "summary.json").read_text())
    for part in ("tasks", "splice", "patching", "restoration", "steering_all"):
        assert again[part] == summary[part]
