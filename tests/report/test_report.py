"""The report: nothing in it runs, nothing in it loads, nothing missing breaks it."""

import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from browsing import serious_findings

from saepatch.errors import UserError
from saepatch.report import (
    BarChart,
    Bars,
    Chips,
    Choice,
    ColouredTokens,
    Comparison,
    Details,
    EstimateCell,
    Facts,
    GraphEdge,
    GraphNode,
    Headline,
    HeatMap,
    Histogram,
    LineChart,
    Link,
    NodeGraph,
    Notices,
    Page,
    Points,
    Reference,
    ScatterChart,
    Section,
    Series,
    Table,
    keep_page,
    read_page,
    render,
    write_figure,
    write_page,
)
from saepatch.report.charts import bar_chart, line_chart, scatter_chart
from saepatch.report.graphs import node_graph
from saepatch.report.heat_maps import heat_map
from saepatch.report.scales import linear, logarithmic
from saepatch.report.svg import NARROW, WIDE
from saepatch.report.text import common_format, finite, number, visible

pytestmark = pytest.mark.whole

NAN, INF = math.nan, math.inf
EVIL = '</script><script>window.hit=1</script><img src=x onerror="window.hit=2">\'" & {{ 7*7 }} '
EVIL += "\u202etxt\u200b\x1b[0m\ud800\n"


def page_of(*blocks, title="A page", text="") -> Page:
    return Page(title, "What was found.", [Section("Results", text, list(blocks))], Facts({"seed": "0"}))


def every_block(text: str) -> list:
    """One of each kind, with the text wherever a text can stand and numbers missing wherever one can be."""
    gaps = [1.0, None, NAN, INF, -2.0]
    xs = [0.0, 1.0, 2.0, 3.0, 4.0]
    return [
        Facts({text: text}),
        Headline({text: text}),
        Table([text, "n"], [[text, 1.5], [None, None], [text, EstimateCell(0.5, NAN, 1.0)], [True, NAN]], text),
        LineChart(text, text, text, [Series(text, xs, gaps, gaps, gaps)], text, True, [Reference(0.5, text)]),
        BarChart(text, [text] * 5, [Bars(text, gaps, gaps, gaps)] * 2, text, text, [Reference(0.5, text)]),
        HeatMap(text, [text], [text] * 5, [gaps], text, text, text),
        ScatterChart(text, text, text, [Points(text, xs, gaps, [text] * 5), Points(text, gaps, xs)], text, True, text),
        Comparison(text, [(text, text), ("b", text)], [text, "script", ""]),
        Comparison(text, [(text, "a"), ("b", text)], changes=True),
        Notices([text]),
        Histogram(text, text, text, [0, 1, 2], [3, 0], text),
        Chips(text, [(text, 1.0), (Link(text, "latent-x"), NAN)]),
        HeatMap(
            text,
            [text],
            [text] * 12,
            [[NAN, *range(11)]],
            text,
            columns_below=[text] * 12,
            keys=[[text] * 12],
            anchors=["latent-x"],
        ),
        Choice(text, [(text, [Table([text], [[Link(text, "latent-x")]], text, keys=[[text]])]), (text, [])]),
        NodeGraph(
            text,
            [text, text],
            [text] * 3,
            [GraphNode(text, text, 0, 0, NAN, "latent-x"), GraphNode(text, text, 1, 2, None, outlined=True)],
            [GraphEdge(0, 1, 0.5), GraphEdge(0, 1, NAN)],
            text,
        ),
        Details("latent-x", text, text, [Facts({text: text})]),
        ColouredTokens([text] * 5, gaps, text),
    ]


