"""Requests to be answered, from a file or from the embedded model's tasks."""

from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from saepatch.data.files import FileRow, read_rows
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel

PLANTED = ("refusal", "jailbreak")  # names of the embedded model's prompts
ROWS = 100  # default number of them


@dataclass(frozen=True)
class Request:
    """A prompt, the clean prompt that the donor reads instead (or None), and harmfulness: yes, no, or "" (unknown)."""

    example: str
    prompt: str
    clean: str | None
    harmful: str


def read_requests(source: str, model: LanguageModel, chat: bool, n: int) -> list[Request]:
    """The first `n` prompts of a file (0: all); with `chat`, put into the model's chat template.

    A row has a `prompt` and optionally `clean`, `harmful` and `example`, in .json, .csv, .parquet or JSON lines.

    For the embedded model, `refusal:SPLIT` are plain requests and `jailbreak:SPLIT` the same in a jailbreak framing,
    with a benign framing as `clean`; n = 0: 100 rows.

    Raises:
        UserError: a file that cannot be read, a row without a prompt, two prompts of the same name, or a prompt that
            the model cannot tokenise.
    """
    if source.partition(":")[0] in PLANTED and not Path(source).exists():
        return _planted(source, model, chat, n)
    path = Path(source)
    rows = islice(read_rows(path, "prompts", ["prompt"]), n or None)
    requests = [_request(row, f"{path.stem}-{i:04d}", model, chat) for i, row in enumerate(rows)]
    if not requests:
        raise UserError(f"{source!r} contains no prompt: write one object with a prompt per line")
    name, times = Counter(request.example for request in requests).most_common(1)[0]
    if times > 1:
        raise UserError(f"two prompts of {source!r} are called {name!r}: give each its own example name, or none")
    texts = [text for request in requests for text in (request.prompt, request.clean) if text is not None]
    for start in range(0, len(texts), 64):
        model.tokenize(texts[start : start + 64], "left")
    return requests


def _planted(source: str, model: LanguageModel, chat: bool, n: int) -> list[Request]:
    """Requests of the embedded model's own task."""
    from saepatch.organism import tasks, world

    task, _, split = source.partition(":")
    if chat or world.USER not in model.tokenizer.get_vocab():
        raise UserError(
            f"prompts {source!r} are the embedded model's, in its chat template already: leave --chat out, or give "
            "a file of prompts for another model"
        )
    if split not in world.SPLITS:
        raise UserError(f"prompts {source!r}: write {task}:SPLIT, SPLIT one of {', '.join(world.SPLITS)}")
    distinct: dict[str, Request] = {}
    for row in tasks.refusal(split, 4 * (n or ROWS)):  # some requests come in several framings
        prompt, clean = (row["plain"], None) if task == "refusal" else (row["corrupted"], row["clean"])
        name = f"{task}-{len(distinct):04d}"
        distinct.setdefault(prompt, Request(name, prompt, clean, "yes" if row["harmful"] else "no"))
    requests = list(distinct.values())[: n or ROWS]
    for request in requests:
        model.tokenize([request.prompt], "left")
    return requests


def _request(row: FileRow, name: str, model: LanguageModel, chat: bool) -> Request:
    value = row.value
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        raise UserError(f'{row.where}, has no text for prompt: write {{"prompt": "…", "clean": "…"}}')
    clean, harmful = value.get("clean"), value.get("harmful")
    if isinstance(harmful, str):  # from a CSV file
        harmful = {"true": True, "false": False, "": None}.get(harmful.lower(), harmful)
    if not isinstance(clean, str | None) or not isinstance(harmful, bool | None):
        raise UserError(f"{row.where}: if given, clean must be a text, and harmful true or false")
    prompt = model.chat(value["prompt"]) if chat else value["prompt"]
    clean = model.chat(clean) if chat and clean is not None else clean
    kind = "" if harmful is None else "yes" if harmful else "no"
    return Request(str(value.get("example") or name), prompt, clean, kind)
