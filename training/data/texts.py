"""Documents: read from files, folders and the hub, and split into training and held-out ones."""

import codecs
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saepatch.errors import UserError

from .document import Document, characters, digest, has_content

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
# Held-out documents of a stream are chosen from this many at its beginning.
_FIRST_DOCUMENTS, _FIRST_CHARACTERS = 10_000, 16_000_000
# Size of the shuffle buffer of a stream.
_MIXED_DOCUMENTS, _MIXED_CHARACTERS = 10_000, 64_000_000


@dataclass(frozen=True, eq=False)
class Documents(Sequence[Document]):
    """A subset of a sequence of documents, by index; nothing is copied.

    Attributes:
        source: All documents.
        chosen: Indices of the subset, [n] int64.
        fingerprint: Hash of the texts in their order.
    """

    source: Sequence[Document]
    chosen: np.ndarray
    fingerprint: str

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self.source[i] for i in self.chosen[at].tolist()]
        return self.source[int(self.chosen[at])]


@dataclass(frozen=True, eq=False)
class Streamed:
    """Documents of a `datasets.IterableDataset`, read on demand, and again for every epoch.

    Attributes:
        dataset: The dataset.
        column: Column that holds the text.
        name: Name of the data in messages.
        fingerprint: Hash of the data's name, the size and time of local files and, after `split`, the first documents.
            It misses changes further on in a dataset on the hub.
        held_out: Digests of the texts to leave out wherever they occur.
        mixed: Size of the shuffle buffer in documents.
    """

    dataset: Any
    column: str
    name: str
    fingerprint: str
    held_out: frozenset[int] = frozenset()
    mixed: int = 1000

    def read(self, seed: int | None = None, start: int = 0) -> Iterator[tuple[int, Document]]:
        """Documents with their numbers, from number `start` on, in their own order or shuffled by a seed.

        Omitted documents (blank or held out) are numbered too. Documents before `start` are read and discarded, since
        the shuffle cannot be entered in the middle.

        Raises:
            UserError: the data cannot be read, or holds values that are not text.
        """
        dataset = self.dataset if seed is None else self.dataset.shuffle(seed=seed, buffer_size=self.mixed)
        try:
            for number, record in enumerate(dataset.skip(start) if start else dataset, start):
                document = record[self.column]
                if has_content(document) and digest(document) not in self.held_out:
                    yield number, document
        except (UserError, GeneratorExit):
            raise
        except Exception as error:  # files and connections fail in many ways inside `datasets`
            raise _unreadable(self.name, error) from error


def texts(
    data: str, text_column: str = "text", subset: str | None = None, split: str = "train", streaming: bool = False
) -> Sequence[Document] | Streamed:
    """The documents of a file, a folder of files, or a dataset on the hub, read from disk on demand.

    Each line of a .txt file is a document. Records without a document (`Document`) are left out.

    Args:
        data: Path or hub id.
        text_column: Column that holds the documents: text, messages or token ids.
        subset: Configuration of a hub dataset that has several.
        split: Split of a hub dataset.
        streaming: Read during use, without downloading or preparing the data first.

    Raises:
        UserError: the data does not exist, has no such column, or contains no text.
    """
    if not data:
        raise UserError("no data to train on: give --data a .jsonl, .parquet or .txt file, a folder or a hub dataset")
    loaded, files = _load(data, subset, split, streaming)
    columns = loaded.column_names
    if columns is None:  # a stream may not know its columns before it is read
        columns = list(next(iter(loaded), {}))
    if text_column not in columns:
        known = ", ".join(columns) or "none"
        raise UserError(f"data {data!r} has no column {text_column!r}: set --text_column to one it has ({known})")
    if streaming:
        facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        mark = _hash(repr((data, subset, split, text_column, facts)).encode())
        stream = Streamed(loaded.select_columns([text_column]), text_column, data, mark)
        if next(stream.read(), None) is None:
            raise _no_text(data, text_column)
        return stream
    full = loaded.filter(_keep, input_columns=[text_column], keep_in_memory=True)
    if not len(full):
        raise _no_text(data, text_column)
    has_content(full[0][text_column], f"column {text_column!r} of {data!r}")  # raises
    return full[text_column]


