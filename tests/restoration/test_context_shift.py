"""CC-Delta: the paired test and the shift against their literal form, and what undoing it does."""

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import random_dictionary, tiny_model

from saepatch.errors import UserError
from saepatch.restoration.context_shift import find_context_shift
from saepatch.splicing.splice import splice

CLEAN = [f"tell {word} now" for word in ("abc", "bed", "cow", "dig", "eel", "fig", "gum", "hat", "ink", "jam")]
PROMPTS = [text.replace("tell", "TELL") for text in CLEAN]


def test_the_test_is_paired_and_corrected():
    model, dictionary = tiny_model("llama"), random_dictionary()
    shift = find_context_shift(model, dictionary, PROMPTS, CLEAN, template=2, batch_size=3)
    gaps = []
    for clean, prompt in zip(CLEAN, PROMPTS, strict=True):
        both = [
            dictionary.encode(model.capture(model.tokenize([text]), [dictionary.site])[dictionary.site]).acts[0, -2:]
            for text in (clean, prompt)
        ]
        gaps.append((both[0].mean(0) - both[1].mean(0)).double().numpy())
    gaps, site = np.array(gaps), dictionary.site
    assert shift.lost[site] == pytest.approx(gaps.mean(0), abs=1e-6)
    tested = np.flatnonzero((gaps != 0).sum(0) > 1)
    p = np.maximum(stats.ttest_1samp(gaps[:, tested], 0).pvalue, 2.0**-9)
    assert shift.q[site][tested] == pytest.approx(stats.false_discovery_control(p), rel=1e-3)
    assert np.isnan(np.delete(shift.q[site], tested)).all()
    some = set(shift.significant(level=0.2)[site])
    assert some == {int(i) for i in tested if shift.q[site][i] <= 0.2}
    apart = [set(shift.significant(sign, 0.2).get(site, ())) for sign in (1, -1)]
    assert apart[0] | apart[1] == some
    assert not apart[0] & apart[1]
    assert all(shift.lost[site][i] > 0 for i in apart[0])


@torch.no_grad()
def test_undoing_adds_what_was_lost_where_it_was_compared():
    model, dictionary = tiny_model("llama"), random_dictionary()
    shift, site = find_context_shift(model, dictionary, PROMPTS, CLEAN, template=2), dictionary.site
    tokens = model.tokenize(PROMPTS[:2], "left")
    before = model.capture(tokens, [site])[site]
    prompt, answer = shift.undone(level=1.0)
    assert answer.positions == "generated"
    assert (answer.latents, answer.unit) == (prompt.latents, prompt.unit)
    with splice(model, dictionary, prompt):
        after = model.capture(tokens, [site], stop=False)[site]
    lost = torch.from_numpy(np.where(np.isnan(shift.q[site]), 0, shift.lost[site])).float()
    assert after - before == pytest.approx(
        torch.cat([torch.zeros_like(before[:, :-2]), (lost @ dictionary.W_dec).expand_as(before[:, -2:])], 1), abs=1e-4
    )


def test_mistakes():
    model, dictionary = tiny_model("llama"), random_dictionary()
    with pytest.raises(UserError, match="one clean for each"):
        find_context_shift(model, dictionary, PROMPTS, CLEAN[:3])
    with pytest.raises(UserError, match="at least 1"):
        find_context_shift(model, dictionary, PROMPTS, CLEAN, template=0)
    with pytest.raises(UserError, match="a prompt has .* tokens, so use fewer"):
        find_context_shift(model, dictionary, PROMPTS, CLEAN, template=100)
