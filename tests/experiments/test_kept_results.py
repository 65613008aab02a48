"""Results of stages come back from the disk as the values that they were."""

from dataclasses import fields, is_dataclass

import numpy as np
import pytest
from tiny import random_dictionary, tiny_model

from experiments.common.kept import KeptResults, from_json, to_json
from experiments.pairs.stages import DirectionKind, SiteRanking
from saepatch.data.pairs import PromptPair
from saepatch.engine.components import Edit, EditPart
from saepatch.measure.attribution import Attribution, attribute
from saepatch.measure.curves import Curve
from saepatch.measure.patching import patch_latents
from saepatch.measure.results.effects import Effects
from saepatch.model.sites import Site
from saepatch.records.statistics import Interval
from saepatch.runs.measurements import measurements

SITE = Site(1, "resid_post")
WITHHELD = Interval.withheld(0.5, 2, "2 pairs")


def same(a: object, b: object) -> bool:
    """Whether two values are equal, of the same types, arrays bit for bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if is_dataclass(a):
        return all(same(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(map(same, a.values(), b.values()))
    return a == b or a is b  # one NaN for all


@pytest.fixture(scope="module")
def results():
    model, dictionary = tiny_model("gpt2"), random_dictionary("resid_post.1")
    pairs = [PromptPair(f"the {a} sat", f"the {b} sat", "x", "y", f"pair {a}{b}") for a, b in ("ag", "bh", "ci")]
    effects = patch_latents(model, dictionary, pairs, [3, 5, [7, 9]])
    screen = attribute(model, dictionary, pairs, verify=3, sample=3)
    across = Edit.of([EditPart(SITE, (3,), 2), EditPart(Site(2), (1, 4), frozen=True)])
    return {
        "effects": effects,
        "attribution": screen,
        "curve": Curve((1, 2), (WITHHELD,) * 2, (WITHHELD,) * 2, (WITHHELD,) * 2, None, WITHHELD, (effects,)),
        "ranking": SiteRanking((3, 1), WITHHELD, {"denoise": WITHHELD, "noise": Interval(1, 0.5, 1.5, 9)}, 0.75),
        "kind": DirectionKind("latents", (1,), {"denoise": effects}),
        "edit": across,
    }


TYPES = {
    "effects": Effects,
    "attribution": Attribution,
    "curve": Curve,
    "ranking": SiteRanking,
    "kind": DirectionKind,
    "edit": Edit,
}


def test_results_are_read_back_as_they_were_and_not_computed_again(tmp_path, results):
    seconds = {}
    with measurements(tmp_path, "test", {"seed": 0}) as kept:
        first = KeptResults(kept, seconds)
        for name, value in results.items():
            assert same(first.get(f"stage/{name}", TYPES[name], lambda value=value: value), value), name
    with measurements(tmp_path, "test", {"seed": 0}) as kept:
        again = KeptResults(kept, {})
        for name, value in results.items():
            assert same(again.get(f"stage/{name}", TYPES[name], lambda: 1 / 0), value), name
        assert again.seconds == seconds
    assert np.isnan(results["curve"].top[0].low)
    assert results["effects"].ran.dtype == bool


def test_a_value_that_differs_is_not_the_same(results):
    """The comparison above would see a lost bit or type."""
    effects = results["effects"]
    kept = to_json(effects)
    assert same(from_json(Effects, kept), effects)
    kept["patched"] = to_json(np.nextafter(effects.patched, np.inf))
    assert not same(from_json(Effects, kept), effects)
    kept["patched"] = to_json(effects.patched.astype(np.float32))
    assert not same(from_json(Effects, kept), effects)


def test_values_of_a_stage_are_kept_and_timed(tmp_path):
    with measurements(tmp_path, "one", {}) as kept:
        seconds: dict[str, float] = {}
        values = KeptResults(kept, seconds).of_stage("steering")
        assert values.get("a/b", lambda: [1, 2]) == [1, 2]
        assert KeptResults(kept, seconds).value("steering/a/b", lambda: pytest.fail("again")) == [1, 2]
    assert list(seconds) == ["steering"]
