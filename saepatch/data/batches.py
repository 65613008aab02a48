"""Aligned batches of clean and corrupted prompts for patching."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saepatch.data.pairs import PromptPair
from saepatch.errors import UserError
from saepatch.model.inputs.images import ImagePrompt
from saepatch.model.language_model import LanguageModel, Tokens


@dataclass(frozen=True, eq=False)
class PairBatch:
    """Tokenised pairs: `clean` and `corrupted` are aligned column by column."""

    pairs: tuple[PromptPair, ...]
    clean: Tokens
    corrupted: Tokens
    answer: Int[Tensor, "batch"]
    counter: Int[Tensor, "batch"]
    index: Int[Tensor, "batch"]  # each row's index in the list of pairs
    where: Bool[Tensor, "batch pos"] | None = None  # chosen positions (`splicing.choose_positions`)
    clean_logits: Float[Tensor, "batch vocab"] | None = None  # of the clean run, for metrics that compare with it
    spelled: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] | None = None  # all tokens of answer and counter
    weights: Float[Tensor, "batch 2"] | None = None  # of answer and counter, where rows are tokens of answers

    def __len__(self) -> int:
        return len(self.pairs)

    def rows(self, index: Sequence[int]) -> "PairBatch":
        """Some rows, in the given order; a row may appear several times."""
        rows = list(index)
        return PairBatch(
            tuple(self.pairs[i] for i in rows),
            self.clean.rows(rows),
            self.corrupted.rows(rows),
            self.answer[rows],
            self.counter[rows],
            self.index[rows],
            None if self.where is None else self.where[rows],
            None if self.clean_logits is None else self.clean_logits[rows],
            None if self.spelled is None else tuple(self.spelled[i] for i in rows),
            None if self.weights is None else self.weights[rows],
        )


def batch_pairs(
    model: LanguageModel,
    pairs: Sequence[PromptPair],
    side: Literal["left", "right"] = "right",
    align: Literal["equal", "right"] = "equal",
    spelled: bool = False,
) -> PairBatch:
    """Tokenise pairs into one batch.

    With `spelled`, answers may have several tokens: the batch then holds them all, and their first ones as `answer` and
    `counter`.

    `align="equal"` requires both prompts of a pair to have the same number of tokens; `align="right"` aligns them at
    the last token (and pads on the left).

    Raises:
        UserError: no pairs, an empty prompt, unequal lengths (both token lists are shown), or an answer that is not
            one token after its prompt.
    """
    if not pairs:
        raise UserError("there are no prompt pairs: give at least one")
    given: Sequence[object] = pairs
    if other := [pair for pair in given if not isinstance(pair, PromptPair)]:
        kind = type(other[0]).__name__
        raise UserError(f"a pair is a {kind}, not a PromptPair: write PromptPair(clean, corrupted, answer, counter)")
    if align not in ("equal", "right"):
        raise UserError(f"unknown alignment {align!r}: use 'equal' or 'right'")
    if align == "right":
        side = "left"
    tokens = model.tokenize([p.clean for p in pairs] + [p.corrupted for p in pairs], side)
    both = [(model.encode(pair.clean), model.encode(pair.corrupted)) for pair in pairs]
    n = len(pairs)
    _check_pictures(pairs, tokens.rows(slice(0, n)), tokens.rows(slice(n, 2 * n)))
    if align == "equal":
        for number, (pair, (clean, corrupted)) in enumerate(zip(pairs, both, strict=True)):
            if len(clean) != len(corrupted):
                name = pair.example or number
                raise UserError(
                    f"pair {name}: the clean prompt has {len(clean)} tokens, the corrupted one {len(corrupted)}: "
                    f"{_show(model, clean)} against {_show(model, corrupted)}: reword one, "
                    "or align them at the last token (align='right'; --align right)"
                )
    read = answer_tokens if spelled else lambda *given: (answer_token(*given),)
    answers = tuple(
        (tuple(read(model, pair.clean, ids, pair.answer)), tuple(read(model, pair.clean, ids, pair.counter)))
        for pair, (ids, _) in zip(pairs, both, strict=True)
    )
    return PairBatch(
        tuple(pairs),
        tokens.rows(slice(0, n)),
        tokens.rows(slice(n, 2 * n)),
        torch.tensor([answer[0] for answer, _ in answers], device=model.device),
        torch.tensor([counter[0] for _, counter in answers], device=model.device),
        torch.arange(n, device=model.device),
        spelled=answers if spelled else None,
    )


def _check_pictures(pairs: Sequence[PromptPair], clean: Tokens, corrupted: Tokens) -> None:
    """Raises UserError for a pair whose prompts' image tokens do not correspond."""
    if clean.images is None or corrupted.images is None:
        return
    mine, theirs = clean.images, corrupted.images
    alike = (mine.here == theirs.here) & (mine.picture == theirs.picture)
    alike &= ~mine.here | (mine.places == theirs.places).all(-1)
    if bool(alike.all()):
        return
    number = int((~alike.all(-1)).int().argmax())
    counts = [int(images.here[number].sum()) for images in (mine, theirs)]
    raise UserError(
        f"pair {pairs[number].example or number}: the image tokens of its prompts ({counts[0]} and {counts[1]}) do not "
        "correspond: give both prompts pictures of one size, after equally many tokens"
    )


