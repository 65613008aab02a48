"""Activations of several sites out of one forward pass, as a stream of shuffled batches."""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saepatch.errors import UserError
from saepatch.hooks import capture
from saepatch.models import LanguageModel, Tokens
from saepatch.sites import Site

log = logging.getLogger(__name__)

Batch = dict[Site, Float[Tensor, "batch d_model"]]

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
_DOCUMENTS_AT_ONCE = 512  # tokenised and sorted by length together: enough for little padding, little to hold


def texts(data: str, text_column: str = "text") -> Sequence[str]:
    """The documents of a file, a folder of files, or a dataset on the hub; read from disk as they are needed.

    A line of a .txt file is a document.

    Raises:
        UserError: there is no such data, it has no such column, or it holds no text.
    """
    import datasets

    if not data:
        raise UserError("no data to train on: give --data a .jsonl, .parquet or .txt file, a folder or a hub dataset")
    datasets.disable_progress_bars()
    path = Path(data).expanduser()
    try:
        if path.exists():
            kind, files = _files(path)
            loaded = datasets.load_dataset(kind, data_files=files, split="train")
        elif path.suffix in FORMATS or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data):
            raise UserError(f"no file or folder {data!r}: check the path, or give the id of a dataset on the hub")
        else:
            loaded = datasets.load_dataset(data, split="train")
    except UserError:
        raise
    except Exception as error:  # a damaged file and an unknown id fail in many ways inside `datasets`
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"cannot read data {data!r} (a file, a folder or a hub dataset id): {reason[0]}") from error
    if text_column not in loaded.column_names:
        columns = ", ".join(loaded.column_names) or "none"
        raise UserError(f"data {data!r} has no column {text_column!r}: set --text_column to one it has ({columns})")
    full = loaded.filter(_has_text, input_columns=[text_column], keep_in_memory=True)
    if not len(full):
        raise UserError(f"data {data!r} holds no text in column {text_column!r}: give at least two documents")
    if not isinstance(full[0][text_column], str):
        raise UserError(f"column {text_column!r} of {data!r} holds {type(full[0][text_column]).__name__}, not text")
    return full[text_column]


def _has_text(text: object) -> bool:
    return text is not None and (not isinstance(text, str) or bool(text.strip()))


def _files(path: Path) -> tuple[str, list[str]]:
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in FORMATS and p.is_file())
    kinds = {FORMATS.get(p.suffix) for p in found}
    if len(kinds) != 1 or None in kinds:
        what = "no file" if not found else "files of several kinds" if len(kinds) > 1 else "a kind of file"
        raise UserError(f"data {str(path)!r} is or holds {what} that cannot be read: use one of {', '.join(FORMATS)}")
    return str(kinds.pop()), [str(p) for p in found]


@dataclass(frozen=True)
class Documents(Sequence[str]):
    """Some of the documents of a sequence, by index; nothing is copied."""

    source: Sequence[str]
    chosen: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, at: Any) -> Any:
        return Documents(self.source, self.chosen[at]) if isinstance(at, slice) else self.source[self.chosen[at]]


def split(documents: Sequence[str], share: float, seed: int) -> tuple[Sequence[str], list[str]]:
    """Documents to train on, and documents held out: a share of the different texts, each with all of its copies.

    Raises:
        UserError: there are fewer than two different documents.
    """
    keys = [hash(text) for text in documents]  # to tell copies without holding the texts
    first: dict[int, int] = {}
    for i, key in enumerate(keys):
        first.setdefault(key, i)
    if len(first) < 2:
        raise UserError(f"{len(first)} different documents leave none to train on once one is held out: give more text")
    different = list(first.values())
    order = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(max(1, round(share * len(different))), len(different) - 1)
    held = [different[i] for i in order[:count]]
    apart = {keys[i] for i in held}
    rest = tuple(i for i, key in enumerate(keys) if key not in apart)
    return Documents(documents, rest), [documents[i] for i in held]


def rows(model: LanguageModel, documents: Sequence[str], context: int, pack: bool = False) -> list[list[int]]:
    """Token ids of documents, cut to rows of at most `context` tokens.

    Each row begins with BOS where the tokenizer puts one before a text. With `pack`, rows are filled with document
    after document, each begun by its own BOS, and what does not fill the last row is left as a shorter one.
    """
    bos = model.bos_id
    pieces: list[list[int]] = []
    stream: list[int] = []
    starts = False
    for text in documents:
        ids = model.encode(text)
        starts = bool(ids) and ids[0] == bos
        if pack:
            stream += ids
            continue
        pieces += _cut(ids, context, bos if starts else None)
    if pack:
        pieces = _cut(stream, context, bos if starts else None)
    return [piece for piece in pieces if any(token != bos for token in piece)]


