"""A headless browser for tests."""

import os
import shutil
from contextlib import contextmanager

import pytest


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
