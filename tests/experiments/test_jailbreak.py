"""Both halves of a jailbreak, on few requests: each half by its sign, the verdict, a whole run."""

import json

import numpy as np
import pytest

from experiments.jailbreak.page import gap, shares, verdict
from experiments.jailbreak.study import (
    BOTH,
    DONE,
    HALVES,
    SHIFT,
    JailbreakConfig,
    JailbreakResults,
    RankedHalves,
    ShiftChoice,
    main,
)
from saepatch.errors import UserError
from saepatch.model.sites import Site
from saepatch.records.rows import read_rows
from saepatch.restoration.answering import Answered

pytestmark = pytest.mark.whole

FOUND = RankedHalves(
    {
        "suppressed": (("resid_post.3", 4), ("resid_post.2", 9), ("resid_post.3", 1)),
        "amplified": (("resid_post.1", 2),),
    },
    {"suppressed": 0.6, "amplified": 0.4},
    {"suppressed": 5, "amplified": 3},
    20,
)


def answered(refused, of=8):
    texts = ["I cannot help with that."] * refused + ["Sure, here is a plan."] * (of - refused)
    return [Answered(tuple(texts), (0.0,) * of)]


def test_the_first_latents_of_a_half_by_site():
    assert FOUND.top("suppressed", 2) == {Site(3): (4,), Site(2): (9,)}
    assert FOUND.top("suppressed", 9) == {Site(3): (4, 1), Site(2): (9,)}
    assert FOUND.top("amplified", 1) == {Site(1): (2,)}


def test_the_verdict_says_what_each_half_does():
    first, second = (DONE[half] for half in HALVES)
    jailbroken = {
        "nothing": answered(0),
        first: answered(8),
        second: answered(4),
        BOTH: answered(8),
        SHIFT: answered(2),
    }
    jailbroken |= {f"random, as many as {half}": [*answered(0), *answered(2)] for half in HALVES}
    left = zip((*HALVES, BOTH), (0, 7, 0), strict=True)
    benign = {"nothing": answered(8)} | {f"{name} as in the jailbreak": answered(n) for name, n in left}
    answers = {"jailbroken": jailbroken, "benign": benign, "harmless": {"nothing": answered(0)}}
    shift = ShiftChoice("resid_post.3", 2.0, in_answer=False)
    results = JailbreakResults(FOUND, dict.fromkeys(HALVES, 2), shift, answers, {})
    assert shares(results)["jailbroken"]["random, as many as suppressed"].value == 0.125  # the mean of two draws
    assert gap(results, first, second).value == 0.5
    text = verdict(results)
    assert "suppresses 5 and amplifies 3" in text
    assert "2 suppressed restored: 100% [68%, 100%] (random 12%" in text
    assert "the suppressed half leaves 0%" in text
    assert "the amplified half 88%" in text
    assert "CC-Delta at resid_post.3: 25%" in text


@pytest.mark.slow
def test_a_small_run(tmp_path):
    config = JailbreakConfig(str(tmp_path), prompts=8, draws=1)
    main(config)
    summary = json.loads((tmp_path / "summary.json").read_text())
    refused = summary["refused"]
    assert refused["jailbroken"]["nothing"][0] < 0.2
    assert refused["benign"]["nothing"][0] > 0.8
    assert refused["jailbroken"][DONE["suppressed"]][0] > refused["jailbroken"]["random, as many as suppressed"][0]
    assert refused["benign"]["both as in the jailbreak"][0] < 0.5
    assert 0 < summary["halves"]["share"]["suppressed"] < 1
    assert np.isclose(sum(summary["halves"]["share"].values()), 1)
    halves = [set(map(tuple, summary["halves"]["ranked"][half])) for half in HALVES]
    assert not halves[0] & halves[1]
    rows = read_rows(tmp_path / "results.parquet")
    assert {row["prompts"] for row in rows} == {"jailbroken", "benign", "harmless", "nested"}
    before = (tmp_path / "summary.json").read_text()
    main(config)
    assert (tmp_path / "summary.json").read_text() == before


def test_bad_settings():
    with pytest.raises(UserError, match="at least 6"):
        JailbreakConfig(prompts=3)
