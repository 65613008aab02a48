"""Reports of runs: made of files alone, their numbers against plain sums over rows, and in a browser."""

import csv
import io
import json
import re
import shutil
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from browsing import serious_findings
from tiny import random_sae, tiny_model

import saepatch.model.loading.load
from saepatch.cli.main import main
from saepatch.pages.run import run_page
from saepatch.pages.sweeps.maps import EditTable, draw_map
from saepatch.pages.sweeps.run_data import read_run_data
from saepatch.records.rows import read_rows
from saepatch.report import BarChart, EstimateCell, HeatMap, LineChart, ScatterChart, Table
from saepatch.runs.catalogue import find_runs, read_run, runs_table
from saepatch.runs.comparison import compare_runs
from saepatch.runs.parts import EditKey

pytestmark = pytest.mark.whole

EVIL = (
    "</script><script>window.hit=1</script>",
    '" onmouseover="window.hit=2" x="',
    "<img src=x onerror=window.hit=3>",
    "\u202etxt\u200b",
    "<s>",
    "{{7*7}}",
    "עברית",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model whose vocabulary is hostile, dictionaries at two sites, and pairs that use it."""
    folder = tmp_path_factory.mktemp("pages")
    model = tiny_model(vocab_size=259 + len(EVIL))
    model.tokenizer.add_tokens(list(EVIL))
    model.hf.save_pretrained(folder / "model")
    model.tokenizer.save_pretrained(folder / "model")
    for layer in (0, 1):
        sae = random_sae(seed=layer)
        sae.cfg.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
        sae.cfg.metadata.neuronpedia_id = f"tiny/{layer}-res"
        sae.save_model(folder / "saes" / f"resid_post.{layer}")
    lines = [
        {"clean": f"a{one}b c", "corrupted": f"a{other}b c", "answer": "x", "counter": "y", "example": name}
        for one, other, name in zip(EVIL[:4], EVIL[3:], ("<b>one</b>", "two", "three", EVIL[0]))
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def run(place, out, command, *more):
    given = ["--model", place / "model", "--sae", place / "saes", "--pairs", place / "pairs.jsonl", "--out", out]
    assert main([command, *map(str, given), "--quiet", "--direction", "both", *more]) == 0
    return Path(out)


@pytest.fixture(scope="module")
def swept(place):
    return run(place, place / "swept", "patch", "--each_position")


@pytest.fixture(scope="module")
def grouped(place):
    return run(
        place, place / "grouped", "patch", "--site", "resid_post.1", "--latents", "3; 3,5; 3,5,7", "--controls=2"
    )


@pytest.fixture(scope="module")
def screened(place):
    return run(place, place / "screened", "attribute", "--verify", "4", "--sample", "6")


@pytest.fixture(scope="module")
def heads(place):
    return run(place, place / "heads", "patch", "--component", "head")


def blocks(page, kind):
    """All blocks of a kind, those inside choices and cards among them."""
    found = []

    def walk(some):
        for block in some:
            if isinstance(block, kind):
                found.append(block)
            for _, inner in getattr(block, "options", ()):
                walk(inner)
            walk(getattr(block, "blocks", ()))

    for section in page.sections:
        walk(section.blocks)
    return found


def changes(rows):
    """How far each row moved its metric towards the source run."""
    return [
        row["patched"] - row["corrupted"] if row["direction"] == "denoise" else row["clean"] - row["patched"]
        for row in rows
    ]


def gap(rows):
    own = {row["example"]: row["clean"] - row["corrupted"] for row in rows}
    return np.mean(list(own.values()))


def test_maps_are_sums_over_rows(swept):
    rows = read_rows(swept / "results.parquet")
    cells, units, alone = defaultdict(float), defaultdict(float), defaultdict(float)
    for row, change in zip(rows, changes(rows)):
        share = change / 4 / gap(rows)
        cells[row["direction"], row["site"], int(row["position"])] += share
        units[row["direction"], f"{row['site']} {row['latent']}", int(row["position"])] += share
        if row["example"] == "two":
            alone[row["direction"], row["site"], int(row["position"])] += row["effect"]
    maps = blocks(run_page(read_run_data(swept)), HeatMap)
    by_site = [m for m in maps if m.title.startswith("Latents by site")]
    assert len(by_site) == 2 * (1 + 3)  # both directions: over all pairs, and of three alone
    for heat, wanted in [(m, cells) for m in by_site[:2]] + [(m, alone) for m in by_site[4:6]]:
        direction = heat.title.rpartition(": ")[2]
        at = [int(column.split()[0]) for column in heat.columns]
        told = {(direction, row, c): v for row, values in zip(heat.rows, heat.values) for c, v in zip(at, values)}
        assert {key for key, value in told.items() if not np.isnan(value)} == {k for k in wanted if k[0] == direction}
        for key, value in wanted.items():
            if key[0] == direction:
                assert told[key] == pytest.approx(value, abs=1e-9)
    top = next(m for m in maps if "latents with the largest" in m.title)
    assert len(top.rows) == 24
    shown = [(name, int(column.split()[0]), v) for name, values in zip(top.rows, top.values)
             for column, v in zip(top.columns, values) if not np.isnan(v)]  # fmt: skip
    assert len(shown) > 24
    for name, position, value in shown:
        assert value == pytest.approx(units["denoise", name, position], abs=1e-9)
    sizes = defaultdict(float)
    for (direction, name, _), value in units.items():
        if direction == "denoise":
            sizes[name] = max(sizes[name], abs(value))
    assert set(top.rows) == set(sorted(sizes, key=lambda name: -sizes[name])[:24])


def test_a_curve_has_every_group_that_was_asked_for(place, tmp_path):
    """More groups than a summary has on top, and with bars a word on those that are left out."""
    groups = [",".join(map(str, range(size))) for size in range(1, 24)]
    out = run(place, tmp_path / "curve", "patch", "--site", "resid_post.1", "--latents", "; ".join(groups))
    rows = read_rows(out / "results.parquet")
    whole = defaultdict(float)
    for row, change in zip(rows, changes(rows)):
        if row["role"] == "given":
            whole[row["direction"], row["latent"]] += change / 4 / gap(rows)
    for chart in blocks(run_page(read_run_data(out)), LineChart):
        direction = chart.title.rpartition(": ")[2]
        (patched,) = [line for line in chart.series if line.name == "patched"]
        assert list(patched.x) == list(range(1, 24))
        assert list(patched.y) == pytest.approx([whole[direction, group] for group in groups], abs=1e-9)
        assert all(None not in line.y[:20] for line in chart.series)  # more than 20 have no controls of their size
    pairs = "; ".join(f"{2 * i},{2 * i + 1}" for i in range(22))
    out = run(place, tmp_path / "bars", "patch", "--site", "resid_post.1", "--latents", pairs, "--controls=0")
    charts = blocks(run_page(read_run_data(out)), BarChart)
    assert len(charts) == 2
    assert all("The 20 largest of 22. " in chart.caption for chart in charts)


def test_tokens_stand_over_maps(swept):
    """Token 2 is the one that differs; all else is shared by all pairs. Before it, nothing was run."""
    over_all, alone = (blocks(run_page(read_run_data(swept)), HeatMap)[n] for n in (0, 6))
    assert list(over_all.columns) == ["2 …", "3 b", "4 ␣", "5 c"]
    assert list(over_all.columns_below) == ["…", "=", "=", "="]
    assert alone.columns[0] == f"2 {EVIL[0]}"
    assert alone.columns_below[0] == "⟨U+202E⟩txt⟨U+200B⟩"


def test_maps_of_both_directions_have_one_scale(swept):
    maps = blocks(run_page(read_run_data(swept)), HeatMap)
    kinds, directions = zip(*(heat.title.split(": ") for heat in maps))
    assert directions == ("denoise", "noise") * 8
    assert kinds[::2] == kinds[1::2]
    by_title = defaultdict(list)
    for heat in maps[:4]:
        by_title[heat.title.partition(" by ")[0]].append(heat)
    for twins in by_title.values():
        largest = max(abs(v) for heat in twins for row in heat.values for v in row if not np.isnan(v))
        assert [heat.scale for heat in twins] == [max(largest, 0.1)] * len(twins)


def test_cells_of_single_edits_whose_interval_contains_zero_are_pale():
    keys = [EditKey("denoise", "resid_post.0", "latent", "single", str(n), "2") for n in range(4)]
    intervals = [EstimateCell(0.3, 0.1, 0.5), EstimateCell(0.01, -0.1, 0.2), EstimateCell(0.2, None, None, "few"), None]
    edits = EditTable(keys, np.array([0.3, 0.01, 0.2, 0.4]), np.full(4, 9), lambda some: [intervals[n] for n in some])
    rows = {str(n): str(n) for n in range(4)}
    heat = draw_map("map", edits, range(4), lambda key: (key.latent, key.position), rows, {"2": "2"})
    assert heat.uncertain == [[False], [True], [True], [False]]
    assert heat.scale == 0.1
    summed = draw_map("map", edits, range(4), lambda key: ("all", key.position), {"all": "all"}, {"2": "2"})
    assert not np.any(summed.uncertain)
    assert summed.values == [[pytest.approx(0.91)]]


def test_the_table_of_edits_agrees_with_the_summary(swept, grouped):
    for out in (swept, grouped):
        summary = json.loads((out / "summary.json").read_text())
        tables = [
            t
            for t in blocks(run_page(read_run_data(out)), Table)
            if "pairs changed" in t.columns and "unit" in t.columns
        ]
        assert len(tables) == 2
        for table, direction in zip(tables, ("denoise", "noise")):
            told = {}
            for site, unit, position, effect, *_ in table.rows:
                told[site, getattr(unit, "text", unit), position.split()[0]] = effect
            for line in summary["top"][direction]:
                interval = told[line["site"], line["latent"], line["position"]]
                wanted = line["effect"]
                assert (interval.value, interval.low, interval.high) == pytest.approx(
                    (wanted["value"], wanted["low"], wanted["high"]), abs=1e-12
                )


def test_heads_by_layer(heads):
    rows = read_rows(heads / "results.parquet")
    (heat, _) = blocks(run_page(read_run_data(heads)), HeatMap)[:2]
    assert list(heat.rows) == ["0", "1", "2"]
    for row, change in zip(rows, changes(rows)):
        row["change"] = change
    for layer in range(3):
        for head in range(4):
            key = (f"z.{layer}", str(head), "denoise")
            mine = [r["change"] for r in rows if (r["site"], r["latent"], r["direction"]) == key]
            assert heat.values[layer][head] == pytest.approx(sum(mine) / 4 / gap(rows), abs=1e-9)


def test_estimates_stand_against_exact_effects(screened):
    rows = read_rows(screened / "results.parquet")
    key = lambda r: (r["example"], r["site"], r["latent"], r["position"], r["direction"], r["component"])  # noqa: E731
    estimates = {key(r): c for r, c in zip(rows, changes(rows)) if r["role"] == "single"}
    for scatter, direction in zip(blocks(run_page(read_run_data(screened)), ScatterChart), ("denoise", "noise")):
        for points, role in zip(scatter.series, ("top", "random")):
            told = [(r, c) for r, c in zip(rows, changes(rows)) if (r["role"], r["direction"]) == (role, direction)]
            mine = [(change, estimates[key(row)]) for row, change in told]
            assert len(mine) >= 4
            np.testing.assert_allclose(sorted(zip(points.x, points.y)), sorted(mine))


def test_a_report_needs_files_alone(swept, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(swept, copy, copy_function=shutil.copy2)
    shutil.rmtree(copy / "parts")
    (copy / "report.html").unlink()
    monkeypatch.setattr(saepatch.model.loading.load, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    assert main(["report", str(copy)]) == 0
    assert (copy / "report.html").read_bytes() == (swept / "report.html").read_bytes()
    assert "report.html" in capsys.readouterr().out
    (copy / "reading.json").unlink()
    assert main(["report", str(copy)]) == 0
    assert "saepatch report" in (copy / "report.html").read_text()  # how to add what is missing


def test_shards_are_read_again_when_asked(place, tmp_path, swept):
    out = tmp_path / "shards"
    for shard in ("0/2", "1/2"):
        run(place, out, "patch", "--each_position", "--shard", shard)
    assert main(["merge", str(out)]) == 0
    assert not (out / "reading.json").exists()
    assert main(["report", str(out), "--read"]) == 0
    assert json.loads((out / "reading.json").read_text()) == json.loads((swept / "reading.json").read_text())


def test_a_run_stands_where_its_reading_fails(place, tmp_path, monkeypatch, capsys):
    def full(*_, batch_size):
        raise RuntimeError("out of memory\nmore")

    monkeypatch.setattr("saepatch.pages.gather.read_latents", full)
    out = run(place, tmp_path / "full", "patch", "--latents", "3", "--site", "resid_post.1")
    said = capsys.readouterr()
    assert "left out of the report: out of memory\n" in said.err
    assert "Report: " in said.out
    assert "need the model" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda out: (out / "summary.json").unlink(), "resume it with saepatch patch --config"),
        (lambda out: shutil.rmtree(out), "give the folder of a finished run"),
        (lambda out: (out / "summary.json").write_text("{"), "is not JSON"),
        (lambda out: (out / "summary.json").write_text("{}"), "has no run of patch, attribute"),
        (lambda out: (out / "results.parquet").write_text("no"), "merge the run again"),
        (lambda out: (out / "reading.json").write_text('{"latents": [{"examples": []}]}'), "another version"),
    ],
)
def test_folders_that_hold_no_run(grouped, tmp_path, capsys, spoil, message):
    shutil.copytree(grouped, tmp_path / "copy")
    spoil(tmp_path / "copy")
    assert main(["report", str(tmp_path / "copy")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_warnings_in_words(grouped, swept, screened, place, tmp_path):
    page = (grouped / "report.html").read_text()
    assert "too few for an interval" in page
    bare = run(place, tmp_path / "bare", "attribute", "--verify", "0", "--sample", "0")
    assert "no estimate was verified exactly" in (bare / "report.html").read_text()
    assert "no estimate was verified exactly" not in (screened / "report.html").read_text()
    same = tmp_path / "same.jsonl"
    same.write_text(json.dumps({"clean": "abc", "corrupted": "abc", "answer": "x", "counter": "x"}))
    given = ["--model", place / "model", "--sae", place / "saes", "--pairs", same, "--out", tmp_path / "flat"]
    assert main(["patch", *map(str, given), "--quiet", "--latents", "3", "--site", "resid_post.1"]) == 0
    assert "there is no gap to normalise by" in (tmp_path / "flat" / "report.html").read_text()


def test_pairs_of_several_forms_are_warned_of_once_and_on_the_page(place, tmp_path, caplog):
    words = ["ab cd", "efg hi jk", "lmno p", "qrs tuv w"]
    lines = [{"clean": f"{w}.x", "corrupted": f"{w}.y", "answer": "x", "counter": "y"} for w in words]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given = ["--model", place / "model", "--sae", place / "saes", "--site", "resid_post.1", "--part", "2"]
    with caplog.at_level("WARNING"):
        run = [*map(str, given), "--pairs", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "run")]
        assert main(["patch", *run, "--each_position"]) == 0
    assert sum("a position is a different token" in line for line in caplog.messages) == 1
    page = (tmp_path / "run" / "report.html").read_text()
    assert "give pairs of one form" in page


def test_runs_are_listed(place, swept, grouped, screened, heads, tmp_path, capsys):
    assert main(["runs", str(place)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 4
    told = {line.split()[0]: line for line in lines[1:]}
    top = json.loads((swept / "summary.json").read_text())["top"]["denoise"][0]
    assert f"{top['effect']['value']:.3f}" in told[str(swept)]
    assert f"{top['site']} {top['latent']} at {top['position']}" in told[str(swept)]
    assert "attribute" in told[str(screened)]
    assert "Pearson" in told[str(screened)]
    run(place, tmp_path / "half", "patch", "--shard", "0/2")
    assert "not finished" in runs_table(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "no runs" in runs_table(tmp_path / "empty")
    assert main(["runs", str(tmp_path / "nowhere")]) == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "summary.json").write_text('{"anything": 1}')
    assert [one.headline for one in find_runs(tmp_path / "other")] == [""]


def test_two_runs_side_by_side(place, swept, grouped, screened, tmp_path, capsys):
    other = run(place, tmp_path / "other", "patch", "--each_position", "--metric", "log_probability")
    found = compare_runs(read_run(swept), read_run(other))
    assert found.settings == (("metric", "logit_difference", "log_probability"),)
    texts = place / "pairs.jsonl"
    before = texts.read_text()
    texts.write_text("\n".join(before.splitlines()[:-1]))
    try:
        fewer = run(place, tmp_path / "fewer", "patch", "--each_position")
    finally:
        texts.write_text(before)
    (changed,) = compare_runs(read_run(swept), read_run(fewer)).settings
    assert changed[0] == "pairs' texts"
    tops = [json.loads((out / "summary.json").read_text())["top"] for out in (swept, other)]
    for name, *lines in found.edits:
        direction, _, edit = name.partition(": ")
        for line, top in zip(lines, tops):
            same = [t for t in top[direction] if f"{t['site']} {t['latent']} at {t['position']}" == edit]
            assert same == ([] if line is None else [line])
    page = tmp_path / "page.html"
    assert main(["compare", str(swept), str(other), "--html", str(page)]) == 0
    told = capsys.readouterr().out
    assert "log_probability" in told
    assert "not on top" not in told  # every edit stands in the rows of both
    assert "B − A" in told
    assert "B − A" in page.read_text()
    assert "log_probability" in page.read_text()
    assert main(["compare", str(swept), str(screened)]) == 2
    assert "two runs of the same command" in capsys.readouterr().err


# In a browser


class Plain(HTMLParser):
    """Elements with their attributes."""

    def __init__(self, source):
        super().__init__()
        self.elements = []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))


def test_latents_of_different_dictionaries_are_not_set_beside_each_other(place, swept, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(swept, other)
    summary = json.loads((other / "summary.json").read_text())
    summary["dictionaries"]["resid_post.1"]["hash"] = "0123456789abcdef"
    summary["top"] = {"denoise": summary["top"]["denoise"]}
    (other / "summary.json").write_text(json.dumps(summary))
    found = compare_runs(read_run(swept), read_run(other))
    for name, line, theirs in found.edits:
        if "resid_post.1" in name:
            assert (line is None) != (theirs is None)
        elif name.startswith("denoise"):
            assert line == theirs
    assert main(["compare", str(swept), str(other)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert any("another dictionary" in line for line in told if "resid_post.1" in line)
    assert all("not run" in line for line in told if line.startswith("noise: resid_post.0"))


def test_nothing_hostile_gets_into_a_page(swept, grouped, screened, heads):
    for out in (swept, grouped, screened, heads):
        source = (out / "report.html").read_text(encoding="utf-8")
        assert len(source) < 3_000_000
        elements = Plain(source).elements
        assert [tag for tag, _ in elements].count("script") == 1
        assert not [tag for tag, _ in elements if tag in {"img", "iframe", "object", "embed", "form"}]
        assert not [name for _, attrs in elements for name in attrs if name.startswith("on")]
        addresses = [attrs["href"] for _, attrs in elements if "href" in attrs]
        assert all(address.startswith(("#", "data:,", "https://www.neuronpedia.org/tiny/")) for address in addresses)
        ids = [attrs["id"] for _, attrs in elements if "id" in attrs]
        assert len(ids) == len(set(ids))
        missing = {address[1:] for address in addresses if address.startswith("#")} - set(ids)
        assert not missing
        assert not re.search("[\u202a-\u202e\u200b]", source)


def all_of(browser, selector):
    return browser.find_elements("css selector", selector)


def quiet(browser):
    """No error on the console, nothing ran, and nothing was asked for but the page itself."""
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.hit") is None
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if re.match("(https?|wss?|ftp):", url)] == []
    assert [url for url in urls if url.startswith("file:") and not url.endswith("/report.html")] == []


@pytest.mark.browser
def test_a_report_in_a_browser(browser, swept):
    browser.get((swept / "report.html").as_uri())
    cells = all_of(browser, ".view:not([hidden]) .pick[data-key*='resid_post.1/latent/3']")
    cell = next(one for one in cells if one.is_displayed())
    cell.click()
    panel = browser.find_element("css selector", ".view:not([hidden]) .picked")
    rows = panel.find_elements("css selector", "tbody tr")
    assert rows
    assert all(row.text.startswith("resid_post.1") for row in rows)
    assert all("denoise/resid_post.1/latent/3" in row.get_attribute("data-cells").split() for row in rows)
    whole = all_of(browser, "figure.table tbody tr[data-cells*='denoise/resid_post.1/latent/3 ']")
    assert len(rows) == len(whole)

    # The keyboard: arrow keys to the next cell that holds something, Enter picks it.
    cell.send_keys("\ue014\ue007")
    assert "resid_post.1, 4 ␣" in panel.text

    # A latent's card opens by its link, and the address says so.
    link = all_of(browser, "figure.table td a")[0]
    name = link.get_attribute("href").partition("#")[2]
    browser.execute_script("arguments[0].click()", link)
    card = browser.find_element("id", name)
    assert browser.execute_script("return new Promise(done => setTimeout(() => done(arguments[0].open), 200))", card)
    assert browser.execute_script("return location.hash").startswith(f"#{name}&")
    quiet(browser)


def rows_shown(table):
    """The text of each row that the page shows; asked for at once, since a question to the browser takes a while."""
    ask = "return [...arguments[0].querySelectorAll('tbody tr')].filter(r => r.offsetParent).map(r => r.innerText)"
    return table.parent.execute_script(ask, table)


@pytest.mark.browser
@pytest.mark.slow
def test_a_view_comes_back_with_its_address(browser, swept):
    browser.get((swept / "report.html").as_uri())
    table = next(t for t in all_of(browser, "figure.table") if t.find_elements("css selector", "input"))
    table.find_element("css selector", "input").send_keys("resid_post.0 5")
    shown = rows_shown(table)
    assert shown
    assert all("resid_post.0" in text and "5" in text for text in shown)
    table.find_elements("css selector", "th button")[1].click()
    select = browser.find_element("css selector", ".choice select")
    options = select.find_elements("css selector", "option")
    options[2].click()
    assert "alone" in options[2].text
    # a chart is drawn twice, and a page shows one of both
    seen = "[...document.querySelectorAll('.view:not([hidden]) .pick')].find(cell => cell.getClientRects().length)"
    browser.execute_script(f"{seen}.focus()")
    browser.switch_to.active_element.send_keys("\ue007")
    picked = browser.find_element("css selector", ".view:not([hidden]) .picked").text
    assert picked
    order = rows_shown(table)
    address = browser.current_url
    identity = table.get_attribute("id")

    browser.get("about:blank")
    browser.get(address)
    table = browser.find_element("id", identity)
    assert rows_shown(table) == order
    assert table.find_element("css selector", "input").get_attribute("value") == "resid_post.0 5"
    assert "alone" in browser.execute_script("return document.querySelector('.choice select').selectedOptions[0].text")
    assert browser.find_element("css selector", ".view:not([hidden]) .picked").text == picked
    for broken in ("#nowhere&t99.s=1d&t1.s=zz&c1=77&pick=f1+no&open=x", "#&&&=", "#%ff&t1.q=%"):
        browser.get("about:blank")
        browser.get(address.partition("#")[0] + broken)
        assert browser.find_element("css selector", "h1").is_displayed()
    quiet(browser)


@pytest.mark.browser
def test_copies_and_figures(browser, swept, screened):
    for out in (swept, screened):
        browser.get((out / "report.html").as_uri())
        browser.execute_script("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
        tables = all_of(browser, "figure.table")
        table = next(t for t in tables if "pairs changed" in t.text)
        table.find_element("css selector", "button.copy").click()
        rows = list(csv.DictReader(io.StringIO(browser.execute_script("return window.copied"))))
        summary = json.loads((out / "summary.json").read_text())
        if out == swept:
            top = summary["top"]["denoise"][0]
            key = (top["site"], top["latent"], top["position"])
            (mine,) = [r for r in rows if (r["site"], r["unit"], r["position"].split()[0]) == key]
            for column, key in (("effect", "value"), ("effect low", "low"), ("effect high", "high")):
                estimate = top["effect"][key]  # a bound is empty where the interval is withheld
                assert (
                    mine[column] == "" if estimate is None else float(mine[column]) == pytest.approx(estimate, rel=1e-8)
                )
        boxes = browser.execute_script("return all('.view:not([hidden]) .chart').map(f => f.getBoundingClientRect())")
        assert boxes[0]["top"] == boxes[1]["top"]  # both directions side by side
        assert boxes[0]["right"] < boxes[1]["left"]
        texts = browser.execute_script(
            "return all('figure.chart').filter(f => f.getClientRects().length).map(standalone)"
        )
        assert len(texts) >= 2
        for text in texts:
            root = ElementTree.fromstring(text)
            assert root.tag == "{http://www.w3.org/2000/svg}svg"
            assert "var(" not in text
            assert "#0b62a8" in text
        browser.execute_script("document.querySelector('button.save').click()")
        quiet(browser)


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("scheme", [pytest.param("light", marks=pytest.mark.slow), "dark"])
def test_narrow_pages_say_what_scrolls(browser, swept, grouped, screened, heads, scheme):
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    size = {"width": 420, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for out in (swept, grouped, screened, heads):
        browser.get((out / "report.html").as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 420
        told = browser.execute_script(
            "return all('.scroll').filter(b => b.getClientRects().length && b.scrollWidth > b.clientWidth + 1)"
            ".map(b => b.nextElementSibling?.matches('.sideways') && b.nextElementSibling.getClientRects().length > 0)"
        )
        assert told
        assert all(told)
        paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", paper)[:3])) > 380) == (scheme == "light")
    quiet(browser)


def test_only_runs_whose_page_needs_the_model_are_read_again(tmp_path, capsys):
    (tmp_path / "summary.json").write_text(json.dumps({"concepts": {}, "verdicts": {}}))
    assert main(["report", str(tmp_path), "--read"]) == 2
    error = capsys.readouterr().err
    assert (
        "holds a run of steering: --read loads the model of a run of patch, attribute, circuit, restore again" in error
    )
    assert error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kept", ["attribute", "patch", "restore"])
def test_reports_are_accessible(browser, tmp_path, kept, scheme):
    folder = shutil.copytree(Path(__file__).parents[1] / "runs" / "folders" / kept, tmp_path / kept)
    assert main(["report", str(folder)]) == 0
    browser.get((folder / "report.html").as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert serious_findings(browser, scheme) == []
