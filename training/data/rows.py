"""Documents as rows of token ids, and rows as padded batches."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel, Tokens

from .document import Document, are_ids, characters, is_chat

_TOKENISED_DOCUMENTS, _TOKENISED_CHARACTERS = 64, 1_000_000  # at a time


def rows(model: LanguageModel, documents: Sequence[Document], context: int, pack: bool = False) -> list[list[int]]:
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


def tokenised(model: LanguageModel, documents: Iterable[tuple[int, Document]]) -> Iterator[tuple[int, list[int]]]:
    """Numbered documents as token ids, without a leading BOS."""
    bos = bos_before(model)
    for chunk in _chunks(documents):
        for (number, _), ids in zip(chunk, _encoded(model, [document for _, document in chunk]), strict=True):
            yield number, ids[1:] if bos is not None and ids[:1] == [bos] else ids


def _chunks(documents: Iterable[tuple[int, Document]]) -> Iterator[list[tuple[int, Document]]]:
    chunk: list[tuple[int, Document]] = []
    size = 0
    for number, document in documents:
        chunk.append((number, document))
        size += characters(document)
        if len(chunk) == _TOKENISED_DOCUMENTS or size >= _TOKENISED_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encoded(model: LanguageModel, documents: Sequence[Document]) -> list[list[int]]:
    """`token_ids` of each document, in one call of the tokenizer where the result is the same."""
    bos = model.tokenizer.bos_token
    if model.prepend_bos or any(not isinstance(each, str) or (bos and each.startswith(bos)) for each in documents):
        return [token_ids(model, document) for document in documents]
    ids: list[list[int]] = model.tokenizer(
        list(documents), return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]
    return [row[: len(row) - len(model.appended)] for row in ids]


def token_ids(model: LanguageModel, document: Document) -> list[int]:
    """A document's token ids: of its text, of its messages in the model's chat template, or as they are.

    Raises:
        UserError: the tokenizer has no chat template or refuses the messages, or a token is not in the vocabulary.
    """
    if isinstance(document, str):
        return model.encode(document)
    if is_chat(document):
        return model.encode(model.chat(document, ready=False))
    assert are_ids(document)
    ids = list(document)
    if wrong := [token for token in ids if not 0 <= token < model.vocabulary]:
        raise UserError(
            f"token {wrong[0]} is not in the vocabulary of {model.name!r}, whose ids are 0 to {model.vocabulary - 1}: "
            "give documents that its own tokenizer made"
        )
    return ids


def bos_before(model: LanguageModel) -> int | None:
    """The id of BOS, if the tokenizer adds it before a text."""
    return model.bos_id if model.encode("a")[:1] == [model.bos_id] else None
