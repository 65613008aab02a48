"""Metrics against their definitions, written out with numpy."""

import sys
from dataclasses import replace
from functools import partial

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
    with pytest.raises(UserError, match="no refusal tokens"):
        metrics.refusal_score([])


def test_names(case):
    assert metrics.metric_name(metrics.logit_difference) == "logit_difference"
    assert metrics.metric_name(metrics.refusal_score([1])) == "refusal_score"
    assert metrics.metric_name(metrics.kl_divergence()) == "kl_divergence"
    assert metrics.metric_name(partial(partial(lambda x, logits, batch: x, 1))) == "test_names"
    assert metrics.metric_name(metrics.DeclaredMetric(margin, clean_logits=True)) == "margin"


def margin(logits, batch):
    return logits[:, 0]


def test_the_table_holds_every_metric_that_needs_no_more_than_a_batch(case):
    logits, batch = case
    compared = replace(batch, clean_logits=torch.zeros_like(logits))
    for name, metric in metrics.METRICS.items():
        assert metrics.metric_name(metric) == name
        assert metrics.read_metric(name) is metric
        values = metric(logits, compared)
        assert values.shape == (2,)
        if metrics.answers_only(metric):
            used = torch.zeros_like(logits).scatter(1, torch.stack([batch.answer, batch.counter], 1), 1.0) > 0
            assert torch.equal(metric(logits.where(used, torch.nan), batch), values)
        elif not metrics.needs_clean_logits(metric):
            assert torch.equal(metric(logits, batch), values)
    assert metrics.answers_only(metrics.logit_difference)
    assert metrics.needs_clean_logits(metrics.METRICS["kl_divergence"])
    assert not metrics.answers_only(margin)
    assert not metrics.needs_clean_logits(margin)


def test_kl_is_from_the_batchs_own_clean_runs_where_no_reference_is_given(case):
    logits, batch = case
    clean = torch.randn(2, 259, generator=torch.Generator().manual_seed(4))
    kl, own = metrics.kl_divergence(), replace(batch, clean_logits=clean)
    np.testing.assert_allclose(kl(logits, own), metrics.kl_divergence(clean)(logits, batch))
    picked = [1, 1, 0]
    np.testing.assert_allclose(kl(logits[picked], own.rows(picked)), kl(logits, own)[picked])
    with pytest.raises(UserError, match="give it a reference"):
        kl(logits, batch)


def test_kl_leaves_out_tokens_that_the_reference_rules_out(case):
    logits, batch = case
    clean = torch.randn(2, 259, generator=torch.Generator().manual_seed(5))
    clean[:, 7] = -torch.inf
    leaf = logits.clone().requires_grad_()
    values = metrics.kl_divergence(clean)(leaf, batch)
    others = [i for i in range(259) if i != 7]
    p, q = torch.softmax(clean.double(), -1)[:, others], torch.softmax(logits.double(), -1)[:, others]
    np.testing.assert_allclose(values.detach(), (p * torch.log(p / q)).sum(-1))
    values.sum().backward()
    assert leaf.grad.isfinite().all()
    both = logits.clone()
    both[:, 7] = -torch.inf
    assert metrics.kl_divergence(clean)(both, batch).isfinite().all()


def test_metrics_of_ones_own_are_imported_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metrics_of_a_test.py").write_text("def first(logits, batch):\n    return logits[:, 0]\n\nNUMBER = 3\n")
    (tmp_path / "broken_metrics_of_a_test.py").write_text("import nothing_of_this_name\n")
    path = list(sys.path)
    first = metrics.read_metric("metrics_of_a_test:first")
    assert sys.path == path
    assert metrics.metric_name(first) == "first"
    assert first(torch.tensor([[5.0, 6.0]]), None).tolist() == [5.0]
    assert metrics.source_hash("probability") == "" != metrics.source_hash("metrics_of_a_test:first")
    for text, complaint in [
        ("perplexity", "unknown metric 'perplexity': use one of .*answer_rank, .* MODULE:FUNCTION"),
        ("nothing_of_this_name:first", "no module 'nothing_of_this_name' in "),
        ("metrics_of_a_test:second", "metrics_of_a_test.py has no 'second'"),
        ("metrics_of_a_test:NUMBER", "is a int: name a function"),
    ]:
        with pytest.raises(UserError, match=complaint):
            metrics.read_metric(text)
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):  # not ours to explain
        metrics.read_metric("broken_metrics_of_a_test:first")
