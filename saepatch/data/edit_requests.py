"""Requests to change a fact that a model states, with the questions that measure the change."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from saepatch.data.files import TABLES
from saepatch.data.sources import is_source, source_rows
from saepatch.errors import UserError
from saepatch.organism.edits import edit_rows
from saepatch.records.documents import parse_json

COLUMNS = ("prompt", "subject", "target", "true")
KINDS = ("efficacy", "paraphrase", "neighbourhood", "reversal", "ripple")


@dataclass(frozen=True)
class FactQuestion:
    """A prompt whose right answer, once the fact is edited, is `target` and not `other`.

    For a neighbourhood question, `target` is the answer that was right before and still is. `conditions` are prompts
    and answers that the unedited model must know for the question to count, such as the second hop of a two-hop
    question.
    """

    kind: str
    prompt: str
    target: str
    other: str
    conditions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class EditRequest:
    """A fact to change: `prompt`, with `{}` for the `subject`, is to be continued by `target` instead of `true`.

    Answers are the text that follows the prompt, with its leading space; they may have several tokens.
    """

    prompt: str
    subject: str
    target: str
    true: str
    example: str = ""
    questions: tuple[FactQuestion, ...] = ()

    def __post_init__(self) -> None:
        """Raises UserError where the prompt has no place for the subject, or a text is missing."""
        if self.prompt.count("{}") != 1:
            raise UserError(
                f"prompt {self.prompt!r} of {self._name}: write {{}} once, where the subject {self.subject!r} stands, "
                "as in '{} is in the city of'"
            )
        if not self.subject.strip() or not self.target or not self.true:
            raise UserError(f"{self._name} has an empty subject, target or true answer: give all three")
        if self.target == self.true:
            raise UserError(f"target {self.target!r} of {self._name} is the true answer: give another answer")

    @property
    def _name(self) -> str:
        return f"request {self.example or repr(self.subject)}"

    @property
    def text(self) -> str:
        """The prompt with its subject."""
        return self.prompt.replace("{}", self.subject)

    @property
    def all_questions(self) -> tuple[FactQuestion, ...]:
        """The edited prompt itself (kind "efficacy"), then the other questions."""
        return (FactQuestion("efficacy", self.text, self.target, self.true), *self.questions)


def load_edit_requests(source: str, split: str = "train", n: int = 0) -> list[EditRequest]:
    """Load at most `n` requests (0: all) from a file, a folder saved by `datasets`, or a hub dataset; `organism`:
    landmarks and capitals of the embedded model.

    Columns, or keys of a JSON object: `prompt` (with `{}`), `subject`, `target`, `true`, and optionally

    - `example`: a name;
    - `paraphrases`: prompts with the same answers;
    - `neighbourhood`: prompts about other subjects whose answer is, and remains, `true`; or objects with `prompt` and
      `answer`;
    - `reversal`, `ripple`: objects with `prompt`, `target` (the right answer once edited), `other`, and, for `ripple`,
      `conditions`: objects with `prompt` and `answer` that the model must know before.

    In a CSV file the lists are JSON.

    Raises:
        UserError: the source cannot be read, holds no request, a row lacks a text or has a list of another form, or two
            requests have the same name.
    """
    if n < 0:
        raise UserError(f"n = {n} asks for no requests: give 1 or more, or 0 for all")
    if source == "organism":
        return [edit_request(row) for row in islice(edit_rows(), n or None)]
    if not is_source(source):
        raise UserError(
            f"requests {source!r}: give organism, a file ({', '.join(TABLES)}), a folder, or OWNER/NAME of a dataset"
        )
    rows = islice(source_rows(source, "requests", COLUMNS, split), n or None)
    requests = [edit_request(row.value, row.where, name) for row, name in rows]
    if not requests:
        raise UserError(f"{source!r} holds no requests: write one object per line, with {', '.join(COLUMNS)}")
    name, times = Counter(request.example for request in requests).most_common(1)[0]
    if times > 1:
        raise UserError(f"two requests of {source!r} are called {name!r}: give each its own example name, or none")
    return requests


def edit_request(row: Any, where: str = "a request", name: str = "") -> EditRequest:
    """A request from a mapping; `where` names it in messages, `name` is its default name.

    Raises:
        UserError: as `load_edit_requests`.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{where}, is not a JSON object with {', '.join(COLUMNS)}")
    if missing := [key for key in COLUMNS if not isinstance(row.get(key), str)]:
        raise UserError(f"request {where} lacks text for {', '.join(missing)}: each needs {', '.join(COLUMNS)}")
    example = row.get("example")
    if row["subject"] not in row["prompt"] and "{}" not in row["prompt"]:
        raise UserError(f"request {where}: subject {row['subject']!r} is not in the prompt {row['prompt']!r}")
    prompt = row["prompt"] if "{}" in row["prompt"] else row["prompt"].replace(row["subject"], "{}", 1)
    target, true = row["target"], row["true"]
    questions = [FactQuestion("paraphrase", text, target, true) for text in _listed(row, "paraphrases", where, str)]
    for item in _listed(row, "neighbourhood", where, (str, Mapping)):
        about, answer = (item, true) if isinstance(item, str) else _texts(item, ("prompt", "answer"), where)
        questions.append(FactQuestion("neighbourhood", about, answer, target))
    for kind in ("reversal", "ripple"):
        for item in _listed(row, kind, where, Mapping):
            asked, right, other = _texts(item, ("prompt", "target", "other"), where)
            known = [_texts(each, ("prompt", "answer"), where) for each in _listed(item, "conditions", where, Mapping)]
            questions.append(FactQuestion(kind, asked, right, other, tuple((text, answer) for text, answer in known)))
    return EditRequest(prompt, row["subject"], target, true, str(example or name), tuple(questions))


def _listed(row: Mapping[str, Any], key: str, where: str, kind: Any) -> Iterator[Any]:
    """The items of a list that may be missing, or be the JSON text of a cell."""
    value = row.get(key) or []
    if isinstance(value, str):
        value = parse_json(value, f"request {where}: {key}", ": write it as a JSON list")
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise UserError(f"request {where}: {key} has to be a list of {_forms(kind)}")
    yield from value


def _forms(kind: Any) -> str:
    return {str: "texts", Mapping: "objects"}.get(kind, "texts or objects")


def _texts(item: Any, keys: tuple[str, ...], where: str) -> tuple[str, ...]:
    if not isinstance(item, Mapping) or not all(isinstance(item.get(key), str) for key in keys):
        raise UserError(f"request {where}: {item!r} has to be an object with {', '.join(keys)}")
    return tuple(item[key] for key in keys)
