"""Streaming of continuations token by token, alone or side by side with and without an edit."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saepatch.errors import UserError
from saepatch.model.greedy import end_tokens
from saepatch.model.hooks import SpliceError, unedited
from saepatch.model.language_model import LanguageModel
from saepatch.splicing.splice import Dictionaries, Interventions, splice
from saepatch.steering.fluency import loops

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily at temperature 0, otherwise sampled, reproducibly for a seed."""

    max_new_tokens: int = 60
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens = {self.max_new_tokens}: use at least 1")
        if self.temperature < 0:
            raise UserError(f"temperature = {self.temperature}: use 0 (greedy) or more")


@dataclass(frozen=True)
class Written:
    """A continuation so far: token ids, text, and why it ended ("" while it continues).

    Reasons are "end" (an end token), "length", "context" (the model's context is full), and "loop" (a sequence of
    tokens repeats).
    """

    ids: tuple[int, ...] = ()
    text: str = ""
    ended: str = ""


def stream(
    model: LanguageModel, prompt: str, sampling: Sampling | None = None, edited: bool = True
) -> Iterator[Written]:
    """Continue one prompt, with a KV cache; the last value yielded has ended.

    Tokens are computed on demand; inside a splice they are edited, unless `edited` is False, which runs the unedited
    model even there.

    Raises:
        UserError: an empty prompt, or one longer than the model's context.
    """
    sampling = sampling or Sampling()
    tokens, cache, read = model.tokenize([prompt]), model.new_cache(), 0
    stops, context = end_tokens(model.hf, model.tokenizer), model.context
    generator = torch.Generator().manual_seed(sampling.seed)
    ids: list[int] = []
    while True:
        around: AbstractContextManager[None] = nullcontext() if edited else unedited(model.layout)
        with around, torch.no_grad():
            logits = model.call(tokens, read, last=True, cache=cache)
        token, read = _pick(logits[0, -1], sampling.temperature, generator), tokens.width
        ended = "end" if token in stops else ""
        if not ended:
            ids.append(token)
            tokens = tokens.followed_by(model.pad([[token]]))
            if loops(ids):
                ended = "loop"
            elif len(ids) == sampling.max_new_tokens:
                ended = "length"
            elif context is not None and tokens.width >= context:
                ended = "context"
        yield Written(tuple(ids), model.continuation(ids, skip_special_tokens=True), ended)
        if ended:
            return


def _pick(logits: Float[Tensor, "vocab"], temperature: float, generator: torch.Generator) -> int:
    if not temperature:
        return int(logits.argmax())
    p = (logits.float().cpu() / temperature).softmax(-1)
    return int(torch.multinomial(p, 1, generator=generator))


def side_by_side(
    model: LanguageModel,
    dictionaries: Dictionaries,
    interventions: Interventions,
    prompts: tuple[str, str],
    sampling: Sampling | None = None,
) -> Iterator[tuple[Written, Written]]:
    """Continue one prompt without and one with the interventions, a token of each in turn.

    The first continuation is the unedited model's. The prompts are usually equal; in a chat they diverge with the
    answers.

    Raises:
        UserError: as for `splice`, or a prompt is empty or too long.
    """
    bare, steered = Written(), Written()
    try:
        with splice(model, dictionaries, interventions):
            runs = [stream(model, prompts[0], sampling, edited=False), stream(model, prompts[1], sampling)]
            while not (bare.ended and steered.ended):
                bare = bare if bare.ended else next(runs[0])
                steered = steered if steered.ended else next(runs[1])
                yield bare, steered
    except SpliceError as error:
        if len(steered.ids) > 1:
            raise
        log.warning("%s (the steered answer ended with its first token)", error)