class Reader(HTMLParser):
    """Collects the elements, their attributes and the text of a page."""

    def __init__(self, source: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.texts.append(data)


@pytest.fixture(scope="module")
def evil_source() -> str:
    return render(Page(EVIL, EVIL, [Section(EVIL, EVIL, every_block(EVIL))], Facts({EVIL: EVIL})))


def test_foreign_text_stays_text(evil_source):
    reader = Reader(evil_source)
    assert [tag for tag, _ in reader.elements].count("script") == 1
    assert not [tag for tag, _ in reader.elements if tag in {"img", "iframe", "object", "embed", "form", "base"}]
    assert not [name for _, attrs in reader.elements for name in attrs if name.startswith("on")]
    text = "".join(reader.texts)
    assert "</script><script>window.hit=1" in text
    assert "{{ 7*7 }}" in text
    assert "⟨U+202E⟩txt⟨U+200B⟩⟨U+001B⟩[0m\ufffd↵\n" in text
    assert not re.search("[\u202a-\u202e\u200b\x00-\x08\x0b-\x1f\ud800]", evil_source)


def test_a_page_loads_nothing(evil_source):
    reader = Reader(evil_source)
    loading = [
        (tag, attrs[name]) for tag, attrs in reader.elements for name in ("src", "href", "srcset") if name in attrs
    ]
    assert all(target.startswith(("#", "data:")) for _, target in loading)
    styles = re.search(r"<style>(.*?)</style>", evil_source, re.DOTALL).group(1)
    assert "url(" not in styles
    assert "@import" not in styles
    assert "http://" not in evil_source
    assert "https://" not in evil_source
    (policy,) = [a["content"] for _, a in reader.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy


def test_missing_numbers_never_reach_a_drawing(evil_source):
    drawings = re.findall(r"<svg.*?</svg>", evil_source, re.DOTALL)
    assert len(drawings) > 6
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        for node in root.iter():
            for name, value in node.attrib.items():
                if name not in {"aria-label", "class"}:
                    assert not re.search(r"nan|inf|None", value), (name, value)
    assert "nan" not in "".join(Reader(evil_source).texts).lower().replace("window.hit", "")


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize(
    "draw",
    [
        lambda width: line_chart(LineChart("t", "x", "y", []), width),
        lambda width: line_chart(LineChart("t", "x", "y", [Series("s", [], [])], log_x=True), width),
        lambda width: line_chart(LineChart("t", "x", "y", [Series("s", [3], [0.0])], log_x=True), width),
        lambda width: line_chart(LineChart("t", "x", "y", [Series("s", [0, 0], [5, 5])], log_x=True), width),
        lambda width: line_chart(LineChart("t", "x", "y", [Series("s", [1, 2], [NAN, None])]), width),
        lambda width: line_chart(LineChart("t", "x", "y", [Series("s", [1, 2], [1e30, -1e30])]), width),
        lambda width: bar_chart(BarChart("t", [], []), width),
        lambda width: bar_chart(BarChart("t", ["a"], [Bars("b", [None])]), width),
        lambda width: bar_chart(BarChart("t", ["a"], [Bars("b", [-3e-9])], value_range=(0, 1)), width),
        lambda width: heat_map(HeatMap("t", [], [], []), width),
        lambda width: heat_map(HeatMap("t", ["a"], ["b"], [[0.0]]), width),
        lambda width: heat_map(HeatMap("t", ["a"] * 60, ["b"] * 90, [[NAN] * 90] * 60), width),
        lambda width: scatter_chart(ScatterChart("t", "x", "y", []), width),
        lambda width: scatter_chart(ScatterChart("t", "x", "y", [Points("p", [NAN], [1.0])], identity=True), width),
        lambda width: scatter_chart(ScatterChart("t", "x", "y", [Points("p", [2.0], [2.0])], identity=True), width),
        lambda width: scatter_chart(ScatterChart("t", "x", "y", [Points("p", [1e30], [-1e30])], identity=True), width),
    ],
)
def test_charts_of_next_to_nothing(draw, width):
    root = ElementTree.fromstring(str(draw(width).svg()))
    assert root.attrib["viewBox"].split()[2] == str(width)


def test_lines_break_at_a_gap_and_bands_go_with_them():
    line = Series("s", [1, 2, 3, 4, 5], [1, 2, None, 4, 5], [0, 1, None, 3, 4], [2, 3, None, 5, 6])
    drawing = str(line_chart(LineChart("t", "x", "y", [line]), WIDE).svg())
    assert drawing.count("<polyline") == 2
    assert drawing.count("<polygon") == 2
    assert "s\nat 2: 2 [1, 3]" in drawing.replace("↵", "").replace("&#10;", "\n")


def test_a_scatter_shows_every_point_and_the_line_of_equal_values():
    points = Points("p", [0.0, 1.0, 4.0, None], [0.0, 2.0, 2.0, 1.0], ["a", "b", "c", "d"])
    chart = ScatterChart("t", "exact", "estimate", [points, Points("q", [-1.0], [0.5])], "n = 4", identity=True)
    root = ElementTree.fromstring(str(scatter_chart(chart, WIDE).svg()))
    tips = [node.text for node in root.iter("title")]
    assert tips == ["p, a: 0, 0", "p, b: 1, 2", "p, c: 4, 2", "q: −1, 0.500"]
    places = {
        tip: tuple(float(mark.find("circle").get(key)) for key in ("cx", "cy"))
        for tip, mark in zip(tips, (node for node in root.iter("g") if node.get("class") == "mark"))
    }
    (line,) = [node for node in root.iter("line") if node.get("class") == "reference"]
    (x1, y1), (x2, y2) = [(float(line.get(f"x{i}")), float(line.get(f"y{i}"))) for i in "12"]

    def above(place):
        """How far a place stands over the line."""
        return y1 + (y2 - y1) * (place[0] - x1) / (x2 - x1) - place[1]

    found = sorted(places.values())
    assert [round(above(place), 1) == 0 for place in found] == [False, True, False, False]  # (0, 0) is on the line
    assert [above(place) > 0 for place in (found[0], found[2], found[3])] == [True, True, False]
    plain = scatter_chart(ScatterChart("t", "x", "y", [points]), WIDE).svg()
    assert "reference" not in str(plain)
    source = render(page_of(chart))
    assert source.count('class="point"') == 4 * 2 + 2  # both widths, and the legend
    assert "<bdi>c</bdi>" in source  # in the table behind it


@pytest.mark.parametrize(
    ("value", "spec", "shown"),
    [
        (None, "", "–"),
        (NAN, ".1%", "–"),
        (-INF, "", "−∞"),
        (0, "", "0"),
        (1024, "", "1,024"),
        (1024, "d", "1024"),
        (-0.5, "", "−0.500"),
        (0.98, ".0%", "98\u00a0%"),
        (-0.0001, ".1%", "0.0\u00a0%"),
        (1.25e-6, "", "1.25e−6"),
    ],
)
def test_numbers(value, spec, shown):
    assert number(value, spec) == shown


def test_which_numbers_can_be_drawn():
    assert all(finite(value) for value in (0, -1.5, np.float32(2), np.int64(3)))
    assert not any(finite(value) for value in (None, NAN, INF, "1"))


def test_one_format_for_a_column():
    assert common_format([1.0, 2.0, None]) == ",.0f"
    assert common_format([0.5, 0.25, NAN]) == ",.3f"
    assert common_format([12.5, 1.25]) == ",.1f"
    assert common_format([1e-6, 2.5e-7]) == ".1e"
    assert common_format([0.5, 1e-9]) == ""
    assert common_format([]) == ""


def test_visible():
    assert visible("a\tb\r\nc\x7f") == "a⇥\tb⟨U+000D⟩↵\nc⟨U+007F⟩"
    assert visible("naïve – 👩‍🔬 日本") == "naïve – 👩‍🔬 日本"


def test_axes():
    axis = linear([-0.01, 0.99, 1.04], 0, 100)
    assert axis.ticks == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert axis(-5) == 0 < axis(0) < axis(1) < axis(50) == 100
    assert linear([3, 9], 0, 1).low == 0
    assert linear([7, 9], 0, 1).low > 0
    assert logarithmic([0, 1, 2, 4], 0, 100).ticks == (0.0, 1, 2, 4)
    assert logarithmic([2**k for k in range(11)], 0, 100, count=6).ticks == (1, 4, 16, 64, 256, 1024)
    assert logarithmic([1, 7, 30, 100, 700, 1000], 0, 100, count=4).ticks == (1, 10, 100, 1000)


def test_ticks_of_a_logarithmic_axis_do_not_run_into_each_other():
    """Few enough to be ticks themselves, and two of them too close to be read."""
    crowded = [1.08, 1.09, 1.22, 1.78, 5.13, 19.2]
    axis = logarithmic(crowded, 40, 700, 12)
    assert axis.ticks == (2.0, 5.0, 10.0)
    assert logarithmic([1.08, 1.78, 5.13, 19.2], 40, 700, 12).ticks == (1.08, 1.78, 5.13, 19.2)


def test_a_long_name_of_an_axis_stays_on_a_narrow_page():
    def placed(name):
        chart = LineChart("t", name, "y", [Series("s", [1, 2], [1, 2])])
        texts = re.findall(
            r'<text x="([\d.]+)"[^>]*text-anchor="(\w+)">([^<]*)</text>', "".join(line_chart(chart, NARROW).parts)
        )
        ((x, anchor),) = [(float(x), anchor) for x, anchor, text in texts if text == name]
        return x, anchor

    assert placed("perplexity of the continuations under the unsteered model") == (NARROW, "end")
    assert placed("latents")[1] == "middle"


def test_numbers_of_a_map_are_set_small_before_they_are_left_out():
    """One number below 0 is a character longer, and used to take the numbers off the whole map."""

    def cells(values, columns=17):
        chart = HeatMap("t", ["resid_post.0"], [""] * columns, [values], value_format=".2f")
        return re.findall(r'class="(cell[^"]*)"[^>]*>([^<]*)<', "".join(heat_map(chart, WIDE).parts))

    assert cells([0.5] * 17)[0] == ("cell strong", "0.50")
    assert cells([-0.25, *[0.5] * 16])[:2] == [("cell fine", "−0.25"), ("cell fine strong", "0.50")]
    assert cells([-0.25, *[100.5] * 16]) == []
    # In the light, dark letters are read more easily on a colour of middling depth; in the dark, too: on a light one.
    assert [kind for kind, _ in cells([1.0, 0.95, 0.85, 0.7, 0.5], 5)] == [
        *["cell strong"] * 2,
        *["cell mid"] * 2,
        "cell",
    ]
    assert [kind for kind, _ in cells([1.0, -0.85, -0.7, -0.5], 4)] == [
        "cell strong",
        "cell strong",
        "cell mid",
        "cell",
    ]


def test_a_logarithmic_axis_of_less_than_two_powers_of_ten():
    """Values that are too many to be ticks themselves."""
    assert logarithmic([1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 2.3, 2.4], 0, 100, 8).ticks == (2.0,)
    assert logarithmic(np.linspace(1.5, 95, 30).tolist(), 0, 100, 8).ticks == (2.0, 5.0, 10.0, 20.0, 50.0)
    assert logarithmic(np.linspace(1.1, 1.9, 30).tolist(), 0, 100, 8).ticks == (pytest.approx(1.1), pytest.approx(1.9))


def test_the_numbers_along_an_axis_have_their_format():
    drawn = "".join(
        line_chart(LineChart("t", "x", "y", [Series("s", [0.01, 0.25], [1, 2])], x_format=".0%"), WIDE).parts
    )
    assert "at 25\u00a0%: " in drawn


def test_a_table_shows_intervals_formats_and_gaps():
    source = render(
        page_of(
            Table(
                ["site", "ce", "id"], [["a", EstimateCell(0.9, 0.8, 0.95), 1024], ["b", None, 7]], "n = 3", {"id": "d"}
            )
        )
    )
    assert "<bdi>0.900</bdi> <small>[0.800, 0.950]</small>" in source
    assert "<bdi>1024</bdi>" in source
    assert 'data-key=""><bdi>–</bdi>' in source


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Table(["a", "b"], [[1]]), "1 cells for 2 columns"),
        (lambda: Table(["a"], [], formats={"b": "d"}), "format for"),
        (lambda: Series("s", [1, 2], [1]), "x 2, y 1"),
        (lambda: Series("s", [1], [1], [0, 0], [1]), "low 2"),
        (lambda: Bars("s", [1], high=[]), "high 0"),
        (lambda: BarChart("t", ["a"], [Bars("b", [])]), "labels 1, values 0"),
        (lambda: HeatMap("t", ["a"], ["b"], [[1, 2]]), "columns 1, values 2"),
        (lambda: ColouredTokens(["a"], []), "tokens 1, values 0"),
        (lambda: Points("p", [1, 2], [1]), "x 2, y 1"),
        (lambda: Points("p", [1], [1], []), "labels 0"),
        (lambda: LineChart("t", "x", "y", [Series("s", [-1], [1])], log_x=True), "negative x"),
        (lambda: NodeGraph("t", ["r"], ["c"], [GraphNode("n", "n", 1, 0)], []), "row 1"),
        (lambda: NodeGraph("t", ["r"], ["c"], [], [GraphEdge(0, 0, 1.0)]), "joins 0 and 0"),
    ],
)
def test_blocks_that_do_not_fit_together(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_changed_words_are_marked():
    columns = [
        ("before", "Sure, here is <a> plan"),
        ("after", "I cannot, here is <b> plan"),
        ("other: bad", "Sure, here is <a> plan"),
    ]
    source = render(page_of(Comparison("p", columns, changes=True, outcomes=("good", "bad"))))
    answers = re.findall(r'<bdi class="model">(.*?)</bdi></div>', source)
    assert answers == [
        "Sure, here is &lt;a&gt; plan",
        "<mark>I cannot,</mark> here is <mark>&lt;b&gt;</mark> plan",
        "Sure, here is &lt;a&gt; plan",
    ]
    assert '<span class="label">other: <span class="outcome s1">bad</span></span>' in source


def test_equal_answers_share_a_column():
    columns = [
        ("bare: did", "x"),
        ("restored: did not", "y"),
        ("random: did", "x"),
        ("matched: did", "x"),
        ("odd", "x"),
    ]
    source = render(page_of(Comparison("p", columns, label="Prompt, harmful")))
    assert re.findall(r'<div><span class="label">(.*?)</span>', source) == [
        "bare, random, matched: did",
        "restored: did not",
        "odd",
    ]
    assert '<span class="label">Prompt, harmful</span>' in source


def test_prose_and_anchors():
    page = Page("t", "One.\n\nTwo `a<b` 5 %, 7%.", [Section("Same"), Section("Same"), Section("日本")])
    source = render(page)
    assert "<p>One.</p>\n<p>Two <code>a&lt;b</code> 5\u00a0%, 7\u00a0%.</p>" in source
    ids = re.findall(r'<section id="([^"]+)"', source)
    assert len(set(ids)) == 3
    assert all(f'href="#{name}"' in source for name in ids)


def test_a_kept_page_is_the_same_page(tmp_path):
    card = Details("c", EVIL, "s", [Facts({"block": "mapping", EVIL: "x"})], [(EVIL, "https://a.org")])
    blocks = [*every_block(EVIL), card, Choice(EVIL, [(EVIL, [Table(["n"], [[np.float64(2)], [-INF]])])])]
    page = page_of(*blocks, title=EVIL)
    kept = json.loads(keep_page(page, tmp_path / "page.json").read_text("utf-8"))
    assert render(read_page(kept)) == render(page)
    names = set(re.findall(r'"block": "([A-Z]\w+)"', json.dumps(kept)))
    assert {"Card", "Tokens", "Interval"} <= names  # as in pages kept before these classes were renamed
    for spoiled in ({"block": "Facts", "items": []}, {"block": "Page", "pears": 1}, {}, [], {"block": "Any"}, 3):
        with pytest.raises(UserError, match="run its command again"):
            read_page(spoiled)


def test_writing_is_whole_or_not_at_all(tmp_path):
    target = tmp_path / "runs" / "report.html"
    assert write_page(page_of(title="first"), target) == target
    write_page(page_of(title="second"), target)
    assert "second" in target.read_text(encoding="utf-8")
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]
    assert target.stat().st_mode & 0o777 == 0o644

    target.unlink()
    target.mkdir()
    (target / "occupied").touch()
    with pytest.raises(UserError, match="choose another place") as caught:
        write_page(page_of(), target)
    assert "\n" not in str(caught.value)
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]  # no leavings


