"""The audit on a few applications: the gap goes, the slope stays, and what it writes can be read back."""

import json

import pytest

from experiments.audit import AuditConfig, applications, main


def test_applications_differ_in_one_thing():
    kinds = applications("select", 12, 0)
    for pair, (one, other) in zip(kinds["group"].pairs, kinds["group"].others, strict=True):
        assert (one, other) == (pair.corrupted, pair.clean)
        assert pair.answer == " approve"
    for pair, turned in zip(kinds["income"].pairs, kinds["income"].others, strict=True):
        for prompt, other in zip((pair.clean, pair.corrupted), turned, strict=True):
            assert sum(a != b for a, b in zip(prompt.split(), other.split(), strict=True)) == 1


@pytest.mark.slow
def test_without_the_groups_latents_the_gap_is_gone_and_merit_stays(tmp_path):
    config = AuditConfig(str(tmp_path), n=40, steps=3)
    main(config)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert abs(summary["audit"]["share of the gap left"][0]) < 0.2
    assert 0.9 < summary["audit"]["share of the slope left"][0] < 1.1
    assert summary["audit"]["four-fifths ratio before"][0] < 0.8
    assert all(left > 0.8 for left in summary["random_gap_left"])
    assert summary["parts"].keys() >= {"attn_out.0", "mlp_out.5"}
    before = (tmp_path / "summary.json").read_text()
    main(config)
    assert (tmp_path / "summary.json").read_text() == before
