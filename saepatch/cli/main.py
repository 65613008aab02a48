"""The command line. Thin: it reads settings, calls the library and prints."""

import json
import math
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import saepatch
from saepatch.cli.parser import Said, run_commands
from saepatch.errors import UserError
from saepatch.settings.answering import RestoreConfig, SteerConfig
from saepatch.settings.commands import (
    AttributeConfig,
    CompareConfig,
    DemoConfig,
    InspectConfig,
    LatentConfig,
    MergeConfig,
    PatchConfig,
    PushConfig,
    ReportConfig,
    RunsConfig,
    SweepConfig,
)

if TYPE_CHECKING:
    from saepatch.runs.answers import Answers
    from saepatch.runs.driver import Finished
    from saepatch.runs.restorations import Plan
    from saepatch.runs.session import Session
    from saepatch.runs.sweeps import Sweep
    from saepatch.steering.streaming import Written
    from saepatch.tracking.open import Tracker


def demo(config: DemoConfig) -> Said:
    from saepatch.demo import run_demo
    from saepatch.runs.catalogue import read_json

    found = run_demo(config)
    p, rates = found.patching, found.restoration.rates
    sixteen = p.denoise.sizes.index(16)
    out = config.out
    lines = [
        f"IOI at {p.site}, share of the logit difference restored [95 % interval]",
        f"     16 latents, each prompt's own: {p.denoise.top[sixteen]}",
        f"     16 latents, one set chosen on other names: {p.fixed.top[sixteen]}",
        f"     16 random latents: {p.denoise.random[sixteen]}",
        f"Jailbroken requests refused: {rates['jailbroken']}",
        f"     with {len(found.restoration.latents)} latents restored: {rates['restored']}",
        f"     with as many random ones: {rates['random']}",
        f"Report: {out}/report.html   Figures: {out}/summary.json   Rows: {out}/results.parquet",
    ]
    return Said("\n".join(lines), {"out": out, "summary": read_json(Path(out) / "summary.json")})


def inspect(config: InspectConfig) -> Said:
    from saepatch.dictionaries.loading import load_saes
    from saepatch.model.loading import load_model
    from saepatch.reading.inspection import dictionary_lines, facts, model_lines

    model = load_model(config.model, config.device, config.dtype, trust_remote_code=config.trust_remote_code)
    dictionaries = load_saes(config.sae, config.device) if config.sae else {}
    lines = model_lines(model) + (dictionary_lines(model, dictionaries) if config.sae else [])
    return Said("\n".join(lines), facts(model, dictionaries))


def sweep(config: SweepConfig) -> Said:
    from saepatch.pages.gather import try_reading
    from saepatch.runs.sweeps import run_sweep

    said: list[Said] = []

    def conclude(work: "Sweep", tracker: "Tracker") -> None:
        out = Path(config.out)
        said.append(_merged(out, tracker, lambda: try_reading(work, out)))

    return _finished(run_sweep(config, conclude), said)


def restore(config: RestoreConfig) -> Said:
    from saepatch.pages.answered import show_answers
    from saepatch.runs.restorations import run_restore

    said: list[Said] = []

    def conclude(plan: "Plan", answers: "Answers", tracker: "Tracker") -> None:
        show_answers(plan, answers, tracker)
        said.append(_said(Path(config.out), answers.table()))

    return _finished(run_restore(config, conclude), said)


def _finished(done: "Finished", said: Sequence[Said]) -> Said:
    """What a run of one shard says; of several, what to do once all are finished."""
    if said:
        return said[0]
    from saepatch.runs.parts import read_records

    unit = "answers" if read_records(done.out)[0].work == "restore" else "edits"
    lines = [
        f"shard {done.shard} of {done.shards} is finished ({done.parts} parts, {done.count:,} {unit})",
        f"When all of them are: saepatch merge {shlex.quote(str(done.out))}",
    ]
    return Said("\n".join(lines), {"out": str(done.out), "shard": done.shard, "shards": done.shards, unit: done.count})


def merge(config: MergeConfig) -> Said:
    from saepatch.runs.catalogue import read_json
    from saepatch.tracking.open import RunDescription, open_tracker

    out = Path(config.out)
    if config.track == "none":
        return _merged(out, None)
    about = RunDescription(out, run=f"merge-{out.name}", config=asdict(config), job_type="merge")
    with open_tracker(config.track, about) as tracker:
        said = _merged(out, tracker)
        tracker.configure(read_json(out / "summary.json")["settings"])
    return said


def _merged(out: Path, tracker: "Tracker | None", before: Callable[[], None] = lambda: None) -> Said:
    """Put a run's parts together, write its report, and show both to a tracker."""
    from saepatch.pages import track_run, write_report
    from saepatch.runs.merge import merge_run

    table = merge_run(out).table()
    before()
    write_report(out)
    if tracker is not None:
        track_run(out, tracker)
    return _said(out, table)


def _said(out: Path, table: str) -> Said:
    """A finished run: its table, its summary, and where its files are."""
    from saepatch.runs.catalogue import read_json

    files = {"Report": "report.html", "Figures": "summary.json", "Rows": "results.parquet", "Pairs": "pairs.parquet"}
    there = "   ".join(f"{name}: {out / file}" for name, file in files.items() if (out / file).exists())
    facts = {"out": str(out), "report": str(out / "report.html"), "summary": read_json(out / "summary.json")}
    return Said(f"{table}\n{there}", facts)


def report(config: ReportConfig) -> Said:
    from saepatch.pages import write_report

    out = Path(config.run)
    if config.read:
        from saepatch.pages.gather import read_again

        read_again(out)
    path = write_report(out)
    return Said(f"Report: {path}", {"report": str(path)})


