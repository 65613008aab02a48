"""Clean and corrupted prompt pairs."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from saepatch.data.files import TABLES
from saepatch.data.sources import is_source, source_rows
from saepatch.errors import UserError
from saepatch.model.inputs.images import ImagePrompt

COLUMNS = ("clean", "corrupted", "answer", "counter")


@dataclass(frozen=True)
class PromptPair:
    """A clean and a corrupted prompt: `answer` is right after `clean`, `counter` after `corrupted`.

    Answers are the text that follows the prompt, with its leading space: one token each, or several where a metric sums
    over them (`DeclaredMetric.sums`). `example` names the pair. Prompts with pictures are `ImagePrompt`s.
    """

    clean: str
    corrupted: str
    answer: str
    counter: str
    example: str = ""


def load_pairs(source: str, split: str = "report", n: int = 200, seed: int = 0) -> list[PromptPair]:
    """Load at most `n` prompt pairs (0: all of a file or dataset).

    `source` is one of the embedded model's tasks or, with the columns `clean, corrupted, answer, counter` (and
    optionally `example`, a name, and `image`, a picture's file, or `clean_image` and `corrupted_image`),

    - a file: `.jsonl`, `.json`, `.csv` (with a header) or `.parquet`;
    - a folder that `datasets` saved with `save_to_disk`;
    - a dataset of the Hugging Face hub, as OWNER/NAME or OWNER/NAME:CONFIGURATION.

    Each `<image>` in a prompt stands for a picture; files of pictures are relative to the file of pairs. Files have no
    splits; `seed` affects only tasks: for files and datasets the first `n` pairs are returned.

    Raises:
        UserError: an unknown task or split, a source that cannot be read, or a row that lacks a column.
    """
    if n < 0:
        raise UserError(f"n = {n} asks for no pairs: give 1 or more, or 0 for all of a file or dataset")
    if is_source(source):
        rows = islice(source_rows(source, "pairs", COLUMNS, split), n or None)
        folder = Path(source) if Path(source).is_dir() else Path(source).parent
        return [_pair(row.value, row.where, name, folder) for row, name in rows]
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


def _pair(row: Any, where: str, name: str, folder: Path = Path()) -> PromptPair:
    """A pair from a mapping; `where` names the row in messages, `name` is the pair's default name."""
    if not isinstance(row, Mapping):
        raise UserError(f"{where}, is not a JSON object with {', '.join(COLUMNS)}")
    if missing := [key for key in COLUMNS if not isinstance(row.get(key), str)]:
        raise UserError(f"pair {where} lacks text for {', '.join(missing)}: each needs {', '.join(COLUMNS)}")
    own = row.get("example")
    named = name if own is None or own == "" else str(own)
    clean, corrupted = (_prompt(row, side, where, folder) for side in ("clean", "corrupted"))
    return PromptPair(clean, corrupted, row["answer"], row["counter"], named)


def _prompt(row: Mapping[str, Any], side: str, where: str, folder: Path) -> str:
    """One prompt of a pair, with its pictures."""
    files = row.get(f"{side}_image") or row.get("image")
    if not files:
        return row[side]
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, list | tuple) or not all(isinstance(file, str) for file in files):
        raise UserError(f"pair {where}: its image is {files!r}, not a file: write the path of a picture, or several")
    return ImagePrompt(row[side], *(folder / file for file in files))
