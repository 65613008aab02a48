"""Metrics: functions from next-token logits [batch, vocab] and the batch to one value an example."""

from collections.abc import Callable, Collection

import torch
from jaxtyping import Float
from torch import Tensor

from saepatch.data.batches import PairBatch
from saepatch.errors import UserError

Metric = Callable[[Float[Tensor, "batch vocab"], PairBatch], Float[Tensor, "batch"]]


def _precise(logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch vocab"]:
    return logits.float() if logits.device.type == "mps" else logits.double()  # mps has no float64


def _at(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.gather(-1, ids[:, None])[:, 0]


def logit_difference(logits: Float[Tensor, "batch vocab"], batch: PairBatch) -> Float[Tensor, "batch"]:
    """Logit of the answer minus logit of the counter-answer."""
    logits = _precise(logits)
    return _at(logits, batch.answer) - _at(logits, batch.counter)


def probability(logits: Float[Tensor, "batch vocab"], batch: PairBatch) -> Float[Tensor, "batch"]:
    """Probability of the answer."""
    return _at(_precise(logits).softmax(-1), batch.answer)


def log_probability(logits: Float[Tensor, "batch vocab"], batch: PairBatch) -> Float[Tensor, "batch"]:
    """Log-probability of the answer, in nats."""
    return _at(_precise(logits).log_softmax(-1), batch.answer)


def cross_entropy(logits: Float[Tensor, "batch vocab"], batch: PairBatch) -> Float[Tensor, "batch"]:
    """Cross-entropy of the answer, in nats."""
    return -log_probability(logits, batch)


def answer_rank(logits: Float[Tensor, "batch vocab"], batch: PairBatch) -> Float[Tensor, "batch"]:
    """How many tokens have a higher logit than the answer: 0 is the top."""
    logits = _precise(logits)
    return (logits > _at(logits, batch.answer)[:, None]).sum(-1).to(logits.dtype)


def kl_divergence(reference: Float[Tensor, "pairs vocab"]) -> Metric:
    """KL(reference ‖ run) over the vocabulary, in nats; `reference` holds one row of logits a pair."""
    expected = _precise(reference).log_softmax(-1)

    def kl(logits: Float[Tensor, "batch vocab"], batch: PairBatch) -> Float[Tensor, "batch"]:
        p = expected[batch.index].to(logits.device)
        return (p.exp() * (p - _precise(logits).log_softmax(-1))).sum(-1)

    return kl


def refusal_score(refusal_ids: Collection[int]) -> Metric:
    """`log P(R) − log(1 − P(R))`, R the first tokens of a refusal, in float64 (Arditi et al. 2024)."""
    ids = sorted(set(refusal_ids))
    if not ids:
        raise UserError("the refusal score needs at least one refusal token")

    def score(logits: Float[Tensor, "batch vocab"], batch: PairBatch) -> Float[Tensor, "batch"]:
        return refusal_log_odds(logits, ids)

    return score


def refusal_log_odds(logits: Float[Tensor, "batch vocab"], refusal_ids: Collection[int]) -> Float[Tensor, "batch"]:
    """The refusal score of next-token logits; above 0 the next token is more likely a refusal's first than not."""
    log_p, ids = _precise(logits).log_softmax(-1), sorted(set(refusal_ids))
    others = torch.ones(log_p.shape[-1], dtype=torch.bool, device=log_p.device)
    others[ids] = False
    # the complement is summed, not subtracted: 1 − P loses everything once P is close to 1
    return log_p[:, ids].logsumexp(-1) - log_p[:, others].logsumexp(-1)


def answers_only(metric: Metric) -> bool:
    """Whether a metric looks at the logits of answer and counter-answer alone: sweeps unembed no others for it."""
    return metric is logit_difference


def checked(metric: Metric, logits: Float[Tensor, "batch vocab"], batch: PairBatch) -> Float[Tensor, "batch"]:
    """The metric's values, once they are seen to be one an example.

    Raises:
        UserError: they are not.
    """
    # a metric that writes into its logits would change what others read
    values = metric(logits if logits.requires_grad else logits.clone(), batch)
    if values.shape != (len(batch),):
        raise UserError(
            f"metric {metric_name(metric)} gives values of shape {tuple(values.shape)} for {len(batch)} examples: "
            "return one value for each"
        )
    return values


def metric_name(metric: Metric) -> str:
    """How a metric is called in results."""
    while hasattr(metric, "func"):  # functools.partial
        metric = metric.func
    name = getattr(metric, "__qualname__", None) or type(metric).__qualname__
    return name.split(".<locals>")[0]