def runs(config: RunsConfig) -> Said:
    from saepatch.runs.catalogue import runs_facts, runs_table

    return Said(runs_table(Path(config.root)), runs_facts(Path(config.root)))


def compare(config: CompareConfig) -> Said:
    from saepatch.runs.catalogue import compare_runs, read_run

    found = compare_runs(read_run(Path(config.one)), read_run(Path(config.other)))
    text = found.table()
    if config.html:
        from saepatch.pages import compare_page
        from saepatch.report import write_page

        text += f"\n\nPage: {write_page(compare_page(found), Path(config.html))}"
    return Said(text, found.facts())


def latent(config: LatentConfig) -> Said:
    from saepatch.pages.latent import latent_lines, latent_page, read_named

    found = read_named(config)
    text = "\n\n".join("\n".join(latent_lines(one)) for one in found)
    if config.html:
        from saepatch.pages.tracked import track_dictionaries, track_page
        from saepatch.records.provenance import command_line, versions
        from saepatch.report import write_page

        told = ", ".join(f"{name} {version}" for name, version in versions().items())
        facts = {"model": f"{config.model} ({found[0].model_hash})", "texts": config.data or "the embedded model's own"}
        facts |= {"command": command_line(), "versions": told}
        page = latent_page(found, facts)
        text += f"\n\nPage: {write_page(page, Path(config.html))}"
        if config.track != "none":
            with _page_tracker(config, "latent") as tracker:
                track_page(page, Path(config.html), tracker)
                track_dictionaries(config.sae, tracker)
    return Said(text, found[0].facts() if len(found) == 1 else {"latents": [one.facts() for one in found]})


def push(config: PushConfig) -> Said:
    from saepatch.dictionaries.publish import push as push_to_hub

    files = push_to_hub(
        config.folder,
        config.repo_id,
        private=config.private,
        branch=config.branch,
        message=config.message,
        dry_run=config.dry_run,
    )
    went = f"{len(files)} files {'would go' if config.dry_run else 'went'} to {config.repo_id}"
    return Said("\n".join([*files, went]), {"files": list(files), "repo_id": config.repo_id, "dry_run": config.dry_run})


def steer(config: SteerConfig) -> None:
    from saepatch.runs.session import open_session

    session = open_session(config)
    with ExitStack() as stack:
        _converse(config, session, _answerer(session, stack))


def _converse(config: SteerConfig, session: "Session", answer: Callable[[str], None]) -> None:
    if not config.interactive:
        answer(config.prompt)
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
                answer(line)
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


def _answerer(session: "Session", stack: ExitStack) -> Callable[[str], None]:
    """What answers a prompt and, where a page is wanted, writes it anew each time; trackers get it at the end."""
    if not session.config.html:

        def plain(prompt: str) -> None:
            _answer(session, prompt)

        return plain

    from saepatch.pages.steered import listen, read_cards, steered_page
    from saepatch.pages.tracked import track_dictionaries, track_page
    from saepatch.records.files import check_writable
    from saepatch.report import write_page
    from saepatch.runs.session import texts_of

    path = Path(session.config.html)
    check_writable(str(path.parent))
    said, cards = [], read_cards(session)
    tracker = None if session.config.track == "none" else stack.enter_context(_page_tracker(session.config, "steer"))

    def kept(prompt: str) -> None:
        both = _answer(session, prompt)
        said.append(listen(session, prompt, both, texts_of(both)))
        write_page(steered_page(session, said, cards), path)
        if tracker is not None:
            before, after = said[-1].perplexities
            tracker.log(
                {"strength": session.strength, "perplexity/before": before, "perplexity/after": after}, len(said)
            )
        if not session.config.json:
            print(f"Page: {path}")

    def show(tracker: "Tracker") -> None:
        if said:
            tracker.table("Answers", ANSWER, [(s.prompt, s.strength, *s.answers, *s.perplexities) for s in said])
            track_page(steered_page(session, said, cards), path, tracker)
            track_dictionaries(session.config.sae, tracker)

    if tracker is not None:
        stack.callback(show, tracker)
    return kept


ANSWER = ("prompt", "strength", "before", "after", "perplexity before", "perplexity after")


def _page_tracker(config: "SteerConfig | LatentConfig", job_type: str) -> "Tracker":
    """The local log in a folder beside the page of --html, and the trackers that were asked for.

    The folder's name is one that no run has: a log that is begun anew takes the place of the one before.
    """
    from saepatch.tracking.open import RunDescription, open_tracker

    path = Path(config.html)
    about = RunDescription(
        path.with_name(f"{path.name}.log"),
        run=path.stem,
        config=asdict(config),
        job_type=job_type,
        axes={"*": "answers"} if job_type == "steer" else {},
    )
    return open_tracker(config.track, about)


def _answer(session: "Session", prompt: str) -> "tuple[Written, Written]":
    from saepatch.cli.columns import Live, columns
    from saepatch.runs.session import texts_of
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


COMMANDS: Mapping[str, tuple[type, Callable[[Any], Said | None]]] = {
    "demo": (DemoConfig, demo),
    "inspect": (InspectConfig, inspect),
    "patch": (PatchConfig, sweep),
    "attribute": (AttributeConfig, sweep),
    "restore": (RestoreConfig, restore),
    "merge": (MergeConfig, merge),
    "report": (ReportConfig, report),
    "runs": (RunsConfig, runs),
    "compare": (CompareConfig, compare),
    "latent": (LatentConfig, latent),
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
