"""Settings of the whole test run."""

import os
import signal

import pytest
import torch
from browsing import chromium

from saepatch import organism

torch.set_num_threads(1)  # the models are tiny: threads cost more than they bring

os.fsync = lambda handle: None  # no test cuts the power, and a slow disk would take longer than all the tests

# A shell starts its background jobs with SIGINT ignored, and processes that tests start and interrupt would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Families whose layout another one, tested by default, has too.
MORE_FAMILIES = {"mistral", "qwen2", "qwen3", "gemma2", "phi", "opt"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if hasattr(item, "callspec") and MORE_FAMILIES & {str(value) for value in item.callspec.params.values()}:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module")
def few_texts():
    """One in eight of the texts that runs on the shipped model take their statistics over."""
    texts = organism.texts()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(organism, "texts", lambda: texts[::8])
        yield


@pytest.fixture(scope="session")
def shared_browser(tmp_path_factory):
    """One headless Chromium a process."""
    with chromium(tmp_path_factory.mktemp("browser")) as session:
        yield session


@pytest.fixture
def browser(shared_browser):
    """A new window without the last one's emulation, address or messages."""
    shared_browser.switch_to.new_window("window")
    for log in ("browser", "performance"):
        shared_browser.get_log(log)
    yield shared_browser
    shared_browser.close()
    shared_browser.switch_to.window(shared_browser.window_handles[0])
