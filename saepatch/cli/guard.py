"""How commands end: exit codes, one line for a mistake or an interrupt, and a traceback only for a bug."""

import atexit
import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from saepatch.errors import UserError, reason_of
from saepatch.records.secrets import redacted

LOGGERS = ("saepatch", "training", "experiments", "saepatch_training", "saepatch_experiments")  # in a clone; installed
LONGEST = 2_000  # characters of a message
STOPPED = (signal.SIGINT, signal.SIGTERM)
_COMPLAINED: list[str] = []  # lines that commands of this process ended with


@contextmanager
def own_process(whole: bool) -> Iterator[None]:
    """Signal handling when a command is the whole process: no traceback, and signals are ignored once it is done.

    Once the command itself has ended, a signal ends the process at once, whatever Python is doing. It says so in a line
    unless the command ended with one.
    """
    if not whole or threading.current_thread() is not threading.main_thread():
        yield
        return
    atexit.register(_set_signals, signal.SIG_IGN)  # runs last; Python would then give them their default action
    try:
        yield
    finally:
        _set_signals(_leave)


def _leave(*_: object) -> None:
    if not _COMPLAINED:
        with suppress(OSError):  # not through sys.stderr, which may be in the middle of a line
            os.write(2, b"interrupted: the command had ended, written files are complete\n")
    os._exit(130)


def _set_signals(handler: Any) -> None:
    for number in STOPPED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def guarded(run: Callable[[], None], interrupted: str) -> int:
    """Run a command; returns its exit code: 0, 2 for a user's mistake or a disk that refuses, 130 when interrupted.

    Args:
        run: The command.
        interrupted: Message for an interrupt that has none.
    """
    # Must be set before torch is loaded: threads that spin while they wait are far slower on a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The hub's client would report every attempt; our error names the outcome.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    _show_log()
    with _interrupts() as request:
        try:
            try:
                run()
            finally:
                sys.stdout.flush()
        except BaseException as error:
            code = _end(error, request.asked, interrupted)
            if code is None:
                raise
            return code
    return 0


class _Request:
    """Whether a signal asked to stop: libraries may turn an interrupt into an error of their own."""

    def __init__(self) -> None:
        self.asked = False
        self.hook = sys.unraisablehook  # replaced by `hear_again`

    def hear(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        raise KeyboardInterrupt

    def hear_again(self, unraisable: Any) -> None:
        """Raise an interrupt again that arrived in a callback that cannot raise, where Python only prints it."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            main = threading.main_thread().ident or 0
            again = threading.Timer(0.01, signal.pthread_kill, (main, signal.SIGINT))  # once this callback has returned
            again.daemon = True
            again.start()
        else:
            self.hook(unraisable)


@contextmanager
def _interrupts() -> Iterator[_Request]:
    """SIGTERM (of a scheduler) interrupts like Ctrl-C, unless either is ignored; only in the main thread."""
    request = _Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in STOPPED}
    try:
        for number, previous in before.items():
            if previous is not signal.SIG_IGN:
                signal.signal(number, request.hear)
        sys.unraisablehook = request.hear_again
        yield request
    finally:
        sys.unraisablehook = request.hook
        for number, previous in before.items():
            if signal.getsignal(number) == request.hear:
                signal.signal(number, previous if previous is not None else signal.SIG_DFL)


def _end(error: BaseException, asked: bool, interrupted: str) -> int | None:
    """Report how a command ended, and return its exit code; None for a bug."""
    if isinstance(error, KeyboardInterrupt):
        _complain(f"interrupted: {str(error) or interrupted}")
        return 130
    if asked and isinstance(error, Exception):
        _complain(f"interrupted: {interrupted}")
        return 130
    if isinstance(error, UserError):
        _complain(f"error: {error}")
        return 2
    if isinstance(error, BrokenPipeError):  # such as `| head`
        _drop_output()
        return 1
    if isinstance(error, OSError):
        _drop_output()
        where = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space there" if full else "give a path that can be read and written"
        _complain(
            f"error: {where}{error.strerror or reason_of(error)}: {remedy} and run the command again; written files "
            "are complete, and a run resumes from them"
        )
        return 2
    return None


def _complain(message: str) -> None:
    """Write one line to standard error; the middle of a very long one is cut."""
    line = redacted(" ".join(message.splitlines()))
    if len(line) > LONGEST:
        half = LONGEST // 2 - 20
        line = f"{line[:half]} … {len(line) - 2 * half:,} characters … {line[-half:]}"
    _COMPLAINED.append(line)
    with suppress(OSError):  # standard error may be a file on a full disk
        sys.stderr.write(line.encode(errors="backslashreplace").decode() + "\n")


def _drop_output() -> None:
    """Detach a standard output that cannot be written; Python would report the error again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Redacting(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def _show_log() -> None:
    # Only our loggers: libraries have handlers of their own, and a root handler would repeat their messages.
    handler = logging.StreamHandler()
    handler.setFormatter(_Redacting("%(message)s"))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]  # a new handler each time, since sys.stderr may have been replaced
        logger.setLevel(logging.INFO)
