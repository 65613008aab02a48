"""`make zoo`: every type of the installed transformers, tiny and random, through the checks; writes docs/models.md.

Types run in processes of their own, one after another, each within a time limit, so that one that hangs or kills its
process costs its own line and no other.
"""

import argparse
import json
import os
import select
import subprocess
import sys
from pathlib import Path

LIMIT = 900.0  # seconds that one type may take, the imports of a new process included


class Worker:
    """A process that examines one type after another."""

    def __init__(self) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "zoo", "--work"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)

    def examine(self, model_type: str) -> dict[str, str] | None:
        """Its line; None where the process died or hangs."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(model_type + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], LIMIT)
        line = self.process.stdout.readline() if ready else ""
        return json.loads(line) if line else None

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def work() -> None:
    """Read types from standard input, and write a line of JSON for each."""
    from zoo.checks import examine

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints is no answer
    for line in sys.stdin:
        print(json.dumps(examine(line.strip())), file=answers, flush=True)


def examine_all(types: list[str], kept: Path) -> list[dict[str, str]]:
    """A line for each type; those that `kept` holds from a run that was stopped are not made again."""
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    kept.parent.mkdir(parents=True, exist_ok=True)
    done = {row["type"] for row in rows}
    worker = Worker()
    for number, model_type in enumerate(types, 1):
        if model_type in done:
            continue
        row = worker.examine(model_type)
        if row is None:
            died = worker.process.poll() is not None
            worker.stop()
            worker = Worker()
            row = {"type": model_type, "bare": "?", "load": "crash: the process died" if died else "crash: too slow"}
        rows.append(row)
        with kept.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{number}/{len(types)} {json.dumps(row)}", flush=True)
    worker.stop()
    return sorted((row for row in rows if row["type"] in types), key=lambda row: row["type"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types; none: all of them")
    parser.add_argument("--out", type=Path, default=Path("docs/models.md"), help="where the table of all types goes")
    parser.add_argument("--kept", type=Path, default=Path("runs/zoo.jsonl"), help="where a stopped run goes on from")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work()
    from zoo.shapes import TYPES
    from zoo.table import page, summary

    rows = examine_all(options.types or TYPES, options.kept)
    print(summary(rows))
    if not options.types:
        options.out.write_text(page(rows))
        options.kept.unlink()


if __name__ == "__main__":
    main()