def _load(data: str, subset: str | None, split: str, streaming: bool) -> tuple[Any, list[Path]]:
    """The dataset, and its local files if there are any."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error below reports what it would log
    path = Path(data).expanduser()
    files: list[Path] = []
    options: dict[str, Any] = {"split": split, "streaming": streaming}
    try:
        if path.exists():
            kind, files = _files(path)
            marked = kind != "parquet" and any(_byte_order_mark(p) for p in files)
            encoding = {"encoding": "utf-8-sig"} if marked else {}
            loaded = datasets.load_dataset(kind, data_files=[str(p) for p in files], **options, **encoding)
        elif not on_the_hub(data):
            raise UserError(f"no file or folder {data!r}: check the path, or give the id of a dataset on the hub")
        else:
            loaded = datasets.load_dataset(data, subset, **options)
        if streaming and loaded.column_names is None:
            next(iter(loaded), None)  # a damaged file shows only once it is read
    except UserError:
        raise
    except Exception as error:  # a damaged file and an unknown id fail in many ways inside `datasets`
        raise _unreadable(data, error) from error
    return loaded, files


def _byte_order_mark(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(3) == codecs.BOM_UTF8


def on_the_hub(data: str) -> bool:
    """Whether data must be the id of a dataset on the hub, since there is no such path."""
    path = Path(data).expanduser()
    return not path.exists() and path.suffix not in FORMATS and bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data))


def _files(path: Path) -> tuple[str, list[Path]]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in FORMATS and p.is_file())
    kinds = {FORMATS.get(p.suffix) for p in files}
    if len(kinds) != 1 or None in kinds:
        problem = "no file" if not files else "files of several kinds" if len(kinds) > 1 else "a kind of file"
        raise UserError(f"data {str(path)!r} is or holds {problem} that cannot be read: use {', '.join(FORMATS)}")
    return str(kinds.pop()), files


def _unreadable(data: str, error: Exception) -> UserError:
    reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
    return UserError(f"cannot read data {data!r} (a file, a folder or a hub dataset id): {reason[0]}")


def _no_text(data: str, column: str) -> UserError:
    return UserError(f"data {data!r} contains no text in column {column!r}: give at least two documents")


def _keep(document: object) -> bool:
    return document is not None and (bool(document.strip()) if isinstance(document, str) else document != [])


def as_documents(given: Iterable[Document] | Streamed) -> Sequence[Document] | Streamed:
    """Documents as a sequence or stream; other iterables are read to their end.

    Raises:
        UserError: `given` is a single string, or what it holds is no `Document`.
    """
    if isinstance(given, str):
        raise UserError(f"the documents are one string ({given[:20]!r}…): give a list of strings")
    documents = given if isinstance(given, Sequence | Streamed) else list(given)
    if isinstance(documents, list | tuple):
        for number, document in enumerate(documents):
            if document is None:
                raise UserError(f"document {number} is None: leave it out")
            has_content(document, f"document {number}")  # raises
    return documents


def split(
    documents: Iterable[Document] | Streamed, share: float, seed: int
) -> tuple[Sequence[Document] | Streamed, list[Document]]:
    """Documents to train on, and held-out documents: a share of the distinct texts, each with all of its copies.

    From a stream, the first documents are held out: that share of its first 10,000 documents (or of the first 16
    million characters, if these are fewer).

    Raises:
        UserError: there are fewer than two distinct documents.
    """
    documents = as_documents(documents)
    if isinstance(documents, Streamed):
        return _split_stream(documents, share)
    digests = np.fromiter(map(digest, documents), dtype=np.uint64, count=len(documents))
    _, first = np.unique(digests, return_index=True)  # finds copies without holding the texts in memory
    first.sort()
    count = _held(len(first), share)
    order = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed)).numpy()
    held = first[order[:count]]
    rest = np.flatnonzero(~np.isin(digests, digests[held]))
    return Documents(documents, rest, _hash(digests[rest].tobytes())), [documents[i] for i in held.tolist()]


def _split_stream(documents: Streamed, share: float) -> tuple[Streamed, list[Document]]:
    different: dict[int, Document] = {}
    read = size = 0
    for _, document in islice(documents.read(), _FIRST_DOCUMENTS):
        different.setdefault(digest(document), document)
        read, size = read + 1, size + characters(document)
        if size >= _FIRST_CHARACTERS and len(different) > 1:
            break
    held = list(different.items())[: _held(len(different), share)]
    mixed = max(1, min(_MIXED_DOCUMENTS, _MIXED_CHARACTERS * read // size))
    apart = documents.held_out | {key for key, _ in held}
    facts = [len(different), *different, *sorted(apart)]
    mark = _hash(documents.fingerprint.encode() + np.array(facts, dtype=np.uint64).tobytes())
    return replace(documents, held_out=apart, mixed=mixed, fingerprint=mark), [document for _, document in held]


def _held(different: int, share: float) -> int:
    if different < 2:
        raise UserError(f"{different} distinct documents leave none to train on once one is held out: give more text")
    return min(max(1, round(share * different)), different - 1)


def fingerprint(documents: Sequence[Document] | Streamed) -> str:
    """Hash of the texts in their order, 16 hexadecimal digits."""
    if isinstance(documents, Documents | Streamed):
        return documents.fingerprint
    return _hash(np.fromiter(map(digest, documents), dtype=np.uint64, count=len(documents)).tobytes())


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def mixed_seed(*facts: int | str) -> int:
    """A seed derived from facts: equal facts give equal seeds, different facts unrelated ones."""
    return int(_hash(repr(facts).encode()), 16) >> 1


def in_order(
    documents: Sequence[Document] | Streamed, seed: int, epoch: int, start: int = 0
) -> Iterator[tuple[int, Document]]:
    """The documents of an epoch with their indices in its order, from index `start` on.

    The order depends on the seed and the epoch alone.
    """
    seed = mixed_seed(seed, "epoch", epoch)
    if isinstance(documents, Streamed):
        yield from documents.read(seed, start)
        return
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    for place in range(start, len(order)):
        yield place, documents[int(order[place])]
