"""A headless browser for tests, and axe-core over the page in it."""

import os
import shutil
import subprocess
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

HOW = "npm install --no-save axe-core"
SERIOUS = ("serious", "critical")


@contextmanager
def chromium(folder):
    """A headless Chromium; where there is none, the test is skipped."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    binary = next((found for name in names if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("no Chromium with chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-background-networking",
        "window-size=1400,1000",
        "force-prefers-reduced-motion",
    ):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={folder / 'profile'}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    os.environ["SE_OFFLINE"] = "true"  # selenium looks for no driver online
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver, log_output=os.devnull))
    try:
        yield session
    finally:
        session.quit()


@cache
def axe_core() -> Path | None:
    """The script of axe-core: beside the tests' clone, in a folder of NODE_PATH, or of npm's global packages."""
    roots = [
        Path(__file__).parents[2] / "node_modules",
        *map(Path, filter(None, os.getenv("NODE_PATH", "").split(":"))),
    ]
    if npm := shutil.which("npm"):
        told = subprocess.run([npm, "root", "--global"], capture_output=True, text=True, check=False).stdout.strip()
        roots.append(Path(told))
    return next((path for root in roots if (path := root / "axe-core" / "axe.min.js").is_file()), None)


def serious_findings(browser, scheme="light", width=1400):
    """What axe-core finds serious or critical on the page that is open, each with the first elements it is about."""
    if (script := axe_core()) is None:
        pytest.skip(f"axe-core is not installed: {HOW}")
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    # a page's own policy lets no other script run; the browser's debugger may
    browser.execute_cdp_cmd("Runtime.evaluate", {"expression": script.read_text(encoding="utf-8")})
    browser.set_script_timeout(120)
    found = browser.execute_async_script(
        "const done = arguments[arguments.length - 1];"
        "axe.run(document, {resultTypes: ['violations']}).then((r) => done(r.violations), (e) => done([String(e)]))"
    )
    assert all(isinstance(each, dict) for each in found), found
    return [
        (each["id"], each["help"], [node["html"][:160] for node in each["nodes"][:3]], len(each["nodes"]))
        for each in found
        if each["impact"] in SERIOUS
    ]
