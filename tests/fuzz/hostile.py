"""Hostile values for tests, and how many cases of them are tried."""

import json
import os
from collections import Counter
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SCALE = int(os.environ.get("SAEPATCH_FUZZ", "1"))  # 100 under `make fuzz`
CASES: Counter[str] = Counter()


def fuzz(cases, **strategies):
    """Run a test on so many cases of the slice; `make fuzz` on a hundred times as many."""

    def decorate(test):
        limits = settings(
            max_examples=cases * SCALE,
            deadline=None,
            database=None,
            derandomize=SCALE == 1,
            suppress_health_check=list(HealthCheck),
        )
        return limits(given(**strategies)(test))

    return decorate


INTEGERS = st.one_of(st.integers(-3, 300), st.sampled_from([2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 10**4200]))
FLOATS = st.one_of(st.floats(), st.sampled_from([1e308, 5e-324, -0.0]))
SPECIAL = [
    "",
    " ",
    "\0",
    "\ud800",
    "\ufeff",
    "1e400",
    "null",
    "0/0",
    "٣",
    "9" * 5000,
    "a" * 300,
    "=cmd",
    "../..",
    "$HOME",
]
NAMES = [
    "ioi",
    "resid_post.3",
    "resid_post.3: 281; 3,17",
    "all",
    "1/4",
    "at: Mary",
    "3:7",
    "-1",
    "noise: Mary",
    "wandb",
]
TEXTS = st.one_of(st.sampled_from(SPECIAL + NAMES), st.text(max_size=12), st.text("0123456789.:;,|/-abe ", max_size=12))
SCALARS = st.one_of(st.none(), st.booleans(), INTEGERS, FLOATS, TEXTS)
VALUES = st.recursive(
    SCALARS, lambda some: st.one_of(st.lists(some, max_size=3), st.dictionaries(TEXTS, some, max_size=3)), max_leaves=6
)


def paths(value: Any, prefix: tuple = ()) -> list[tuple]:
    """The paths of all values inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, item in items for path in ((*prefix, key), *paths(item, (*prefix, key)))]


def changed(content: Any, changes: list[tuple[int, Any]]) -> str | None:
    """JSON with some of its values replaced; None where JSON cannot hold them."""
    content = json.loads(json.dumps(content))
    for number, value in changes:
        every = paths(content)
        if not every:
            break
        *before, last = every[number % len(every)]
        place = content
        for key in before:
            place = place[key]
        place[last] = value
    try:
        return json.dumps(content)
    except ValueError:
        return None


CHANGES = st.lists(st.tuples(st.integers(0, 10_000), VALUES), min_size=1, max_size=3)