def test_a_figure_stands_alone(tmp_path):
    line, bars, heat, points = every_block(EVIL)[3:7]
    for name, chart in (("line", line), ("bars", bars), ("heat", heat), ("points", points)):
        path = write_figure(chart, tmp_path / "figures" / f"{name}.svg")
        root = ElementTree.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        (style,) = root.iter("{http://www.w3.org/2000/svg}style")
        assert "#0b62a8" in style.text
        assert not re.search(r"var\(|color-mix|--|url\(", style.text)
        assert not list(root.iter("{http://www.w3.org/2000/svg}script"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the figure"):
        write_figure(line, tmp_path / "file" / "line.svg")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the report"):
        write_page(page_of(), tmp_path / "file" / "report.html")


def test_shares_of_a_whole_are_one_bar():
    sets = [Bars("refused", [0.25, 0.0]), Bars("complied", [0.75, None]), Bars("degenerate", [0.0, 1.0])]
    drawn = bar_chart(BarChart("outcomes", ["bare", "restored"], sets, shares=True, value_range=(0, 1)), WIDE)
    bars = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)"[^>]*class="bar"', "".join(drawn.parts))
    (x, y, wide), (x2, y2, wide2), (x3, y3, wide3) = [tuple(map(float, bar)) for bar in bars]
    assert y == y2 < y3
    assert x == x3
    assert x2 == pytest.approx(x + wide, abs=0.02)
    assert wide + wide2 == pytest.approx(wide3, abs=0.02)
    assert wide2 == pytest.approx(3 * wide, abs=0.05)


# In a browser


@pytest.mark.browser
def test_in_a_browser(browser, tmp_path):
    rows = [["b", 2.0], ["a", None], ["c", 10.0], ["d", EstimateCell(-1.0, -2.0, 0.0)]]
    table = Table(["name", "value"], rows)
    path = write_page(
        Page("t", EVIL, [Section("Table", "", [table]), Section("All", EVIL, every_block(EVIL))]), tmp_path / "r.html"
    )
    browser.get(path.as_uri())
    assert browser.execute_script("return window.hit") is None
    assert browser.get_log("browser") == []

    heads = browser.find_elements("css selector", "section:first-of-type th button")

    def order():
        return "".join(
            cell.text for cell in browser.find_elements("css selector", "section:first-of-type td:first-child")
        )

    assert order() == "bacd"
    heads[1].click()
    assert order() == "cbda"  # the largest first, the gap last
    heads[1].click()
    assert order() == "dbca"  # the gap stays last
    heads[0].send_keys("\ue007")  # Enter, from the keyboard
    assert order() == "abcd"
    assert browser.find_element("css selector", "section:first-of-type th").get_attribute("aria-sort") == "ascending"

    # Two of a kind share the row of a wide page, each in its narrow form.
    for width, shown, hidden in ((1280, "narrow", "wide"), (1000, "wide", "narrow"), (400, "narrow", "wide")):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        assert browser.find_element("css selector", f".chart .{shown}").is_displayed()
        assert not browser.find_element("css selector", f".chart .{hidden}").is_displayed()
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.get_log("browser") == []


def large_graph(nodes, edges):
    places = [GraphNode(f"node {i}", f"n{i}", i % 4, i % 7, (-1.0) ** i * i) for i in range(nodes)]
    joined = [(i * 37 % nodes, (i * 53 + 1) % nodes) for i in range(edges)]
    joined = [(u, d) if places[u].row < places[d].row else (d, u) for u, d in joined]
    links = [GraphEdge(u, d, (i % 50 + 1) * (-1.0) ** i / 50) for i, (u, d) in enumerate(joined)]
    return NodeGraph("Large", ["a", "b", "c", "d"], [str(i) for i in range(7)], places, links)


def test_a_graph_has_its_nodes_in_rows_from_bottom_to_top():
    nodes = [GraphNode("up", "u", 0, 0, 1.0), GraphNode("beside", "b", 0, 1, -0.5), GraphNode("down", "d", 1, 1, None)]
    graph = NodeGraph("t", ["low", "high"], ["1", "2"], nodes, [GraphEdge(0, 2, 0.25), GraphEdge(1, 2, -1.0)])
    root = ElementTree.fromstring(str(node_graph(graph).svg()))
    drawn = {g.attrib["data-name"]: g.attrib for g in root.iter() if g.attrib.get("class") == "node"}
    (up, beside, down) = ((float(drawn[n]["data-x"]), float(drawn[n]["data-y"])) for n in ("up", "beside", "down"))
    assert up[1] == beside[1] > down[1]
    assert up[0] < beside[0] == down[0]
    edges = [path.attrib for path in root.iter() if path.attrib.get("class", "").startswith("edge")]
    assert [(e["class"], e["data-weight"]) for e in edges] == [("edge", "0.25"), ("edge negative", "-1")]
    assert float(edges[1]["stroke-width"]) > float(edges[0]["stroke-width"])
    assert node_graph(NodeGraph("nothing", [], [], [], [])).width > 0


@pytest.mark.browser
@pytest.mark.parametrize(("scheme", "width"), [("light", 1400), ("dark", 420)])
def test_every_block_is_accessible(browser, tmp_path, scheme, width):
    path = write_page(page_of(*every_block("plain text"), text="Some words."), tmp_path / "r.html")
    browser.get(path.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert serious_findings(browser, scheme, width) == []


@pytest.mark.browser
def test_a_graph_is_read_by_pointer_and_keyboard(browser, tmp_path):
    card = Details("c", "A card", "s", [])
    nodes = [GraphNode("up", "u", 0, 0, 1.0, "c"), GraphNode("beside", "b", 0, 1, -0.5), GraphNode("down", EVIL, 1, 1)]
    graph = NodeGraph("t", ["low", "high"], ["1", "2"], nodes, [GraphEdge(0, 2, 0.25), GraphEdge(1, 2, -1.0)])
    path = write_page(Page("t", "", [Section("One", "", [graph, large_graph(400, 1500), card])]), tmp_path / "r.html")
    browser.get(path.as_uri())
    browser.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})  # a later window is behind
    first = browser.find_element("css selector", "figure")
    panel = first.find_element("css selector", ".picked")
    svg = first.find_element("css selector", ".graph svg")
    up, beside, down = first.find_elements("css selector", ".node")
    browser.execute_script("arguments[0].focus()", up)
    assert "dimmed" in svg.get_attribute("class")
    assert [node.get_attribute("class") for node in (up, beside, down)] == ["node lit", "node", "node lit"]
    up.send_keys("\ue007")  # Enter
    assert "Edges out of it" in panel.text
    assert "0.25" in panel.text
    assert panel.find_element("css selector", "a").get_attribute("href").endswith("#c")
    up.send_keys("\ue013")  # arrow up, to the higher row
    assert browser.switch_to.active_element == down
    down.send_keys("\ue007")
    assert panel.text.count("\n") >= 2  # both edges into it
    assert browser.execute_script("return window.hit") is None
    slider = first.find_element("css selector", "input.least")
    browser.execute_script("arguments[0].value = 80; arguments[0].dispatchEvent(new Event('input'))", slider)
    hidden = [edge.get_attribute("class") for edge in first.find_elements("css selector", ".edge")]
    assert hidden == ["edge lit hidden", "edge negative lit"]
    assert "1 of 2 edges" in first.text
    browser.refresh()
    assert "1 of 2 edges" in browser.find_element("css selector", "figure").text  # the address has the view
    lit = browser.execute_script(
        """const figure = document.querySelectorAll("figure")[1];
        return [...figure.querySelectorAll(".node")].slice(0, 50).map((node) => {
          node.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
          return figure.querySelectorAll(".edge.lit").length;
        });"""
    )
    assert max(lit) > 1  # of 400 nodes and 1,500 edges
    assert max(lit) < 1500
    assert browser.get_log("browser") == []


