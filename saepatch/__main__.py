"""The command line. Thin: it reads settings, calls the library and prints."""

import json
import math
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import saepatch
from saepatch.commandline import run_commands
from saepatch.config import (
    AttributeConfig,
    DemoConfig,
    InspectConfig,
    MergeConfig,
    PatchConfig,
    PushConfig,
    RestoreConfig,
    SteerConfig,
    SweepConfig,
)
from saepatch.errors import UserError

if TYPE_CHECKING:
    from saepatch.session import Session


def demo(config: DemoConfig) -> None:
    from saepatch.demo import run_demo

    found = run_demo(config)
    p, rates = found.patching, found.restoration.rates
    sixteen = p.denoise.sizes.index(16)
    print(f"IOI at {p.site}, share of the logit difference restored [95 % interval]")
    print(f"     16 latents, each prompt's own: {p.denoise.top[sixteen]}")
    print(f"     16 latents, one set chosen on other names: {p.fixed.top[sixteen]}")
    print(f"     16 random latents: {p.denoise.random[sixteen]}")
    print(f"Jailbroken requests refused: {rates['jailbroken']}")
    print(f"     with {len(found.restoration.latents)} latents restored: {rates['restored']}")
    print(f"     with as many random ones: {rates['random']}")
    print(f"Report: {config.out}/report.html   Figures: {config.out}/summary.json   Rows: {config.out}/results.parquet")


def inspect(config: InspectConfig) -> None:
    from saepatch.dictionaries import load_saes
    from saepatch.inspection import dictionary_lines, model_lines
    from saepatch.models import load_model

    model = load_model(config.model, config.device, config.dtype, config.trust_remote_code)
    lines = model_lines(model)
    if config.sae:
        lines += dictionary_lines(model, load_saes(config.sae, config.device))
    print("\n".join(lines))


def sweep(config: SweepConfig) -> None:
    from saepatch.runs import run_sweep

    found = run_sweep(config)
    if found.shards == 1:
        merge(MergeConfig(config.out))
    else:
        print(f"shard {found.shard} of {found.shards} is finished ({found.parts} parts, {found.edits:,} edits)")
        print(f"When all of them are: saepatch merge {shlex.quote(config.out)}")


def merge(config: MergeConfig) -> None:
    from saepatch.merging import merge_run

    out = Path(config.out)
    print(merge_run(out).table())
    print(f"Rows: {out}/results.parquet   Pairs: {out}/pairs.parquet   Figures: {out}/summary.json")


def restore(config: RestoreConfig) -> None:
    from saepatch.answering import run_restore

    print(run_restore(config).table())
    print(f"Report: {config.out}/report.html   Figures: {config.out}/summary.json   Rows: {config.out}/results.parquet")


def push(config: PushConfig) -> None:
    from saepatch.hub import push as push_to_hub

    files = push_to_hub(
        config.folder,
        config.repo_id,
        private=config.private,
        branch=config.branch,
        message=config.message,
        dry_run=config.dry_run,
    )
    print("\n".join(files))
    print(f"{len(files)} files {'would go' if config.dry_run else 'went'} to {config.repo_id}")


def steer(config: SteerConfig) -> None:
    from saepatch.session import open_session

    session = open_session(config)
    if not config.interactive:
        _answer(session, config.prompt)
        return
    talk = not config.json and sys.stdin.isatty()
    if talk:
        print(f"{session.title}. A prompt a line; /strength X, /reset, /quit.")
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
                raise UserError(f"unknown command {command!r}: there are /strength X, /reset and /quit")
            elif line:
                _answer(session, line)
        except UserError as error:  # a mistake ends no session
            sys.stderr.write(f"error: {error}\n")


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"strength {text!r} is no number: write one, as in /strength 1.5")
    return value


def _answer(session: "Session", prompt: str) -> None:
    from saepatch.columns import Live, columns
    from saepatch.session import texts_of
    from saepatch.streaming import Written

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


COMMANDS: Mapping[str, tuple[type, Callable[[Any], None]]] = {
    "demo": (DemoConfig, demo),
    "inspect": (InspectConfig, inspect),
    "patch": (PatchConfig, sweep),
    "attribute": (AttributeConfig, sweep),
    "restore": (RestoreConfig, restore),
    "merge": (MergeConfig, merge),
    "push": (PushConfig, push),
    "steer": (SteerConfig, steer),
}


def _version() -> str:
    from importlib.metadata import version

    return f"saepatch {version('saepatch')}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    return run_commands(COMMANDS, "saepatch", saepatch.__doc__ or "", _version, arguments)


if __name__ == "__main__":
    sys.exit(main())
