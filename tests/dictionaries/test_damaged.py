"""Dictionaries that cannot be read: the message names the reason."""

import json

import pytest
from tiny import random_sae

from saepatch.dictionaries.loading import load_sae
from saepatch.errors import UserError, reason_of


def test_an_unknown_architecture_is_named_with_its_error(tmp_path):
    folder = tmp_path / "resid_post.1"
    random_sae().save_model(folder)
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg | {"architecture": "telepathic"}))
    with pytest.raises(UserError, match=r"cannot read the dictionary in .*: \w+Error: .*telepathic"):
        load_sae(str(folder), "resid_post.1")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyError("batchtopk"), "KeyError: 'batchtopk'"),
        (OSError("no such file\nat all"), "no such file"),
        (RuntimeError(), "RuntimeError"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_a_reason_is_one_line_that_names_an_error_without_a_sentence(error, reason):
    assert reason_of(error) == reason
