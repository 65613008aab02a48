"""`saepatch train` and `saepatch experiment`, which forward their arguments.

Their packages are next to this one: `training` and `experiments` in a clone, `saepatch_training` and
`saepatch_experiments` in an installed wheel.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

import saepatch
from saepatch.cli.parser import run_config

# Experiments by name: the module that has `main`, and its settings class.
EXPERIMENTS = {
    "agreement": ("agreement", "AgreementConfig"),
    "audit": ("audit", "AuditConfig"),
    "circuits": ("circuits.study", "CircuitsConfig"),
    "cross-lingual": ("cross_lingual.study", "CrossLingualConfig"),
    "facts": ("facts.study", "FactsConfig"),
    "ioi": ("ioi", "IoiConfig"),
    "jailbreak": ("jailbreak.study", "JailbreakConfig"),
    "letters": ("letters", "LettersConfig"),
    "patchscope": ("patchscope", "PatchscopeConfig"),
    "pronouns": ("pronouns", "PronounsConfig"),
    "real": ("real.study", "RealConfig"),
    "safety": ("safety", "SafetyConfig"),
    "self-repair": ("self_repair", "SelfRepairConfig"),
    "steering": ("steering.question", "SteeringConfig"),
    "two-hop": ("two_hop.study", "TwoHopConfig"),
}


def train(arguments: Sequence[str]) -> int:
    """Train dictionaries from a YAML file or the name of a preset; returns the exit code."""
    return import_beside("training", "__main__").main(arguments, "saepatch train")


def experiment(arguments: Sequence[str]) -> int:
    """Run an experiment by name; returns the exit code."""
    name, *settings = arguments or ["--help"]
    if name not in EXPERIMENTS:
        usage = f"saepatch experiment NAME [--key value …], NAME one of {', '.join(EXPERIMENTS)}"
        if name in ("-h", "--help"):
            sys.stdout.write(f"usage: {usage}\n")
            return 0
        sys.stderr.write(f"error: unknown experiment {name!r}: {usage}\n")
        return 2
    place, config = EXPERIMENTS[name]
    module = import_beside("experiments", place)
    return run_config(getattr(module, config), module.main, f"saepatch experiment {name}", settings)


def import_beside(package: str, module: str) -> ModuleType:
    """Import a module of `training` or `experiments`: from the clone, or else from the installed wheel."""
    in_clone = (Path(saepatch.__file__).parents[1] / package / "__init__.py").is_file()
    return import_module(f"{package if in_clone else f'saepatch_{package}'}.{module}")
