"""Metrics: functions of next-token logits [batch, vocab] and the batch that return one value per example.

Any such function is a metric. A `DeclaredMetric` states its needs: passes then unembed only the logits it reads, and
the batch holds the clean run's logits if it compares with them. `METRICS` lists the metrics that the command line
accepts by name.
"""

import hashlib
import importlib
import os
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saepatch.data.batches import PairBatch
from saepatch.errors import UserError

Metric = Callable[[Float[Tensor, "batch vocab"], PairBatch], Float[Tensor, "batch"]]


@dataclass(frozen=True)
class DeclaredMetric:
    """A metric that declares its needs; called like the function it wraps.

    Attributes:
        function: The metric.
        answers_only: It reads only the logits of the answer and the counter-answer, at `batch.answer` and
            `batch.counter`: sweeps unembed no others, so that its vocabulary is smaller and differs between batches.
        clean_logits: It reads `batch.clean_logits`, the next-token logits of each pair's clean run.
        sums: With answers of several tokens, the metric is this times the log-probability of the answer, plus this
            times that of the counter-answer, each summed over its tokens; None: it takes answers of one token.
    """

    function: Metric
    answers_only: bool = False
    clean_logits: bool = False
    sums: tuple[float, float] | None = None

    def __call__(self, logits: Float[Tensor, "batch vocab"], batch: PairBatch) -> Float[Tensor, "batch"]:
        return self.function(logits, batch)