@pytest.mark.browser
def test_cards_are_searched_and_sorted(browser, tmp_path):
    said = {
        "resid_post.3 40": "fires at 2.0 % of tokens, raises ␣she",
        "resid_post.3 7": "fires at 11.5 % of tokens",
        "resid_post.2 9": "never fired here",
        "resid_post.3 100": "fires at 0.3 % of tokens, raises ␣he",
    }
    words = [Chips("words", [(EVIL, 1.0)])]
    cards = [Details(f"c{n}", name, line, words) for n, (name, line) in enumerate(said.items())]
    few = [Details(f"d{n}", "A card", "", words) for n in range(3)]
    path = write_page(Page("t", "", [Section("One", "", few), Section("Cards", "", cards)]), tmp_path / "r.html")

    def shown():
        names = browser.find_elements("css selector", "section:last-of-type details.card:not([hidden]) h3")
        return [name.text.removeprefix("resid_post.") for name in names]

    def enter(selector, value):
        browser.execute_script(
            "const e = document.querySelector(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event(e.matches('select') ? 'change' : 'input'))",
            f"section:last-of-type .tools {selector}", value,
        )  # fmt: skip

    browser.get(path.as_uri())
    assert browser.find_elements("css selector", "section:first-of-type .tools") == []  # so few need no search
    assert shown() == ["3 40", "3 7", "2 9", "3 100"]
    enter("select", "name")
    assert shown() == ["2 9", "3 7", "3 40", "3 100"]
    enter("select", "how often they fire")
    assert shown() == ["3 7", "3 40", "3 100", "2 9"]
    enter("input", "RAISES")
    assert shown() == ["3 40", "3 100"]
    assert browser.find_element("css selector", "section:last-of-type .count").text == "2 of 4"
    there = browser.current_url
    browser.get("about:blank")
    browser.get(there)
    assert shown() == ["3 40", "3 100"]  # the address holds the view
    browser.get("about:blank")
    browser.get(f"{there.split('#')[0]}#c2&{there.split('&', 1)[1]}")  # a link to a card that the search leaves out
    assert shown() == ["3 40", "3 100", "2 9"]
    assert browser.execute_script("return window.hit") is None


