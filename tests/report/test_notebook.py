"""Fragments for notebooks: self-contained, escaped, small, and coloured as the notebook's theme asks."""

import re
from pathlib import Path

import pytest
from browsing import chromium

from saepatch import report
from saepatch.errors import UserError

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\u202e"
CHART = report.BarChart("Bars", [HOSTILE, "b"], [report.Bars("one", [0.5, -0.2], [0.4, -0.3], [0.6, -0.1])])
MAP = report.HeatMap("Map", ["r"], ["a", "b"], [[1.0, None]])
BLOCKS = [
    report.Facts({"model": HOSTILE}),
    report.Notices([HOSTILE]),
    report.Table(["latent", "effect"], [[HOSTILE, report.EstimateCell(0.5, 0.4, 0.6)]], HOSTILE),
    CHART,
    MAP,
    report.Comparison(HOSTILE, [("before", HOSTILE), ("after", "text")], changes=True),
    report.ColouredTokens([HOSTILE, "b"], [1.0, -1.0]),
    report.Chips("near", [(HOSTILE, 0.5)]),
]


def test_a_fragment_loads_nothing_runs_nothing_and_escapes_every_text():
    html = report.fragment(BLOCKS, HOSTILE)
    assert "<script" not in html
    assert "<img" not in html
    assert "\u202e" not in html
    assert not re.search(r"https?:|url\(|@import|\bon\w+=[^a]", html.replace("http://www.w3.org/2000/svg", ""))
    assert " id=" not in html  # several outputs share a page
    assert html.startswith('<div class="saepatch"')
    assert len(report.fragment([report.Facts({"a": "b"})], "t")) < 9_000
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1]
    selectors = re.findall(r"([^{}]+)\{", re.sub(r"@media[^{]*\{", "", style))
    assert all(".saepatch" in part for selector in selectors for part in re.split(r",(?![^(]*\))", selector))


def test_a_figure_is_saved_as_svg(tmp_path):
    figure = report.Figure(CHART)
    assert repr(figure) == "Figure: Bars (.save('figure.svg') writes it)"
    assert "<svg" in figure._repr_html_()
    assert figure.save(str(tmp_path / "deep" / "bars.svg")).read_text(encoding="utf-8").strip() == figure.svg()
    with pytest.raises(UserError, match=r"end the name 'bars.png' in .svg"):
        figure.save("bars.png")


@pytest.mark.browser
@pytest.mark.slow
def test_a_fragment_follows_the_theme_of_its_notebook(tmp_path):
    body = report.fragment(BLOCKS, "Title")
    with chromium(tmp_path) as browser:
        for name, frame, dark in (
            ("plain", "<body>{}</body>", False),
            ("lab", '<body data-jp-theme-light="false">{}</body>', True),
            ("code", '<body class="vscode-dark">{}</body>', True),
            ("docs", '<body data-md-color-scheme="slate">{}</body>', True),
            ("light lab on a dark machine", '<body data-jp-theme-light="true">{}</body>', False),
        ):
            prefers = "dark" if "dark machine" in name else "light"
            media = {"features": [{"name": "prefers-color-scheme", "value": prefers}]}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            Path(tmp_path / "page.html").write_text(f"<!doctype html><meta charset=utf-8>{frame.format(body)}")
            browser.get((tmp_path / "page.html").as_uri())
            colour = browser.execute_script(
                "return getComputedStyle(document.querySelector('.saepatch')).backgroundColor"
            )
            assert (int(re.findall(r"\d+", colour)[0]) < 100) == dark, (name, colour)
            assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
