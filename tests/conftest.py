"""Settings of the whole test run."""

import copy
import functools
import os
import signal
from pathlib import Path

import pytest
import torch
from browsing import chromium

from saepatch import organism
from saepatch.model.loading import load
from saepatch.runs import interpret

torch.set_num_threads(1)  # the models are tiny: threads cost more than they bring

os.fsync = lambda handle: None  # no test cuts the power, and a slow disk would take longer than all the tests

# A shell starts its background jobs with SIGINT ignored, and processes that tests start and interrupt would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Loading checks a model by some twenty forward passes, which takes longer than most tests. So the embedded models, and
# the folders that commands name, are loaded once a process, and tests get copies. This stands here because tests and
# commands import the function itself.
_load = load.load_model
_loaded = {}


PLAIN = (str, bool, int, float, type(None), torch.dtype, torch.device)


def _copied(name, folder, args, options):
    if not all(isinstance(value, PLAIN) for value in (*args, *options.values())):
        return _load(name, *args, **options)
    files = [(str(path), path.stat()) for path in sorted(Path(folder).rglob("*"))]
    key = (name, args, *sorted(options.items()), *((path, stat.st_mtime_ns, stat.st_size) for path, stat in files))
    if key not in _loaded:
        _loaded[key] = _load(name, *args, **options)
        if len(_loaded) > 8:
            del _loaded[next(iter(_loaded))]  # the oldest
    return copy.deepcopy(_loaded[key])


@functools.wraps(_load)
def _load_organism_once(name, *args, **options):
    embedded = name in organism.CHECKPOINTS
    return _copied(name, organism.path(name), args, options) if embedded else _load(name, *args, **options)


@functools.wraps(_load)
def _load_folders_once(name, *args, **options):
    if Path(name).is_dir():
        return _copied(name, name, args, options)
    return _load_organism_once(name, *args, **options)


load.load_model, interpret.load_model = _load_organism_once, _load_folders_once


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