@pytest.mark.browser
def test_paper_has_the_top_of_long_tables_and_cards_that_are_open(browser, tmp_path):
    """What is filtered away takes no room of it, and the page is afterwards what it was."""
    table = Table(["name", "even"], [[f"row {n}", "yes" if n % 2 == 0 else "no"] for n in range(120)], "All.")
    small = Table(["a"], [[1.0]], "Small.")
    card = Details("c", "A card", "s", [Histogram("Counts", "x", "y", [0, 1, 2], [3, 1])])
    path = write_page(Page("t", "", [Section("One", "", [table, small, card])]), tmp_path / "r.html")
    browser.get(path.as_uri())
    browser.find_element("css selector", "input").send_keys("yes")
    browser.execute_script("document.querySelector('details.card').open = true")
    before = browser.execute_script("return document.querySelector('main').innerHTML")
    browser.execute_script("toPaper()")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    shown = [row.text for row in browser.find_elements("css selector", "tbody tr") if row.is_displayed()]
    assert shown == [*(f"row {n} yes" for n in range(0, 40, 2)), "1"]
    assert [note.text for note in browser.find_elements("css selector", ".onpaper")] == [
        "The first 20 of 60 rows; the others are in the page itself."
    ]
    assert browser.find_element("css selector", "details.card h4").text == "Counts"  # below the card's own h3
    assert not any(tools.is_displayed() for tools in browser.find_elements("css selector", ".tools, .sideways"))
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    browser.execute_script("fromPaper()")
    after = browser.execute_script("return document.querySelector('main').innerHTML")
    assert after.replace(' class=""', "") == before

    stops = browser.execute_script("return all('.scroll').filter(b => b.closest('.table')).map(b => b.tabIndex)")
    assert stops == [0, -1]  # the keyboard stops at what it can scroll, and at nothing else
    names = browser.execute_script("return all('figure').map(f => f.getAttribute('aria-label'))")
    assert names == ["Table of name, even", "Table of a", "Counts"]
    assert browser.get_log("browser") == []


