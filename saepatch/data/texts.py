"""Texts to measure on, from a file or the embedded model's own, and their tokens in batches of bounded size."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from saepatch import organism
from saepatch.data.files import TABLES, FileRow, read_rows
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel, Tokens

log = logging.getLogger(__name__)

CONTEXT = 1024  # tokens of a row; longer documents are cut
CELLS = 2**27  # numbers held for one batch


def load_texts(spec: str, column: str = "text") -> list[str]:
    """Texts of `organism`, of a column of a .jsonl, .json, .csv or .parquet file, or of any other file, one per line.

    Raises:
        UserError: the file does not exist, cannot be read, or contains no text.
    """
    if spec == "organism":
        return organism.texts()
    remedy = (
        f"give organism, a .txt file with one text per line, or a file ({', '.join(TABLES)}) with a column {column!r}"
    )
    rows = read_rows(Path(spec), "texts", [column], ".txt", remedy)
    texts = [text for text in (_text(row, column) for row in rows) if text.strip()]
    if not texts:
        raise UserError(f"{spec!r} contains no text: give another file")
    return texts


def _text(row: FileRow, column: str) -> str:
    text = row.value.get(column) if isinstance(row.value, dict) else row.value
    if not isinstance(text, str):
        raise UserError(
            f"{row.where}, has no text in a column {column!r}: rename the column, or give one text per line"
        )
    return text


def text_rows(model: LanguageModel, texts: Iterable[str], context: int = CONTEXT) -> Iterator[list[int]]:
    """Token ids of texts, in rows of at most `context` tokens or the model's own limit; longer texts take several rows.

    Every row of a text begins with the BOS if the text does. Texts without a token besides BOS are left out.

    Raises:
        UserError: `context` leaves no room for a token besides BOS.
    """
    return (ids for _, ids in _numbered_rows(model, texts, context))


def _numbered_rows(model: LanguageModel, texts: Iterable[str], context: int) -> Iterator[tuple[int, list[int]]]:
    """The rows of texts, each with its text's number."""
    limit = min(context, model.context or context)
    if limit < 2:
        raise UserError(f"a context of {limit} tokens holds no token besides BOS: use at least 2")
    logged = False
    for number, text in enumerate(texts):
        ids = model.encode(text)
        start = ids[:1] if ids[:1] == [model.bos_id] else []
        body, step = ids[len(start) :], limit - len(start)
        if len(body) > step and not logged:
            log.info("texts of more than %d tokens are read in rows of that length", limit)
            logged = True
        for first in range(0, len(body), step):
            yield number, [*start, *body[first : first + step]]


def prompt_batches(
    model: LanguageModel, texts: Tokens | Sequence[str], whole: bool, size: int = 32, width: int = 1
) -> Iterator[tuple[Tokens, Int[Tensor, "rows"]]]:
    """Batches of prompts, as `token_batches` bounds them, with the number of the prompt that each row belongs to.

    Args:
        whole: Refuse texts that are longer than the model's context. Otherwise they take several rows, of at most 1,024
            tokens.

    Raises:
        UserError: a text is empty or, if `whole`, too long; or there is none.
    """
    if isinstance(texts, str) or (not isinstance(texts, Tokens) and not texts):
        model.tokenize(texts)  # says what is wrong
    if isinstance(texts, Tokens):
        rows = max(1, min(size, CELLS // width // texts.width))
        for start in range(0, len(texts), rows):
            part = texts.rows(slice(start, start + rows))
            yield part, torch.arange(start, start + len(part))
        return
    if whole:
        numbered = [(number, model.tokenize([text]).input_ids[0].tolist()) for number, text in enumerate(texts)]
    else:
        numbered = list(_numbered_rows(model, texts, CONTEXT))
        if empty := sorted(set(range(len(texts))) - {number for number, _ in numbered}):
            model.tokenize([texts[empty[0]]])
    held: list[tuple[int, list[int]]] = []
    for row in numbered:
        longest = max(len(ids) for _, ids in [*held, row])
        if held and (len(held) == size or (len(held) + 1) * longest > CELLS // width):
            yield model.pad([ids for _, ids in held]), torch.tensor([number for number, _ in held])
            held = []
        held.append(row)
    yield model.pad([ids for _, ids in held]), torch.tensor([number for number, _ in held])


def token_batches(
    model: LanguageModel, texts: Tokens | Iterable[str], size: int = 32, width: int = 1, context: int = CONTEXT
) -> Iterator[Tokens]:
    """Batches of at most `size` rows, fewer where `width` numbers a token would take too much memory.

    Args:
        texts: Tokens, whose columns that are padding in a whole batch are dropped; or texts, as by `text_rows`.
        width: Numbers that the caller holds for each token, such as the size of the vocabulary for logits.

    Raises:
        UserError: the batch size is below 1.
    """
    if size < 1:
        raise UserError(f"batch size {size}: use at least 1")
    budget = CELLS // width
    if isinstance(texts, Tokens):
        yield from _trimmed(texts, min(size, max(1, budget // texts.width)))
        return
    if isinstance(texts, str):
        raise UserError(f"the texts are one string, {texts[:40]!r}: give a list of texts, or model.tokenize(texts)")
    rows: list[list[int]] = []
    longest = 0
    for ids in text_rows(model, texts, context):
        if rows and (len(rows) == size or (len(rows) + 1) * max(longest, len(ids)) > budget):
            yield model.pad(rows)
            rows, longest = [], 0
        rows.append(ids)
        longest = max(longest, len(ids))
    if rows:
        yield model.pad(rows)


def _trimmed(tokens: Tokens, size: int) -> Iterator[Tokens]:
    for batch in tokens.batches(size):
        used = batch.attention_mask.any(0).nonzero().flatten()
        if len(used):
            columns = slice(int(used[0]), int(used[-1]) + 1)
            yield batch.at(slice(None), columns)
