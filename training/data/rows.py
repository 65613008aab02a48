"""Documents as rows of token ids, and rows as padded batches."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from saepatch.model.language_model import LanguageModel, Tokens

_TOKENISED_DOCUMENTS, _TOKENISED_CHARACTERS = 64, 1_000_000  # at a time


def rows(model: LanguageModel, documents: Sequence[str], context: int, pack: bool = False) -> list[list[int]]:
    """Token ids of documents, cut to rows of at most `context` tokens.

    Each row begins with BOS if the tokenizer adds one. With `pack`, documents are concatenated, each preceded by a BOS,
    and cut into full rows; the last row may be shorter. Rows that hold only special tokens are dropped.
    """
    bodies = (Body(0, i, ids, 0) for i, ids in tokenised(model, enumerate(documents)))
    return [row for row, _ in cut(bodies, context, bos_before(model), pack, set(model.tokenizer.all_special_ids))]


def token_batches(model: LanguageModel, ids: Sequence[list[int]], forward_tokens: int) -> Iterator[Tokens]:
    """Padded batches of rows of similar length, of at most `forward_tokens` positions unless a single row has more."""
    batch: list[list[int]] = []
    for row in sorted(ids, key=len):
        if batch and (len(batch) + 1) * len(row) > forward_tokens:
            yield model.pad(batch)
            batch = []
        batch.append(row)
    if batch:
        yield model.pad(batch)


def text_positions(tokens: Tokens, special: Collection[int]) -> Bool[Tensor, "batch pos"]:
    """True at positions that are trained on: not padding, BOS, or another of the special tokens."""
    return tokens.without(special).ordinary


@dataclass(frozen=True, eq=False)
class Body:
    """A document's tokens without a leading BOS, to be read from `offset` on."""

    epoch: int
    document: int
    ids: list[int]
    offset: int


def cut(
    bodies: Iterable[Body], context: int, bos: int | None, pack: bool, special: set[int]
) -> Iterator[tuple[list[int], tuple[int, int, int]]]:
    """Rows, each with the (epoch, document, offset) from which cutting continues with the same rows."""
    front = [] if bos is None else [bos]
    row: list[int] = []
    place = (0, 0, 0)
    for body in bodies:
        at = body.offset
        row += front if row and body.ids else []
        while at < len(body.ids):
            row = row or list(front)
            taken = body.ids[at : at + context - len(row)]
            row += taken
            at += len(taken)
            place = (body.epoch, body.document, at) if at < len(body.ids) else (body.epoch, body.document + 1, 0)
            if len(row) == context or (not pack and at == len(body.ids)):
                if not special.issuperset(row):
                    yield row, place
                row = []
    if not special.issuperset(row):
        yield row, place


def tokenised(model: LanguageModel, documents: Iterable[tuple[int, str]]) -> Iterator[tuple[int, list[int]]]:
    """Numbered documents as token ids, without a leading BOS."""
    bos = bos_before(model)
    for chunk in _chunks(documents):
        for (number, _), ids in zip(chunk, _encoded(model, [text for _, text in chunk]), strict=True):
            yield number, ids[1:] if bos is not None and ids[:1] == [bos] else ids


def _chunks(documents: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    chunk: list[tuple[int, str]] = []
    characters = 0
    for number, text in documents:
        chunk.append((number, text))
        characters += len(text)
        if len(chunk) == _TOKENISED_DOCUMENTS or characters >= _TOKENISED_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _encoded(model: LanguageModel, texts: Sequence[str]) -> list[list[int]]:
    """`model.encode` of each text, in one call of the tokenizer where the result is the same."""
    bos = model.tokenizer.bos_token
    if model.prepend_bos or (bos and any(text.startswith(bos) for text in texts)):
        return [model.encode(text) for text in texts]
    ids: list[list[int]] = model.tokenizer(
        list(texts), return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]
    return [row[: len(row) - len(model.appended)] for row in ids]


def bos_before(model: LanguageModel) -> int | None:
    """The id of BOS, if the tokenizer adds it before a text."""
    return model.bos_id if model.encode("a")[:1] == [model.bos_id] else None
