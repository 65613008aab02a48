"""Signals at any moment: one line and 130, whether Python is importing, in a callback, in a library or at its end."""

import contextlib
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

import saepatch.__main__ as process
from saepatch.cli.parser import run_commands
from saepatch.settings.finished.runs import RunsConfig

SIGNALS = [signal.SIGINT, signal.SIGTERM]


def run(command, capsys):
    before = [signal.getsignal(number) for number in SIGNALS]
    code = run_commands({"runs": (RunsConfig, command)}, "saepatch", "", str, ["runs"])
    assert [signal.getsignal(number) for number in SIGNALS] == before
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "interrupted: written files are complete\n"
    return code


@pytest.mark.parametrize("number", SIGNALS)
def test_either_signal_stops_any_command(number, capsys):
    assert run(lambda _: signal.raise_signal(number), capsys) == 130


def test_an_error_that_a_library_makes_of_an_interrupt(capsys):
    def command(_):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        raise TypeError("cannot compare")

    assert run(command, capsys) == 130


def test_an_interrupt_in_a_callback_that_cannot_raise(capsys):
    class Callback:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def command(_):
        Callback()
        time.sleep(5)
        raise AssertionError("the interrupt was forgotten")

    assert run(command, capsys) == 130


def test_an_interrupt_while_modules_are_loaded(monkeypatch, capsys):
    def loading():
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setitem(sys.modules, "saepatch.cli.main", SimpleNamespace(main=loading))
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        assert process.main() == 130
        for number in SIGNALS:  # a second one finds Python at its end
            signal.raise_signal(number)
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)
    assert capsys.readouterr().err.startswith("interrupted: ")


PROGRAM = """
import atexit, os, signal, sys
import saepatch.cli.main as program

def ending():
    signal.raise_signal(signal.SIGINT)
    sys.stdout.write("still here")

def command(config):
    atexit.register(ending)  # as libraries do
    os.kill(os.getpid(), signal.SIGINT)

program.COMMANDS = {"runs": (program.RunsConfig, command)}
sys.argv = ["saepatch", "runs"]
sys.exit(program.main())
"""


def test_an_interrupt_after_the_command_says_so():
    program = PROGRAM.replace("    os.kill(os.getpid(), signal.SIGINT)\n", "")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted: the command had ended, written files are complete\n"


def test_a_second_interrupt_ends_the_process_at_once():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted: written files are complete\n"
