"""What languages share: parallel pairs, overlaps, depths on a planted model, and a whole run."""

import json
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.cross_lingual import study
from experiments.cross_lingual.capitals import CAPITAL, COUNTRIES
from experiments.cross_lingual.page import crossing
from experiments.cross_lingual.study import (
    CrossLingualConfig,
    DepthOf,
    main,
    organism_pairs,
    overlap,
)
from saepatch.errors import UserError
from saepatch.records.statistics import Interval

pytestmark = pytest.mark.whole


def test_pairs_are_parallel_and_splits_share_no_prompt():
    found = organism_pairs(40, 0)
    prompts = {}
    for split, by_language in found.pairs.items():
        english, french = by_language["English"], by_language["French"]
        assert len(english) == len(french) >= 8
        for one, other in zip(english, french, strict=True):
            assert (one.answer, one.counter) == (other.answer, other.counter)
            assert one.clean != other.clean
        prompts[split] = {pair.clean for pair in (*english, *french)}
    assert not prompts["select"] & prompts["report"]
    assert all(count > 0 for count in found.left_out.values())
    assert len(found.cut["English"]) == len(found.pairs["report"]["English"])


def test_overlap_and_the_layer_at_which_the_source_wins():
    assert overlap([1, 2, 3, 4], [3, 4, 5]) == 0.5
    shares = tuple(Interval(value, 0, 1, 9) for value in (0.9, 0.2, 0.6, 0.8))
    depth = DepthOf((0, 1, 2, 3), shares, shares[:1] * 4, (0.0, 0.0))
    assert crossing(depth, depth.concept) == "layer 2"  # once it has won for good
    assert crossing(depth, depth.language) == "layer 0"
    assert crossing(depth, shares[1:2] * 4) == "no layer"


def test_every_country_is_written_in_every_language():
    for names in COUNTRIES.values():
        assert list(names) == list(CAPITAL)
    for templates in CAPITAL.values():
        assert len({beginning for beginning, _ in templates}) == 2


@pytest.mark.slow
def test_a_whole_run(tmp_path):
    config = CrossLingualConfig(str(tmp_path), pairs=10, latents=8)
    main(config)
    summary = json.loads((tmp_path / "summary.json").read_text())
    for name in ("English → French", "French → English"):
        best = max(summary["shared"].values(), key=lambda some: some[name]["own"][0])[name]
        assert best["overlap"] > best["chance"] + 0.2
        assert best["transfer"][0] > best["matched"][0] + 0.1
        assert summary["depth"][name]["unpatched"] == [0.0, 0.0]
    before = (tmp_path / "summary.json").read_text()
    main(config)
    assert (tmp_path / "summary.json").read_text() == before


def test_written_pairs_are_known_and_splits_share_no_pair_of_countries(monkeypatch):
    """Letters of the alphabet as countries, each with a capital of one token; the model knows those before "m"."""
    countries = {
        a: {"English": (a, a.upper()), "Spanish": (f"{a}{a}", f"{a.upper()}e"), "French": ("x", "x")} for a in "abcdmn"
    }
    monkeypatch.setattr(study, "COUNTRIES", countries)
    monkeypatch.setattr(study, "batch_pairs", lambda model, pairs: None)
    monkeypatch.setattr(
        study,
        "pair_metrics",
        lambda model, pairs: SimpleNamespace(right=np.array([p.answer < " M" and p.counter < " M" for p in pairs])),
    )
    found = study.written_pairs(None, 40, 0, ("English", "Spanish"))
    cells = {
        split: {tuple(pair.example.split("-")[1:]) for pair in each["English"]} for split, each in found.pairs.items()
    }
    assert not cells["select"] & cells["report"]
    assert cells["select"] | cells["report"] == set(permutations("abcd", 2))
    assert found.left_out == {
        "answer spelt alike": 0,
        "not one token, or of unequal length": 0,
        "not known in every language": 6 * 5 - 4 * 3,
    }
    assert found.languages == ("English", "Spanish")
    for one, other in zip(found.pairs["report"]["English"], found.pairs["report"]["Spanish"], strict=True):
        assert other.answer == f"{one.answer}e"
        assert one.example == other.example


def test_bad_settings():
    with pytest.raises(UserError, match="languages = English, Greek: use two or more of English, French"):
        CrossLingualConfig(languages=("English", "Greek"))
    with pytest.raises(UserError, match="at least 1 and 8"):
        CrossLingualConfig(pairs=2)
