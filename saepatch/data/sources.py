"""Rows of a file, of a folder saved by `datasets`, or of a dataset of the Hugging Face hub."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from saepatch.data.files import TABLES, FileRow, first_line, read_rows
from saepatch.errors import UserError


def is_source(source: str) -> bool:
    """Whether a text names a file of rows, a folder, or a dataset of the hub."""
    path = Path(source)
    return path.suffix in TABLES or path.is_dir() or "/" in source


def source_rows(source: str, what: str, needs: Sequence[str], split: str) -> Iterator[tuple[FileRow, str]]:
    """Rows of a source, each with a default name.

    Args:
        source: A file (`.jsonl`, `.json`, `.csv` or `.parquet`), a folder that `datasets` saved, or OWNER/NAME or
            OWNER/NAME:CONFIGURATION of a dataset.
        what: What the rows are, for messages ("pairs").
        needs: Required columns of a CSV or Parquet file.
        split: Split of a dataset; files have none.

    Raises:
        UserError: the source cannot be read.
    """
    path = Path(source)
    if path.suffix in TABLES:
        yield from ((row, f"{path.stem}-{row.number}") for row in read_rows(path, what, needs))
        return
    rows = _saved_dataset(path, what, split) if path.is_dir() else _hub_dataset(source, what, split)
    name = path.name.partition(":")[0]
    yield from ((FileRow(row, i, f"{i} of {source!r}"), f"{name}-{i}") for i, row in enumerate(rows))


def _saved_dataset(folder: Path, what: str, split: str) -> Any:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(folder))
    except Exception as error:  # damaged files fail in many ways inside the loader; all are bad input
        raise UserError(
            f"folder {str(folder)!r} is not a dataset saved by `datasets` with save_to_disk ({first_line(error)}): "
            f"save it that way, or give a file of {what}"
        ) from error
    if not isinstance(dataset, DatasetDict):
        return dataset
    if split not in dataset:
        raise UserError(
            f"{str(folder)!r} has no split {split!r}: give one of {', '.join(map(str, dataset))} with --split"
        )
    return dataset[split]


def _hub_dataset(source: str, what: str, split: str) -> Any:
    from datasets import load_dataset

    name, _, configuration = source.partition(":")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        if Path(source).is_file():
            raise UserError(f"{what} cannot be read from a file like {source!r}: use .jsonl, .json, .csv or .parquet")
        raise UserError(f"{source!r} is neither a file or folder nor a dataset's OWNER/NAME: check the path")
    try:
        return load_dataset(name, configuration or None, split=split)
    except Exception as error:  # anything the hub's client raises: no network, no such dataset, no such split
        raise UserError(
            f"cannot load dataset {source!r}, split {split!r} ({first_line(error)}): check its name and split, or "
            "download it on a machine with network access and give the folder or file"
        ) from error