def _show(model: LanguageModel, ids: Sequence[int]) -> str:
    return "[" + "|".join(model.token_texts(ids)) + "]"


def answer_token(model: LanguageModel, prompt: str, ids: Sequence[int], answer: str) -> int:
    """The token that an answer is after a prompt, whose own tokens are `ids`.

    Raises:
        UserError: it is not one token there.
    """
    tokens = _after(model, prompt, ids, answer)
    if tokens is None or len(tokens) != 1:
        shown = _show(model, model.encode(prompt + answer)[len(ids) :])
        raise UserError(
            f"answer {answer!r} is not one token after {prompt[-30:]!r} ({shown}): "
            "use a single token with its leading space, or its first token"
        )
    return tokens[0]


def answer_tokens(model: LanguageModel, prompt: str, ids: Sequence[int], answer: str) -> list[int]:
    """The tokens that an answer is after a prompt, whose own tokens are `ids`.

    Raises:
        UserError: it has none, or changes the prompt's.
    """
    if not (tokens := _after(model, prompt, ids, answer)):
        raise UserError(
            f"answer {answer!r} does not follow {prompt[-30:]!r} as tokens of its own "
            f"({_show(model, model.encode(prompt + answer))}): give it with its leading space"
        )
    return tokens


def _after(model: LanguageModel, prompt: str, ids: Sequence[int], answer: str) -> list[int] | None:
    # Tokenised together with the prompt: alone, " She" may be split differently than in running text.
    whole = model.encode(prompt + answer)
    if whole[: len(ids)] == list(ids):
        return whole[len(ids) :]
    if isinstance(prompt, ImagePrompt):  # a processor that ends prompts by text of its own: after its last token
        last = model.tokenizer.decode(ids[-1:])
        alone, both = (model.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (last, last + answer))
        return both[len(alone) :] if both[: len(alone)] == alone else None
    return None


def resampled(model: LanguageModel, pairs: Sequence[PromptPair], seed: int = 0) -> list[PromptPair]:
    """Pairs whose corrupted prompt is another pair's clean prompt, of the same token length but with another answer.

    Pairs of equal length are put in random cyclic order; each takes the next pair with another answer. A pair keeps its
    answer, and its counter becomes the other pair's answer.

    Raises:
        UserError: no other pair has the same length and another answer.
    """
    cycles: dict[int, list[int]] = {}
    for number in torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist():
        cycles.setdefault(len(model.encode(pairs[number].clean)), []).append(number)
    out = list(pairs)
    for length, cycle in cycles.items():
        for start, number in enumerate(cycle):
            pair = pairs[number]
            others = (pairs[i] for i in cycle[start + 1 :] + cycle[:start])
            other = next((o for o in others if o.answer != pair.answer and o.clean != pair.clean), None)
            if other is None:
                raise UserError(
                    f"pair {pair.example or number}: no other clean prompt has {length} tokens and another answer than "
                    f"{pair.answer!r}: leave the pair out, or add pairs of that length"
                )
            out[number] = replace(pair, corrupted=other.clean, counter=other.answer)
    return out


def own_positions(
    tokens: Tokens, rows: Int[Tensor, "some"], columns: Int[Tensor, "some"], align: Literal["equal", "right"]
) -> Int[Tensor, "some"]:
    """Columns of a batch as indices into their own prompts: from 0, or from the end (-1) with `align="right"`."""
    width = tokens.input_ids.shape[1]
    if align == "right":
        return columns - width
    return columns - (width - tokens.lengths).to(columns.device)[rows]


def same_length_batches(batch: PairBatch, size: int) -> Iterator[PairBatch]:
    """Split a batch into parts of equal length, at most `size` rows each.

    The longest come first: how runs resume is checked on them, and holds for shorter ones.
    """
    lengths = torch.maximum(batch.clean.lengths, batch.corrupted.lengths)
    for length in lengths.unique().flip(0).tolist():
        rows = (lengths == length).nonzero().flatten().tolist()
        for start in range(0, len(rows), size):
            yield _trim(batch.rows(rows[start : start + size]))


def _trim(batch: PairBatch) -> PairBatch:
    """Drop the columns that are padding in every row."""
    used = (batch.clean.attention_mask | batch.corrupted.attention_mask).any(0).nonzero().flatten()
    keep = slice(int(used[0]), int(used[-1]) + 1)

    return replace(
        batch,
        clean=batch.clean.at(slice(None), keep),
        corrupted=batch.corrupted.at(slice(None), keep),
        where=None if batch.where is None else batch.where[:, keep],
    )
