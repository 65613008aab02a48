"""Metrics against their definitions, written out with numpy."""

import numpy as np
import pytest
import torch
from tiny import tiny_model

from saepatch.data.batches import batch_pairs
from saepatch.data.pairs import PromptPair
from saepatch.engine import metrics
from saepatch.errors import UserError


@pytest.fixture(scope="module")
def case():
    batch = batch_pairs(tiny_model(), [PromptPair("abc", "abd", "x", "y"), PromptPair("cde", "cdf", "p", "q")])
    logits = 3 * torch.randn(2, 259, generator=torch.Generator().manual_seed(1))
    return logits, batch


def test_values(case):
    logits, batch = case
    table = logits.double().numpy()
    p = np.exp(table) / np.exp(table).sum(-1, keepdims=True)
    rows, answer, counter = np.arange(2), batch.answer.numpy(), batch.counter.numpy()
    np.testing.assert_allclose(metrics.logit_difference(logits, batch), table[rows, answer] - table[rows, counter])
    np.testing.assert_allclose(metrics.probability(logits, batch), p[rows, answer])
    np.testing.assert_allclose(metrics.log_probability(logits, batch), np.log(p[rows, answer]))
    np.testing.assert_allclose(metrics.cross_entropy(logits, batch), -np.log(p[rows, answer]))
    rank = [list(np.argsort(-table[i])).index(answer[i]) for i in rows]
    np.testing.assert_allclose(metrics.answer_rank(logits, batch), rank)
    refused = p[:, [5, 9]].sum(-1)
    np.testing.assert_allclose(metrics.refusal_score([9, 5])(logits, batch), np.log(refused) - np.log(1 - refused))
    other = torch.randn(2, 259, generator=torch.Generator().manual_seed(2))
    q = torch.softmax(other.double(), -1).numpy()
    np.testing.assert_allclose(metrics.kl_divergence(other)(logits, batch), (q * np.log(q / p)).sum(-1))
    np.testing.assert_allclose(metrics.kl_divergence(logits)(logits, batch), 0, atol=1e-12)


def test_kl_follows_rows_that_are_repeated_and_reordered(case):
    logits, batch = case
    reference = torch.randn(2, 259, generator=torch.Generator().manual_seed(3))
    kl = metrics.kl_divergence(reference)
    both = kl(logits, batch)
    picked = [1, 0, 1]
    np.testing.assert_allclose(kl(logits[picked], batch.rows(picked)), both[picked])


def test_refusal_score_keeps_its_precision_where_refusal_is_certain(case):
    _, batch = case
    logits = torch.zeros(2, 259)
    logits[:, 4] = 60.0
    expected = 60 - np.log(258)
    np.testing.assert_allclose(metrics.refusal_score([4])(logits, batch), expected)
    with pytest.raises(UserError, match="at least one refusal token"):
        metrics.refusal_score([])


def test_names(case):
    assert metrics.metric_name(metrics.logit_difference) == "logit_difference"
    assert metrics.metric_name(metrics.refusal_score([1])) == "refusal_score"
