"""What steering costs a text: its perplexity, its repetitions, and how far the model's predictions were moved."""

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
    """Of each continuation (token ids) after its prompt the negative log-probability, summed over its tokens, in nats.

    Ids and not texts: tokenised again, a text can fall apart into other tokens than those that were generated. 0 for an
    empty one. Under the model as it is where this is called: outside of a splice, the model itself.
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
    """Perplexity of continuations (token ids) given their prompts, over all their tokens together; NaN without any."""
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
    """KL(model ‖ edited model) of the next token, a mean over the tokens of each continuation, in nats a token.

    Both read the same prompts and continuations (token ids, as the model itself wrote them, say), so this is how far an
    edit moves the predictions where text has not come apart yet. The prompt goes in first and the continuation after
    it, as in generation, so that the edit's positions mean the same. NaN for an empty continuation.

    Args:
        edited: What edits the model, such as `splice(…)`; entered once.

    Raises:
        UserError: nothing but empty continuations.
    """
    if not any(map(len, continuations)):
        raise UserError("all continuations are empty, so there is no token to compare the predictions at")
    ids = [model.encode(prompt) for prompt in prompts]
    plain = [
        (log_softmax(logits.float(), -1), real) for _, logits, real in _continued(model, ids, continuations, batch_size)
    ]
    divergences: list[float] = []
    with edited:
        runs = _continued(model, ids, continuations, batch_size)
        for (before, real), (_, logits, _) in zip(plain, runs, strict=True):
            # a token that the model rules out altogether (-inf) adds nothing, and must not make it NaN
            gap = torch.where(before.isneginf(), 0.0, before - log_softmax(logits.float(), -1))
            kl = ((before.exp() * gap).sum(-1) * real).cpu().double().sum(-1)
            divergences += (kl / real.cpu().sum(-1)).tolist()
    return divergences


def _continued(
    model: LanguageModel, prompts: Ids, continuations: Ids, batch_size: int
) -> Iterator[tuple[Ids, Float[Tensor, "batch new vocab"], Bool[Tensor, "batch new"]]]:
    """Batches of continuations, the logits each of their tokens is predicted by, and which of these are not padding.

    Two passes with the prompt's keys and values kept between them, as generation has them.
    """
    for start in range(0, len(prompts), batch_size):
        rows, new = (list(given[start : start + batch_size]) for given in (prompts, continuations))
        logits = model.logits_of_continuations(model.pad(rows, side="left"), new)
        real = torch.tensor([[at < len(row) for at in range(logits.shape[1])] for row in new], device=logits.device)
        yield new, logits, real


def distinct(ids: Sequence[int], n: int) -> float:
    """Share of a text's n-grams of tokens that are different ones; NaN where it is shorter than n.

    Source: distinct-n of Li et al. 2016, here of one text.
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of a text's n-grams of tokens that it had before (seq-rep-n of Welleck et al. 2020); NaN if shorter."""
    return 1 - distinct(ids, n)


def loops(ids: Sequence[int], longest: int = 8, times: int = 4) -> bool:
    """Whether the text ends in one run of at most `longest` tokens, `times` times over: where to stop generating."""
    for n in range(1, longest + 1):
        tail = list(ids[-n * times :])
        if len(tail) == n * times and tail == tail[:n] * times:
            return True
    return False
