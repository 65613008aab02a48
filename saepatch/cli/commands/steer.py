"""`saepatch steer`: one prompt, or an interactive session."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from saepatch.cli.page_tracker import page_tracker
from saepatch.errors import UserError
from saepatch.settings.steer import SteerConfig

if TYPE_CHECKING:
    from saepatch.runs.commands.session import Session
    from saepatch.steering.streaming import Written
    from saepatch.tracking.open import Tracker

ANSWER = ("prompt", "strength", "before", "after", "perplexity before", "perplexity after")


def steer(config: SteerConfig) -> None:
    from saepatch.runs.commands.session import open_session

    session = open_session(config)
    with ExitStack() as stack:
        _converse(config, session, _answerer(session, stack))


def _converse(config: SteerConfig, session: "Session", answer: Callable[[str], None]) -> None:
    if not config.interactive:
        answer(config.prompt)
        return
    talk = not config.json and sys.stdin.isatty()
    if talk:
        print(f"{session.title}. Enter one prompt per line; commands: /strength X, /reset, /quit.")
    while True:
        try:
            line = input("> " if talk else "").strip()
        except EOFError:
            return
        command, _, value = line.partition(" ")
        if command == "/quit":
            return
        try:
            if command == "/reset":
                session.reset()
            elif command == "/strength":
                session.strength = _number(value)
            elif command.startswith("/"):
                raise UserError(f"unknown command {command!r}: use /strength X, /reset or /quit")
            elif line:
                answer(line)
        except UserError as error:  # the session continues after an error
            sys.stderr.write(f"error: {error}\n")


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"strength {text!r} is not a number: write one, as in /strength 1.5")
    return value


def _answerer(session: "Session", stack: ExitStack) -> Callable[[str], None]:
    """A function that answers a prompt. With --html it rewrites the page each time, and trackers get it at the end."""
    if not session.config.html:

        def plain(prompt: str) -> None:
            _answer(session, prompt)

        return plain

    from saepatch.pages.commands.steered import listen, read_cards, steered_page
    from saepatch.pages.tracked import track_dictionaries, track_page
    from saepatch.records.files import check_writable
    from saepatch.report import write_page
    from saepatch.runs.commands.session import texts_of

    path = Path(session.config.html)
    check_writable(str(path.parent))
    answers, cards = [], read_cards(session)
    tracker = None if session.config.track == "none" else stack.enter_context(page_tracker(session.config, "steer"))

    def answer_and_record(prompt: str) -> None:
        both = _answer(session, prompt)
        answers.append(listen(session, prompt, both, texts_of(both)))
        write_page(steered_page(session, answers, cards), path)
        if tracker is not None:
            before, after = answers[-1].perplexities
            tracker.log(
                {"strength": session.strength, "perplexity/before": before, "perplexity/after": after}, len(answers)
            )
        if not session.config.json:
            print(f"Page: {path}")

    def track_answers(tracker: "Tracker") -> None:
        if answers:
            tracker.table("Answers", ANSWER, [(a.prompt, a.strength, *a.answers, *a.perplexities) for a in answers])
            track_page(steered_page(session, answers, cards), path, tracker)
            track_dictionaries(session.config.sae, tracker)

    if tracker is not None:
        stack.callback(track_answers, tracker)
    return answer_and_record


def _answer(session: "Session", prompt: str) -> "tuple[Written, Written]":
    from saepatch.cli.columns import Live, columns
    from saepatch.runs.commands.session import texts_of
    from saepatch.steering.streaming import Written

    width, height = shutil.get_terminal_size((100, 24))
    screen, both = Live(sys.stdout, width, height), (Written(), Written())
    titles = ("before", f"after: {session.title}")
    for both in session.answer(prompt):
        if not session.config.json:
            screen.show(columns(texts_of(both), titles, width))
    if session.config.json:
        print(json.dumps(session.record(prompt, *both), ensure_ascii=False), flush=True)
    else:
        screen.show(columns(texts_of(both), titles, width), last=True)
    return both