def _cut(ids: list[int], context: int, bos: int | None) -> list[list[int]]:
    if bos is None:
        return [ids[start : start + context] for start in range(0, len(ids), context)]
    # Every row has the BOS that its first token would otherwise have to stand in for.
    body = ids[1:]
    return [[bos, *body[start : start + context - 1]] for start in range(0, len(body), context - 1)]


def token_batches(model: LanguageModel, ids: Sequence[list[int]], forward_tokens: int) -> Iterator[Tokens]:
    """Padded batches of rows of like length, none with more than `forward_tokens` places unless a single row has."""
    batch: list[list[int]] = []
    for row in sorted(ids, key=len):
        if batch and (len(batch) + 1) * len(row) > forward_tokens:
            yield model.pad(batch)
            batch = []
        batch.append(row)
    if batch:
        yield model.pad(batch)


@dataclass(frozen=True, eq=False)
class ActivationStream:
    """Activations at ordinary positions (no BOS, no padding) of several sites, from one forward pass for all.

    Iterating gives batches `{site: [batch_size, d_model]}`; row i of every site is the same token. Without `epochs` it
    never ends: the documents are read again, each time in another order. With it, the last batch may be smaller. One
    seed and the same sizes give the same batches; other sizes give the same activations in another order.
    """

    model: LanguageModel
    documents: Sequence[str]
    sites: Sequence[Site]
    batch_size: int
    context: int = 256
    pack: bool = False
    forward_tokens: int = 8192
    buffer: int = 65_536
    seed: int = 0
    epochs: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.seed)
        held: list[dict[Site, Tensor]] = []
        n = 0
        for part in self._parts(generator):
            held.append(part)
            n += len(part[self.sites[0]])
            if n >= self.buffer:
                # Half goes out, half stays to be mixed with what comes: neighbours in the text end up far apart.
                out = max(1, n // 2 // self.batch_size)
                batches, rest = self._mixed(held, out * self.batch_size, generator)
                held, n = [rest], len(rest[self.sites[0]])
                yield from batches
        if n:
            yield from self._mixed(held, n, generator)[0]

    def _mixed(
        self, held: Sequence[dict[Site, Tensor]], n_out: int, generator: torch.Generator
    ) -> tuple[Iterator[Batch], dict[Site, Tensor]]:
        """The first `n_out` of what is held in a random order, as batches, and the rest."""
        n = sum(len(part[self.sites[0]]) for part in held)
        order = torch.randperm(n, generator=generator).to(held[0][self.sites[0]].device)
        whole = {site: torch.cat([part[site] for part in held]) for site in self.sites}
        rest = {site: x[order[n_out:]] for site, x in whole.items()}
        chunks = order[:n_out].split(self.batch_size)
        return ({site: x[chunk] for site, x in whole.items()} for chunk in chunks), rest

    def _parts(self, generator: torch.Generator) -> Iterator[Batch]:
        """Activations of one forward pass after the other, epoch after epoch."""
        epoch = 0
        while self.epochs is None or epoch < self.epochs:
            order = torch.randperm(len(self.documents), generator=generator).tolist()
            seen = 0
            for start in range(0, len(order), _DOCUMENTS_AT_ONCE):
                chosen = [self.documents[i] for i in order[start : start + _DOCUMENTS_AT_ONCE]]
                ids = rows(self.model, chosen, self.context, self.pack)
                for part in _shuffled(list(token_batches(self.model, ids, self.forward_tokens)), generator):
                    activations = forward(self.model, self.sites, part)
                    seen += len(activations[self.sites[0]])
                    yield activations
            if not seen:
                raise UserError("the documents hold no token beside BOS: give text")
            epoch += 1
            log.info("epoch %d of the documents done: %d tokens", epoch, seen)


def forward(model: LanguageModel, sites: Sequence[Site], tokens: Tokens) -> Batch:
    """What each site emits at the ordinary positions of a batch, in float32."""
    seen = capture(model.hf, model.layout, sites, model.inputs(tokens))
    return {site: seen[site][tokens.ordinary].float() for site in sites}


def _shuffled(items: list[Tokens], generator: torch.Generator) -> Iterator[Tokens]:
    for i in torch.randperm(len(items), generator=generator).tolist():
        yield items[i]
