"""The checks of `make zoo` on a few types of different kinds; on all others in the slow tests."""

import pytest

from zoo.checks import CHECKS, RIGHT, examine
from zoo.shapes import TYPES
from zoo.table import outcome, page, summary

pytestmark = pytest.mark.whole

# in-place sums, list blocks, a mixture, a hybrid, shared keys, latent attention, images, no padding on the left
FEW = ["falcon", "openai-gpt", "olmoe", "lfm2", "gemma4_text", "deepseek_v3", "llava", "bart"]


@pytest.mark.parametrize("model_type", FEW)
def test_a_type_is_right_beside_plain_hooks(model_type):
    row = examine(model_type)
    assert outcome(row) == RIGHT, row


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in TYPES if name not in FEW])
def test_no_type_is_wrong_without_a_word(model_type):
    row = examine(model_type)
    assert outcome(row) not in ("wrong", "crash"), row


def test_the_table_counts_outcomes():
    right = {"type": "a", "bare": RIGHT, "load": RIGHT, "sites": "resid_pre 4, z 2", "layers": "4"}
    right |= dict.fromkeys(CHECKS, RIGHT)
    rows = [right, right | {"type": "b", "patch": "wrong: by 1"}, right | {"type": "c", "load": "refused: no | way"}]
    rows += [{"type": "d", "bare": "ValueError: no"}, {"type": "e", "bare": "?", "load": "crash: too slow"}]
    assert [outcome(row) for row in rows] == [RIGHT, "wrong", "refused", "not run by transformers", "crash"]
    assert "transformers runs 4 on text at this size. Patched right: 1 (25.0%); refused in one line: 1" in summary(rows)
    assert "| a |  | z (2 of 4) |" in page(rows)
    assert "refused; load: refused: no \\| way" in page(rows)