@pytest.mark.browser
def test_a_map_that_scrolls_begins_at_its_numbers_and_keeps_its_rows_names(browser, tmp_path):
    size = {"width": 420, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    columns = [str(n) for n in range(20)]

    def heat(title, first):
        values = [[None if n < first else n - 12.5 for n in range(20)]] * 2
        keys = [[f"{row}/{n}" for n in range(20)] for row in "ab"]
        return HeatMap(title, ["row a", "row b"], columns, values, keys=keys, anchors=["c", ""])

    card = Details("c", "A card", "s", [])
    path = write_page(
        Page(
            "t",
            "",
            [Section("One", "", [heat("Late", 10), Choice("Show", [("x", []), ("y", [heat("Early", 0)])]), card])],
        ),
        tmp_path / "r.html",
    )
    browser.get(path.as_uri())
    late, early = browser.find_elements("css selector", ".drawing.scroll")
    names = late.find_element("css selector", ".names")
    first = late.find_element("css selector", ".pick")
    right_of_names = names.rect["x"] + names.rect["width"]
    assert names.text.split("\n") == ["row a", "row b"]
    assert names.rect["x"] == late.rect["x"]
    assert right_of_names <= first.rect["x"] <= right_of_names + 10
    assert first.get_attribute("data-key") == "a/10"
    assert not early.find_elements("css selector", ".names")  # it is not there yet
    browser.find_elements("css selector", "option")[1].click()
    assert early.find_element("css selector", ".names").is_displayed()
    assert browser.execute_script("return arguments[0].scrollLeft", early) == 0
    browser.execute_script("arguments[0].scrollLeft = 200", early)
    assert early.find_element("css selector", ".names").rect["x"] == early.rect["x"]
    texts = browser.execute_script("return all('figure.chart').map(standalone)")
    assert [text.count(">row a<") for text in texts] == [1, 1]
    names.find_element("css selector", "a").click()
    assert browser.execute_script("return location.hash").startswith("#c&")
    assert browser.find_element("id", "c").get_attribute("open")
    assert browser.get_log("browser") == []
