"""The cost of steering to a text: perplexity, repetition, and the change of the model's predictions."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import log_softmax

from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel

Ids = Sequence[Sequence[int]]


@torch.no_grad()
def continuation_nll(
    model: LanguageModel, prompts: Sequence[str], continuations: Ids, batch_size: int = 32
) -> list[float]:
    """Negative log-probability of each continuation (token ids) after its prompt, summed over its tokens, in nats.

    Continuations are ids, since a generated text may tokenise differently. 0 for an empty continuation. Computed under
    the model as it is when called: outside a splice, the unedited model.
    """
    nll: list[float] = []
    for rows, logits, real in _continued(
        model, [model.encode(prompt) for prompt in prompts], continuations, batch_size
    ):
        targets = torch.tensor([[*row, *[0] * (real.shape[1] - len(row))] for row in rows], device=logits.device)
        log_p = log_softmax(logits.float(), -1).gather(-1, targets[..., None])[..., 0]
        nll += (-(log_p * real).cpu().double().sum(-1)).tolist()
    return nll


def perplexity(model: LanguageModel, prompts: Sequence[str], continuations: Ids) -> float:
    """Perplexity of continuations (token ids) given their prompts, over all tokens together; NaN without tokens."""
    count = sum(map(len, continuations))
    total = sum(continuation_nll(model, prompts, continuations))
    return float(torch.tensor(total / count).exp()) if count else float("nan")


@torch.no_grad()
def continuation_kl(
    model: LanguageModel,
    edited: AbstractContextManager[object],
    prompts: Sequence[str],
    continuations: Ids,
    batch_size: int = 32,
) -> list[float]:
    """KL(model ‖ edited model) of the next token, averaged over the tokens of each continuation, in nats per token.

    Both read the same prompts and continuations (token ids, such as the unedited model's), so this measures how far the
    edit moves predictions before the texts diverge. The prompt runs first and the continuation after it, as in
    generation, so that the edit's positions have the same meaning. NaN for an empty continuation.

    Args:
        edited: A context that edits the model, such as `splice(…)`; entered once.

    Raises:
        UserError: all continuations are empty.
    """
    if not any(map(len, continuations)):
        raise UserError("all continuations are empty: give at least one token at which to compare predictions")
    ids = [model.encode(prompt) for prompt in prompts]
    plain = [
        (log_softmax(logits.float(), -1), real) for _, logits, real in _continued(model, ids, continuations, batch_size)
    ]
    divergences: list[float] = []
    with edited:
        runs = _continued(model, ids, continuations, batch_size)
        for (before, real), (_, logits, _) in zip(plain, runs, strict=True):
            # a token with probability 0 adds nothing, and must not make the divergence NaN
            gap = torch.where(before.isneginf(), 0.0, before - log_softmax(logits.float(), -1))
            kl = ((before.exp() * gap).sum(-1) * real).cpu().double().sum(-1)
            divergences += (kl / real.cpu().sum(-1)).tolist()
    return divergences


def _continued(
    model: LanguageModel, prompts: Ids, continuations: Ids, batch_size: int
) -> Iterator[tuple[Ids, Float[Tensor, "batch new vocab"], Bool[Tensor, "batch new"]]]:
    """Batches of continuations, the logits that predict each of their tokens, and the mask of non-padding tokens.

    The prompts run first, then the continuations on their cache, as in generation.
    """
    for start in range(0, len(prompts), batch_size):
        rows, new = (list(ids[start : start + batch_size]) for ids in (prompts, continuations))
        logits = model.logits_of_continuations(model.pad(rows, side="left"), new)
        real = torch.tensor([[i < len(row) for i in range(logits.shape[1])] for row in new], device=logits.device)
        yield new, logits, real


def distinct(ids: Sequence[int], n: int) -> float:
    """Distinct n-grams of a text as a share of all its n-grams of tokens; NaN where it is shorter than n.

    Source: distinct-n of Li et al. 2016, for a single text.
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of repeated n-grams of tokens in a text (seq-rep-n of Welleck et al. 2020); NaN where shorter than n."""
    return 1 - distinct(ids, n)


def loops(ids: Sequence[int], longest: int = 8, times: int = 4) -> bool:
    """Whether the text ends in `times` repetitions of a sequence of at most `longest` tokens: a stopping criterion."""
    for n in range(1, longest + 1):
        tail = list(ids[-n * times :])
        if len(tail) == n * times and tail == tail[:n] * times:
            return True
    return False
