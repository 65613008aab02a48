"""The table of commands. Each command reads its settings, calls the library and prints the result."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import saepatch
from saepatch.cli import planned
from saepatch.cli.commands.demo import demo
from saepatch.cli.commands.finished.compare import compare
from saepatch.cli.commands.finished.merge import merge
from saepatch.cli.commands.finished.push import push
from saepatch.cli.commands.finished.report import report
from saepatch.cli.commands.finished.runs import runs
from saepatch.cli.commands.finished.track import track
from saepatch.cli.commands.inspect import inspect, plan
from saepatch.cli.commands.latent import latent
from saepatch.cli.commands.play import play
from saepatch.cli.commands.steer import steer
from saepatch.cli.commands.sweep import circuit, edit, restore, sweep
from saepatch.cli.commands.trace import trace
from saepatch.cli.commands.train import experiment, train
from saepatch.cli.parser import CommandResult, run_commands
from saepatch.settings.circuit import CircuitConfig
from saepatch.settings.demo import DemoConfig
from saepatch.settings.edit import EditConfig
from saepatch.settings.finished.compare import CompareConfig
from saepatch.settings.finished.merge import MergeConfig
from saepatch.settings.finished.push import PushConfig
from saepatch.settings.finished.report import ReportConfig
from saepatch.settings.finished.runs import RunsConfig
from saepatch.settings.finished.track import TrackConfig
from saepatch.settings.inspect import InspectConfig, PlanConfig
from saepatch.settings.latent import LatentConfig
from saepatch.settings.play import PlayConfig
from saepatch.settings.restore import RestoreConfig
from saepatch.settings.steer import SteerConfig
from saepatch.settings.sweeps import AttributeConfig, PatchConfig
from saepatch.settings.trace import TraceConfig

COMMANDS: Mapping[str, tuple[type, Callable[[Any], CommandResult | None]]] = {
    "demo": (DemoConfig, demo),
    "inspect": (InspectConfig, inspect),
    "patch": (PatchConfig, sweep),
    "attribute": (AttributeConfig, sweep),
    "circuit": (CircuitConfig, circuit),
    "restore": (RestoreConfig, restore),
    "edit": (EditConfig, edit),
    "merge": (MergeConfig, merge),
    "report": (ReportConfig, report),
    "runs": (RunsConfig, runs),
    "compare": (CompareConfig, compare),
    "latent": (LatentConfig, latent),
    "push": (PushConfig, push),
    "track": (TrackConfig, track),
    "steer": (SteerConfig, steer),
    "play": (PlayConfig, play),
    "trace": (TraceConfig, trace),
    "plan": (PlanConfig, plan),
}

# Commands that parse their own arguments: the line in --help, and the function that receives the arguments.
FORWARDED: Mapping[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "train": ("Train dictionaries: saepatch train CONFIG.yaml, or the name of a preset.", train),
    "experiment": ("Run an experiment of this project: saepatch experiment NAME.", experiment),
}


def _version() -> str:
    from importlib.metadata import version

    return f"saepatch {version('saepatch')}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user error, 130 if interrupted."""
    commands, words = COMMANDS, arguments
    if (plan_of := planned.asked(sys.argv[1:] if arguments is None else arguments, COMMANDS)) is not None:
        commands, words = planned.planning(*plan_of, COMMANDS)
    return run_commands(commands, "saepatch", saepatch.__doc__ or "", _version, words, FORWARDED)


if __name__ == "__main__":
    sys.exit(main())
