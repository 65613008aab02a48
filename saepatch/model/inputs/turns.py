"""The turns of a chat, found again in a prompt by what the model's chat template writes around them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from saepatch.errors import UserError

_MARKS = ("Zqxa", "Zqxb", "Zqxc")  # contents that no template has, and that any tokenizer gives back
Span = tuple[str, int, int]
"""A role, the first token of its turn, and the first after it."""


def written_chat(tokenizer: Any, name: str, turns: Sequence[Mapping[str, str]], ready: bool) -> str:
    """Messages in a tokenizer's chat template, as `LanguageModel.chat` returns them."""
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {name!r} has no chat template: write the whole prompt yourself")
    try:
        return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=ready))
    except Exception as error:  # templates are programs, which raise what they like
        roles = ", ".join(turn["role"] for turn in turns)
        raise UserError(f"the chat template of {name!r} refuses messages by {roles}: {error}") from error


@dataclass(frozen=True)
class ChatFrame:
    """What a chat template writes around contents.

    `opening` stands before the first request, `answer` between a request and its answer, `request` between an answer
    and the next request; `ends`, by role, may follow the last content. A template with system messages writes `first`
    before one, and `system` between it and the first request.
    """

    opening: str
    answer: str
    request: str
    ends: Mapping[str, tuple[str, ...]]
    first: str = ""
    system: str = ""

    @classmethod
    def of(cls, rendered: Callable[[Sequence[Mapping[str, str]], bool], str]) -> "ChatFrame":
        """The frame of a template, from what it makes of chats of marks, with and without an answer to follow.

        Raises:
            UserError: it drops or repeats contents, so that turns cannot be told apart.
        """

        def around(*roles: str, ready: bool = False) -> list[str]:
            marks = _MARKS[: len(roles)]
            turns = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
            return _between(rendered(turns, ready), marks)

        opening, answer, request, _ = around("user", "assistant", "user")
        if not (answer.strip() and request.strip()):
            raise UserError("the chat template writes nothing between turns, which cannot be told apart: give indices")
        chats = {"user": ("user",), "assistant": ("user", "assistant")}
        ends = {
            role: tuple(dict.fromkeys(around(*roles, ready=ready)[-1] for ready in (True, False)))
            for role, roles in chats.items()
        }
        try:
            first, system, _, _ = around("system", "user", "assistant")
        except UserError:  # a template without system messages
            return cls(opening, answer, request, ends)
        return cls(opening, answer, request, ends, first, system)

    def turns(self, text: str) -> list[tuple[str, int, int]]:
        """Each content of a rendered chat as (role, start, end) in characters.

        Raises:
            UserError: the text does not begin as the template's chats do.
        """
        own = len(self.first) > len(self.opening) or not text.startswith(self.opening)
        if self.system and own and text.startswith(self.first):
            role, place = "system", len(self.first)
        elif text.startswith(self.opening):
            role, place = "user", len(self.opening)
        else:
            raise UserError(
                f"a prompt does not begin as chats of this model do ({self.opening!r}), so it has no turns: write it "
                "with model.chat, or give indices"
            )
        after = {"system": self.system, "user": self.answer, "assistant": self.request}
        found = []
        while (end := text.find(after[role], place)) >= 0:
            found.append((role, place, end))
            place, role = end + len(after[role]), "assistant" if role == "user" else "user"
        fitting = [len(end) for end in self.ends.get(role, ()) if text[place:].endswith(end)]
        return [*found, (role, place, len(text) - max(fitting, default=0))]


def _between(text: str, marks: Sequence[str]) -> list[str]:
    """The text before, between and after marks that occur once each, in order."""
    if any(text.count(mark) != 1 for mark in marks) or sorted(marks, key=text.index) != list(marks):
        raise UserError("the chat template drops or repeats messages, so turns cannot be told apart: give indices")
    parts = []
    for mark in marks:
        before, _, text = text.partition(mark)
        parts.append(before)
    return [*parts, text]


def token_spans(frame: ChatFrame, ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[Span]:
    """The turns of a prompt in tokens: all tokens with a character of a content."""
    ends = [len(decode(ids[: i + 1])) for i in range(len(ids))]
    starts = [0, *accumulate(ends[:-1], max)]
    spans = []
    for role, start, end in frame.turns(decode(ids)):
        inside = [i for i in range(len(ids)) if starts[i] < end and ends[i] > start]
        if inside:
            spans.append((role, inside[0], inside[-1] + 1))
    return spans
