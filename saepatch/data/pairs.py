"""Clean and corrupted prompt pairs."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from saepatch.data.files import TABLES, first_line, read_rows
from saepatch.errors import UserError

COLUMNS = ("clean", "corrupted", "answer", "counter")


@dataclass(frozen=True)
class PromptPair:
    """A clean and a corrupted prompt: `answer` is right after `clean`, `counter` after `corrupted`.

    Answers are the text that follows the prompt, with its leading space, one token each. `example` names the pair.
    """

    clean: str
    corrupted: str
    answer: str
    counter: str
    example: str = ""


def load_pairs(source: str, split: str = "report", n: int = 200, seed: int = 0) -> list[PromptPair]:
    """Load at most `n` prompt pairs (0: all of a file or dataset).

    `source` is one of the embedded model's tasks or, with the columns `clean, corrupted, answer, counter` (and
    optionally `example`, a name),

    - a file: `.jsonl`, `.json`, `.csv` (with a header) or `.parquet`;
    - a folder that `datasets` saved with `save_to_disk`;
    - a dataset of the Hugging Face hub, as OWNER/NAME or OWNER/NAME:CONFIGURATION.

    Files have no splits; `seed` affects only tasks: for files and datasets the first `n` pairs are returned.

    Raises:
        UserError: an unknown task or split, a source that cannot be read, or a row that lacks a column.
    """
    if n < 0:
        raise UserError(f"n = {n} asks for no pairs: give 1 or more, or 0 for all of a file or dataset")
    path = Path(source)
    if path.suffix in TABLES:
        read = islice(read_rows(path, "pairs", COLUMNS), n or None)
        return [_pair(row.value, row.where, f"{path.stem}-{row.number}") for row in read]
    if path.is_dir() or "/" in source:
        rows = _saved_dataset(path, split) if path.is_dir() else _hub_dataset(source, split)
        name = path.name.partition(":")[0]
        return [_pair(row, f"{i} of {source!r}", f"{name}-{i}") for i, row in enumerate(islice(rows, n or None))]
    from saepatch.organism import tasks

    if source not in tasks.TASKS:
        if source.partition(":")[0] in tasks.TASKS:
            raise UserError(f"unknown task {source!r}: give the split separately, as in split='report' (--split)")
        raise UserError(
            f"unknown task {source!r}: use one of {', '.join(tasks.TASKS)}, a file ({', '.join(TABLES)}) of pairs, "
            "a folder saved by `datasets`, or OWNER/NAME of a dataset"
        )
    return pairs_of(tasks.TASKS[source](split, n, seed))


def pairs_of(rows: Any) -> list[PromptPair]:
    """Pairs from an iterable of mappings with `clean, corrupted, answer, counter`, such as a `datasets.Dataset`."""
    return [_pair(row, str(number), str(number)) for number, row in enumerate(rows)]


def _pair(row: Any, where: str, name: str) -> PromptPair:
    """A pair from a mapping; `where` names the row in messages, `name` is the pair's default name."""
    if not isinstance(row, Mapping):
        raise UserError(f"{where}, is not a JSON object with {', '.join(COLUMNS)}")
    if missing := [key for key in COLUMNS if not isinstance(row.get(key), str)]:
        raise UserError(f"pair {where} lacks text for {', '.join(missing)}: each needs {', '.join(COLUMNS)}")
    own = row.get("example")
    named = name if own is None or own == "" else str(own)
    return PromptPair(row["clean"], row["corrupted"], row["answer"], row["counter"], named)


def _saved_dataset(folder: Path, split: str) -> Any:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(folder))
    except Exception as error:  # damaged files fail in many ways inside the loader; all are bad input
        raise UserError(
            f"folder {str(folder)!r} is not a dataset saved by `datasets` with save_to_disk ({first_line(error)}): "
            "save it that way, or give a file of pairs"
        ) from error
    if not isinstance(dataset, DatasetDict):
        return dataset
    if split not in dataset:
        raise UserError(
            f"{str(folder)!r} has no split {split!r}: give one of {', '.join(map(str, dataset))} with --split"
        )
    return dataset[split]


def _hub_dataset(source: str, split: str) -> Any:
    from datasets import load_dataset

    name, _, configuration = source.partition(":")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        if Path(source).is_file():
            raise UserError(f"pairs cannot be read from a file like {source!r}: use .jsonl, .json, .csv or .parquet")
        raise UserError(f"{source!r} is neither a file or folder nor a dataset's OWNER/NAME: check the path")
    try:
        return load_dataset(name, configuration or None, split=split)
    except Exception as error:  # anything the hub's client raises: no network, no such dataset, no such split
        raise UserError(
            f"cannot load dataset {source!r}, split {split!r} ({first_line(error)}): check its name and split, or "
            "download it on a machine with network access and give the folder or file"
        ) from error
