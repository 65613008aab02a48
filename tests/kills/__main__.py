"""`make kills`: commands get SIGKILL, SIGTERM, SIGINT, and SIGINT twice, at random moments of their work.

After each of them the same command, started again, has to end with 0, leave the same files with the same numbers as one
that nobody disturbed, and nothing else; and what was stopped has to say so in one line, with the exit code 130.

What is heavy is imported once: commands are forked from this process, as often as it takes. Moments follow from the
seed, the machine's speed aside.
"""

import argparse
import atexit
import gc
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch

from kills.scenarios import Scenario, scenarios
from saepatch.__main__ import main as command_line
from saepatch.cli import main as cli

run_here = cli.main
HEAVY = (
    *("datasets", "pyarrow.parquet", "sae_lens", "scipy.stats", "transformers.models.llama.modeling_llama"),
    *("saepatch.pages", "saepatch.runs.merge", "training.loop.sweep", "training.loop.trainer"),
)

SIGNALS = {
    "SIGKILL": (signal.SIGKILL,),
    "SIGTERM": (signal.SIGTERM,),
    "SIGINT": (signal.SIGINT,),
    "SIGINT twice": (signal.SIGINT, signal.SIGINT),
}
STOPPED = {signal.SIGTERM, signal.SIGINT}
PATIENCE = 120.0  # seconds that a command may take
TRACES = ("Traceback", "Exception ignored", "Error:")


def start(command: Sequence[str], log: Path) -> int:
    """Start a command as the shell does; signals reach it from its first line on. Returns its process id."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPED)
    process = os.fork()
    if process:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPED)
        return process
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)
    os.dup2(handle, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["saepatch", *command]

    def begun() -> int:  # where Python itself is no longer what a signal finds
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPED)
        return run_here()

    cli.main = begun  # type: ignore[assignment]
    code = 1
    try:
        code = command_line()
    except SystemExit as left:
        code = int(left.code or 0)
    finally:  # as Python ends, but for the memory of all that was imported
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        os._exit(code)


def wait(process: int, seconds: float = PATIENCE) -> int | None:
    """Its exit code; None where it is still at work after so many seconds."""
    handle = os.pidfd_open(process)
    try:
        if not select.select([handle], [], [], seconds)[0]:
            return None
    finally:
        os.close(handle)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def disturbed(scenario: Scenario, sent: Sequence[signal.Signals], moments: Sequence[float], log: Path) -> str | None:
    """Run a command and send it signals at these moments; what is wrong with its end, or None where it ended before."""
    process = start(scenario.command, log)
    for number, moment in zip(sent, moments, strict=True):
        if (code := wait(process, moment)) is not None:
            break
        os.kill(process, number)
    else:
        code = wait(process)
    if code is None:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        return f"still there {PATIENCE:.0f} s after {sent[0].name}"
    text = log.read_text()
    if any(trace in text for trace in TRACES):
        return f"{sent[0].name}, exit code {code}:\n{text}"
    if code == 0:
        return None
    if code != (-signal.SIGKILL if sent[0] == signal.SIGKILL else 130):
        return f"exit code {code} after {sent[0].name}: {text}"
    if code == 130 and len(sent) == 1 and text.count("interrupted: ") != 1:
        return f"{sent[0].name}, without a line that says so: {text!r}"
    return ""


def finished(scenario: Scenario, out: Path, log: Path, before: dict[str, object]) -> str:
    """Run the command to its end; what is wrong with what it leaves."""
    code = wait(start(scenario.command, log))
    text = log.read_text()
    if code != 0 or any(trace in text for trace in TRACES):
        return f"started again: exit code {code}: {text}"
    now = scenario.state(out)
    if now["files"] != before["files"]:
        files, there = set(map(str, now["files"])), set(map(str, before["files"]))  # type: ignore[call-overload]
        return f"left over: {sorted(files - there)}, missing: {sorted(there - files)}"
    return ", ".join(
        f"{name} differs: {difference(before[name], now[name])}" for name in before if now[name] != before[name]
    )


def difference(one: object, other: object) -> str:
    """Where the first difference is."""
    texts = [value.decode(errors="replace") if isinstance(value, bytes) else repr(value) for value in (one, other)]
    place = next((i for i, (a, b) in enumerate(zip(*texts)) if a != b), min(map(len, texts)))
    return " | ".join(text[max(0, place - 60) : place + 60] for text in texts)


def kill_all(scenario: Scenario, out: Path, trials: int, seed: int) -> tuple[Counter[str], list[str]]:
    """So many trials of each signal; counts by signal, and what went wrong."""
    log = out.parent / "stderr.txt"
    scenario.reset(out)
    assert run_here(scenario.command) == 0  # what it imports, its children need not
    gc.freeze()  # or a collection in a child would copy all of this process
    scenario.reset(out)
    began = time.monotonic()
    code = wait(start(scenario.command, log))
    length = time.monotonic() - began
    assert code == 0, log.read_text()
    before = scenario.state(out)
    chance = random.Random(f"{seed} {scenario.name}")
    counts: Counter[str] = Counter()
    problems: list[str] = []
    for name, sent in SIGNALS.items():
        for_this = trials if len(sent) == 1 else -(-trials // 2)
        while counts[name] < for_this:
            scenario.reset(out)
            started = time.monotonic()
            moments = [chance.uniform(0, length), *(chance.uniform(0, 0.1) for _ in sent[1:])]
            problem = disturbed(scenario, sent, moments, log)
            if problem is None:
                length = min(length, time.monotonic() - started)
                counts[f"{name} too late"] += 1
                if counts[f"{name} too late"] > 5 * trials:
                    problems.append(f"{scenario.name}: {name} never comes before the end")
                    break
                continue
            counts[name] += 1
            problem = problem or finished(scenario, out, log, before)
            if problem:
                problems.append(f"{scenario.name}, {name} after {moments[0]:.3f} of {length:.2f} s: {problem}")
                sys.stderr.write(f"{problems[-1]}\n")
    return counts, problems


def main() -> int:
    parser = argparse.ArgumentParser(prog="make kills", description=__doc__)
    parser.add_argument("--trials", type=int, default=20, help="of each signal and command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", default="", help="some of training,sweep,restore,report,merge; empty: all")
    given = parser.parse_args()
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    os.fsync = lambda handle: None  # no trial cuts the power
    for module in HEAVY:
        import_module(module)
    folder = Path(tempfile.mkdtemp(prefix="kills-"))  # no context: forked commands leave through this frame
    out = folder / "out"
    wrong = 0
    for scenario in scenarios(folder / "place", out):
        if given.commands and scenario.name not in given.commands.split(","):
            continue
        began = time.monotonic()
        counts, problems = kill_all(scenario, out, given.trials, given.seed)
        wrong += len(problems)
        said = ", ".join(f"{counts[name]} {name}" for name in SIGNALS)
        late = sum(number for name, number in counts.items() if name.endswith("too late"))
        print(
            f"{scenario.name}: {said}: {len(problems)} wrong ({late} came too late; {time.monotonic() - began:.0f} s)",
            flush=True,
        )
    shutil.rmtree(folder)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
