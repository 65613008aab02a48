"""A model that unembeds the tokens that an experiment needs, where a large vocabulary would take most of the time."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saepatch.data.edit_requests import EditRequest
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.replaced import forwards_replaced

OTHERS = -100.0  # logit of tokens that are left out


def tokens_of(model: LanguageModel, requests: Sequence[EditRequest], texts: Iterable[str]) -> list[int]:
    """All tokens of texts, and of prompts with their answers."""
    asked = [
        (q.prompt, answer) for request in requests for q in request.all_questions for answer in (q.target, q.other)
    ]
    asked += [pair for request in requests for q in request.all_questions for pair in q.conditions]
    written = [*texts, *(prompt + answer for prompt, answer in asked)]
    return sorted({token for text in written for token in model.encode(text)} | set(model.tokenizer.all_special_ids))


@contextmanager
def only_tokens(model: LanguageModel, tokens: Sequence[int]) -> Iterator[None]:
    """Give all other tokens no probability; the logits keep their shape.

    Raises:
        UserError: the unembedding is not a linear map.
    """
    head: Any = model.hf.get_output_embeddings()  # type: ignore[operator]
    if type(head) is not nn.Linear or "bias" in head.state_dict():
        raise UserError(f"the unembedding of {model.name} is not a linear map without a bias: leave --trim out")
    kept = torch.tensor(tokens, device=head.weight.device)
    weight = head.weight[kept]

    def unembed(x: Tensor) -> Tensor:
        logits = nn.functional.linear(x, weight)
        return logits.new_full((*x.shape[:-1], len(head.weight)), OTHERS).index_copy(-1, kept, logits)

    with forwards_replaced({head: unembed}):
        yield


@torch.no_grad()
def probability_of(model: LanguageModel, requests: Sequence[EditRequest], tokens: Sequence[int]) -> float:
    """Mean probability of these tokens after the facts' prompts."""
    shares = [model.next_logits([r.text]).float().softmax(-1)[0, list(tokens)].sum() for r in requests]
    return float(torch.stack(shares).mean())