def precise(logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch vocab"]:
    """Logits in float64; in float32 on a device that has no float64."""
    return logits.float() if logits.device.type == "mps" else logits.double()  # mps has no float64


def take(logits: Float[Tensor, "batch vocab"], ids: Int[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    """Each row's value of one token."""
    return logits.gather(-1, ids[:, None])[:, 0]


@partial(DeclaredMetric, answers_only=True, sums=(1.0, -1.0))
def logit_difference(logits: Float[Tensor, "batch vocab"], batch: PairBatch) -> Float[Tensor, "batch"]:
    """Logit of the answer minus logit of the counter-answer; of several tokens, the difference of log-probabilities."""
    logits = precise(logits)
    return take(logits, batch.answer) - take(logits, batch.counter)


@DeclaredMetric
def probability(logits: Float[Tensor, "batch vocab"], batch: PairBatch) -> Float[Tensor, "batch"]:
    """Probability of the answer."""
    return take(precise(logits).softmax(-1), batch.answer)


@partial(DeclaredMetric, sums=(1.0, 0.0))
def log_probability(logits: Float[Tensor, "batch vocab"], batch: PairBatch) -> Float[Tensor, "batch"]:
    """Log-probability of the answer, in nats."""
    return take(precise(logits).log_softmax(-1), batch.answer)


@partial(DeclaredMetric, sums=(-1.0, 0.0))
def cross_entropy(logits: Float[Tensor, "batch vocab"], batch: PairBatch) -> Float[Tensor, "batch"]:
    """Cross-entropy of the answer, in nats."""
    return -log_probability(logits, batch)


@DeclaredMetric
def answer_rank(logits: Float[Tensor, "batch vocab"], batch: PairBatch) -> Float[Tensor, "batch"]:
    """Number of tokens with a higher logit than the answer: 0 is the top."""
    logits = precise(logits)
    return (logits > take(logits, batch.answer)[:, None]).sum(-1).to(logits.dtype)


def kl_divergence(reference: Float[Tensor, "pairs vocab"] | None = None) -> Metric:
    """KL(reference ‖ run) of the next token over the vocabulary, in nats.

    The default `reference` (`kl_divergence` on the command line) is each pair's own clean run, in both directions: the
    clean run has 0, the corrupted run KL(clean ‖ corrupted), so the gap is negative, and an effect is the share of that
    divergence that denoising removes or noising produces. If the corruption draws samples, each is compared with the
    clean run. At the clean run the divergence has zero gradient: attribute noising with `IntegratedGradients`.

    Args:
        reference: Logits [pairs, vocab], one row for each pair of the whole list.
    """

    def kl(logits: Float[Tensor, "batch vocab"], batch: PairBatch) -> Float[Tensor, "batch"]:
        if reference is None and batch.clean_logits is None:
            raise UserError("kl_divergence() compares with clean runs, and this batch has none: give it a reference")
        expected = batch.clean_logits if reference is None else reference[batch.index.to(reference.device)]
        assert expected is not None
        log_p, log_q = (precise(values.to(logits.device)).log_softmax(-1) for values in (expected, logits))
        # a token with probability 0 under the reference adds nothing
        return (log_p.exp() * (log_p - log_q).masked_fill(log_p.isneginf(), 0.0)).sum(-1)

    return DeclaredMetric(kl, clean_logits=reference is None)


def refusal_score(refusal_ids: Collection[int]) -> Metric:
    """`log P(R) − log(1 − P(R))` in nats, with R the first tokens of refusals, in float64 (Arditi et al. 2024)."""
    ids = sorted(set(refusal_ids))
    if not ids:
        raise UserError("no refusal tokens: the refusal score needs at least one")

    def score(logits: Float[Tensor, "batch vocab"], batch: PairBatch) -> Float[Tensor, "batch"]:
        return refusal_log_odds(logits, ids)

    return score


def refusal_log_odds(logits: Float[Tensor, "batch vocab"], refusal_ids: Collection[int]) -> Float[Tensor, "batch"]:
    """The refusal score of next-token logits; above 0, the next token more likely than not begins a refusal."""
    log_p, ids = precise(logits).log_softmax(-1), sorted(set(refusal_ids))
    others = torch.ones(log_p.shape[-1], dtype=torch.bool, device=log_p.device)
    others[ids] = False
    # the complement is summed, not subtracted: 1 − P loses all precision when P is close to 1
    return log_p[:, ids].logsumexp(-1) - log_p[:, others].logsumexp(-1)


METRICS: dict[str, Metric] = {
    "answer_rank": answer_rank,
    "cross_entropy": cross_entropy,
    "kl_divergence": kl_divergence(),
    "log_probability": log_probability,
    "logit_difference": logit_difference,
    "probability": probability,
}
"""Metrics that `--metric` accepts by name."""


def read_metric(text: str) -> Metric:
    """The metric named in `METRICS`, or MODULE:FUNCTION, imported with the working directory on the path.

    Raises:
        UserError: there is no such metric.
    """
    if ":" not in text:
        if text not in METRICS:
            known = ", ".join(METRICS)
            raise UserError(f"unknown metric {text!r}: use one of {known}, or your own function, as MODULE:FUNCTION")
        return METRICS[text]
    value = _imported(text)
    if not callable(value):
        raise UserError(f"metric {text!r} is a {type(value).__name__}: name a function of logits and batch")
    return value


def as_metric(metric: Any) -> Metric:
    """A metric as it is, or by its name.

    Raises:
        UserError: there is no metric of that name, or the value is not a function.
    """
    if isinstance(metric, str):
        return read_metric(metric)
    if not callable(metric):
        raise UserError(
            f"metric {metric!r} is a {type(metric).__name__}: give a function of logits and batch, or a name"
        )
    return metric


def source_hash(text: str) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a MODULE:FUNCTION metric's file; "" for metrics of `METRICS`."""
    file = getattr(sys.modules[text.partition(":")[0]], "__file__", None) if ":" in text else None
    return "" if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def _imported(text: str) -> Any:
    module, _, name = text.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):  # a failing import inside the user's module
            raise
        raise UserError(
            f"metric {text!r}: no module {error.name!r} in {os.getcwd()} or installed: check the name"
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    if not hasattr(imported, name):
        raise UserError(f"metric {text!r}: {imported.__file__} has no {name!r}: check the name")
    return getattr(imported, name)


def answers_only(metric: Metric) -> bool:
    """Whether a metric reads only the logits of answer and counter-answer, so that sweeps unembed no others."""
    return isinstance(metric, DeclaredMetric) and metric.answers_only


def needs_clean_logits(metric: Metric) -> bool:
    """Whether a metric compares with the clean run, so that the batch must hold its logits."""
    return isinstance(metric, DeclaredMetric) and metric.clean_logits


def bytes_per_logit(metric: Metric) -> int:
    """Memory in bytes that a metric takes per vocabulary entry and example, including float64 copies."""
    return 0 if answers_only(metric) else 56 if needs_clean_logits(metric) else 24


def checked(metric: Metric, logits: Float[Tensor, "batch vocab"], batch: PairBatch) -> Float[Tensor, "batch"]:
    """The metric's values, checked to be one per example.

    Raises:
        UserError: they have another shape.
    """
    # cloned, since a metric might modify its logits in place
    values = metric(logits if logits.requires_grad else logits.clone(), batch)
    if values.shape != (len(batch),):
        raise UserError(
            f"metric {metric_name(metric)} returns values of shape {tuple(values.shape)} for {len(batch)} examples: "
            "return one value per example"
        )
    return values


def metric_name(metric: Metric) -> str:
    """A metric's name in results."""
    while isinstance(metric, (partial, DeclaredMetric)):
        metric = metric.func if isinstance(metric, partial) else metric.function
    name = getattr(metric, "__qualname__", None) or type(metric).__qualname__
    return name.split(".<locals>")[0]
