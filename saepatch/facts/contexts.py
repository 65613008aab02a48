"""The contexts in which a fact's key and value are taken: the bare prompt, and the prompt behind sampled prefixes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saepatch.data.edit_requests import EditRequest
from saepatch.errors import UserError
from saepatch.model.hooks import is_spliced
from saepatch.model.language_model import LanguageModel
from saepatch.model.positions import find_text
from saepatch.model.sites import Site

STARTS = ("The", "Therefore", "Because", "I", "You")  # of sampled prefixes
BATCH = 64  # rows of a pass

FactToken = Literal["subject", "last"]
"""The token at which a fact is edited: the last one of the subject, or of the prompt."""


@dataclass(frozen=True)
class Sampled:
    """Prefixes sampled from the model itself: `(length in tokens, number)` for each kind, top-`k`, seeded.

    `apart`: the bare prompt is a kind of its own; means are taken within a kind, then across kinds (MEMIT). Otherwise
    all contexts count the same (ROME).
    """

    lengths: tuple[tuple[int, int], ...] = ((10, 5),)
    apart: bool = True
    top_k: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if any(length < 1 or number < 1 for length, number in self.lengths) or self.top_k < 1 or self.seed < 0:
            raise UserError(
                f"prefixes of {self.lengths}, top_k = {self.top_k}, seed = {self.seed}: use lengths and numbers above 0"
            )

    def prefixes(self, model: LanguageModel) -> "Prefixes":
        """Sample from a model; done once for the same weights. Inside a splice, the spliced model is sampled."""
        if is_spliced(model.layout):
            return self._sample(model)
        known = _SAMPLED.setdefault(model.hf, {})
        key = model.fingerprint, self
        if key not in known:
            known[key] = self._sample(model)
        return known[key]

    def _sample(self, model: LanguageModel) -> "Prefixes":
        kinds = []
        for length, number in self.lengths:
            generators = [torch.Generator().manual_seed((1000 * self.seed + i) % 2**63) for i in range(number)]
            starts = [STARTS[i % len(STARTS)] for i in range(number)]
            new = sample_ids(model, starts, length, self.top_k, generators)
            texts = [model.continuation(ids) for ids in new]  # with the space before a first word
            kinds.append(tuple(f"{start}{text}. " for start, text in zip(starts, texts, strict=True)))
        if self.apart:
            return Prefixes((("",), *kinds))
        return Prefixes((("", *(text for kind in kinds for text in kind)),))


_SAMPLED: WeakKeyDictionary[nn.Module, dict[tuple[str, Sampled], "Prefixes"]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Prefixes:
    """Texts before a prompt, by kind; the first is empty, the bare prompt."""

    kinds: tuple[tuple[str, ...], ...] = (("",),)

    @property
    def texts(self) -> list[str]:
        return [text for kind in self.kinds for text in kind]

    @property
    def weights(self) -> Float[Tensor, "prefixes"]:
        """The weight of each in a mean within kinds, then across kinds."""
        shares = [1 / len(kind) / len(self.kinds) for kind in self.kinds for _ in kind]
        return torch.tensor(shares, dtype=torch.float64)


@torch.no_grad()
def sample_ids(
    model: LanguageModel, prompts: Sequence[str], new: int, top_k: int, generators: Sequence[torch.Generator]
) -> list[list[int]]:
    """Continuations of `new` tokens, sampled from the `top_k` likeliest; special tokens are never sampled.

    Each prompt has a generator of its own, so that its continuation does not depend on the others.
    """
    rows, added = [model.encode(prompt) for prompt in prompts], list[list[int]]()
    for start in range(0, len(rows), BATCH):
        part = slice(start, start + BATCH)
        added += _sampled(model, rows[part], new, top_k, generators[part])
    return added


def _sampled(
    model: LanguageModel, rows: Sequence[list[int]], new: int, top_k: int, generators: Sequence[torch.Generator]
) -> list[list[int]]:
    special = torch.tensor(sorted(set(model.tokenizer.all_special_ids)), dtype=torch.long)
    tokens, added, read = model.pad(rows, side="left"), [list[int]() for _ in rows], 0
    # a splice may act on the prompt's last token alone, which is another one in every whole pass
    cached = model.takes_cache and not is_spliced(model.layout)
    cached = cached and model.padding.allows(tokens.attention_mask, cached=True)
    cache = model.new_cache() if cached else None
    for _ in range(new):
        if cached:
            logits, read = model.call(tokens, read, last=True, cache=cache)[:, -1], tokens.width
        else:
            logits = model.next_logits(model.pad([row + own for row, own in zip(rows, added, strict=True)]))
        logits = logits.float().cpu()
        logits[:, special[special < logits.shape[-1]]] = -torch.inf
        values, ids = logits.topk(min(top_k, logits.shape[-1]))
        shares = values.softmax(-1)
        drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(shares, generators, strict=True)]
        chosen = ids.gather(1, torch.stack(drawn))
        for own, token in zip(added, chosen[:, 0].tolist(), strict=True):
            own.append(token)
        tokens = tokens.followed_by(model.pad(chosen.tolist()))
    return added


def subject_last(model: LanguageModel, prefix: str, prompt: str, subject: str) -> tuple[list[int], int]:
    """Token ids of a prompt with its subject behind a prefix, and the index of the subject's last token.

    Raises:
        UserError: the subject's last token also holds what follows it.
    """
    before, after = prompt.split("{}")
    ids = model.encode(prefix + before + subject + after)
    spans = find_text(subject, ids, model.tokenizer.decode)
    later = find_text(subject, model.encode(after), model.tokenizer.decode) if subject.strip() in after else []
    if len(spans) <= len(later):
        raise UserError(
            f"subject {subject!r} does not end where a token of {prefix + before + subject + after!r} ends "
            f"([{'|'.join(model.token_texts(ids))}]): reword the prompt"
        )
    return ids, spans[-1 - len(later)][1] - 1


def answer_ids(model: LanguageModel, prompt: str, answer: str) -> list[int]:
    """The tokens of an answer after its prompt, tokenised together with it.

    Raises:
        UserError: the answer's first token merges with the prompt's last.
    """
    ids, whole = model.encode(prompt), model.encode(prompt + answer)
    if whole[: len(ids)] != ids or len(whole) == len(ids):
        raise UserError(
            f"answer {answer!r} does not begin with a token of its own after {prompt[-40:]!r} "
            f"([{'|'.join(model.token_texts(whole))}]): give it with its leading space"
        )
    return whole[len(ids) :]


@dataclass(frozen=True, eq=False)
class Contexts:
    """Prompts of some requests behind every prefix: consecutive rows for each request, the bare prompt first."""

    model: LanguageModel
    requests: Sequence[EditRequest]
    prefixes: Prefixes
    token: FactToken = "subject"

    @cached_property
    def _located(self) -> list[tuple[list[int], int]]:
        return [
            self.located(prefix, request.prompt, request.subject)
            for request in self.requests
            for prefix in self.prefixes.texts
        ]

    def located(self, prefix: str, prompt: str, subject: str) -> tuple[list[int], int]:
        """Token ids of a prompt behind a prefix, and the index of the token at which the fact is edited."""
        ids, last = subject_last(self.model, prefix, prompt, subject)
        return ids, last if self.token == "subject" else len(ids) - 1

    @property
    def rows(self) -> list[list[int]]:
        return [ids for ids, _ in self._located]

    @property
    def last(self) -> list[int]:
        """Index of the edited token in each row."""
        return [index for _, index in self._located]

    def one(self, number: int) -> "Contexts":
        """The contexts of one request."""
        return replace(self, requests=[self.requests[number]])

    def states(self, site: Site, bare: bool = False) -> Float[Tensor, "facts prefixes width"]:
        """What the site emits at each edited token, in float64; with `bare`, in the bare prompts alone.

        Later tokens are left out: the site does not depend on them.
        """
        step = len(self.prefixes.texts)
        located = self._located[::step] if bare else self._located
        parts = []
        for start in range(0, len(located), BATCH):
            tokens = self.model.pad([ids[: index + 1] for ids, index in located[start : start + BATCH]])
            emitted = self.model.capture(tokens, [site])[site]
            where = tokens.last.to(emitted.device)
            parts.append(emitted[torch.arange(len(where), device=emitted.device), where].double())
        return torch.cat(parts).unflatten(0, (len(self.requests), 1 if bare else step))

    def mean(self, states: Float[Tensor, "facts prefixes width"]) -> Float[Tensor, "facts width"]:
        """The mean over prefixes, within kinds, then across kinds."""
        return torch.einsum("fpw,p->fw", states, self.prefixes.weights.to(states.device))
