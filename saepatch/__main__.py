"""The command line. Thin: it reads settings, calls the library and prints."""

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import saepatch
from saepatch.commandline import run_commands
from saepatch.config import (
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
        from saepatch.merging import merge_run
        from saepatch.pages.gather import try_reading

        out = Path(config.out)
        _say(merge_run(out).table(), out)
        try_reading(found.sweep, out)
        _write_report(out)
    else:
        print(f"shard {found.shard} of {found.shards} is finished ({found.parts} parts, {found.edits:,} edits)")
        print(f"When all of them are: saepatch merge {shlex.quote(config.out)}")


def merge(config: MergeConfig) -> None:
    from saepatch.merging import merge_run

    out = Path(config.out)
    _say(merge_run(out).table(), out)
    _write_report(out)


def _say(table: str, out: Path) -> None:
    print(table)
    print(f"Rows: {out}/results.parquet   Pairs: {out}/pairs.parquet   Figures: {out}/summary.json")


def _write_report(out: Path) -> None:
    from saepatch.pages import write_report

    print(f"Report: {write_report(out)}")


def report(config: ReportConfig) -> None:
    out = Path(config.run)
    if config.read:
        from saepatch.pages.gather import read_again

        read_again(out)
    _write_report(out)


def runs(config: RunsConfig) -> None:
    from saepatch.runfolders import runs_table

    print(runs_table(Path(config.root)))


def compare(config: CompareConfig) -> None:
    from saepatch.runfolders import compare_runs, read_run

    found = compare_runs(read_run(Path(config.one)), read_run(Path(config.other)))
    print(found.table())
    if config.html:
        from saepatch.pages import compare_page
        from saepatch.report import write_page

        print(f"\nPage: {write_page(compare_page(found), Path(config.html))}")


def latent(config: LatentConfig) -> None:
    from saepatch.pages.latent import latent_lines, read_latent

    card = read_latent(config)
    print("\n".join(latent_lines(card)))
    if config.html:
        from saepatch.pages.cards import latent_page
        from saepatch.report import write_page
        from saepatch.results import command_line

        facts = {"model": config.model, "dictionary": card.dictionary, "command": command_line()}
        print(f"\nPage: {write_page(latent_page(card, facts), Path(config.html))}")


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


COMMANDS: Mapping[str, tuple[type, Callable[[Any], None]]] = {
    "demo": (DemoConfig, demo),
    "inspect": (InspectConfig, inspect),
    "patch": (PatchConfig, sweep),
    "attribute": (AttributeConfig, sweep),
    "merge": (MergeConfig, merge),
    "report": (ReportConfig, report),
    "runs": (RunsConfig, runs),
    "compare": (CompareConfig, compare),
    "latent": (LatentConfig, latent),
    "push": (PushConfig, push),
}


def _version() -> str:
    from importlib.metadata import version

    return f"saepatch {version('saepatch')}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    return run_commands(COMMANDS, "saepatch", saepatch.__doc__ or "", _version, arguments)


if __name__ == "__main__":
    sys.exit(main())
