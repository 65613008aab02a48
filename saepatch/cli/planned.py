"""`saepatch plan COMMAND …` and `--dry_run`: what a command would need, from its own settings."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from saepatch import organism
from saepatch.cli.commands.inspect import plan
from saepatch.cli.parser import CommandResult
from saepatch.dictionaries.latent_set import LatentSet
from saepatch.records.documents import parse_json
from saepatch.settings.inspect import BYTES, PlanConfig

Commands = Mapping[str, tuple[type, Callable[[Any], CommandResult | None]]]
OWN = ("tokens", "rows", "d_sae", "devices", "device_gb", "device_tflops")  # settings of a plan that commands lack
WITH_GRADIENTS = ("attribute", "circuit", "edit")


def asked(words: Sequence[str], commands: Commands) -> tuple[str, list[str]] | None:
    """The command whose plan is asked for, and its other arguments; None: no plan is."""
    able = {name for name, (kind, _) in commands.items() if name != "plan" and "model" in _names(kind)}
    if words[:1] == ["plan"] and words[1:2] and words[1] in able:
        return words[1], list(words[2:])
    if words[:1] and words[0] in able and "--dry_run" in words:
        return words[0], [word for word in words[1:] if word != "--dry_run"]
    return None


def planning(name: str, words: Sequence[str], commands: Commands) -> tuple[Commands, list[str]]:
    """The commands, of which one makes its plan instead of running, and the arguments that are its own."""
    kind, _ = commands[name]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for setting in fields(PlanConfig):
        if setting.name in OWN and setting.name not in _names(kind):
            parser.add_argument(f"--{setting.name}", type=type(setting.default), default=None)
    own, rest = parser.parse_known_args(words)
    given = {key: value for key, value in vars(own).items() if value is not None}
    return {**commands, name: (kind, partial(_plan_of, name, given))}, [name, *rest]


def _plan_of(name: str, given: Mapping[str, Any], config: Any) -> CommandResult:
    """What a command with these settings would need of each device."""
    sites = getattr(config, "site", "") or ",".join(map(str, LatentSet.parse(_latents(config))))
    known = {"d_sae": width} if (width := _width(getattr(config, "sae", ""))) else {}
    result = plan(
        PlanConfig(
            model=config.model,
            work="attribute" if name in WITH_GRADIENTS else "patch",
            site=sites,
            dtype=config.dtype if config.dtype in BYTES else "float32",
            json=config.json,
            **{"rows": max(1, getattr(config, "batch_size", 1)), **known, **given},
        )
    )
    if known or "d_sae" in given or not hasattr(config, "sae"):
        return result
    assumed = f"{PlanConfig.d_sae:,} latents are assumed: --d_sae says how many there are"
    return replace(result, text=f"{result.text}\n{assumed}", facts={**result.facts, "assumed": assumed})


def _latents(config: Any) -> str:
    return next((text for name in ("latents", "latent") if isinstance(text := getattr(config, name, None), str)), "")


def _width(spec: str) -> int:
    """The number of latents that the first dictionary of a folder states; 0: it states none."""
    folder = organism.path(organism.DICTIONARIES[spec]) if spec in organism.DICTIONARIES else Path(spec)
    found = [folder / "cfg.json", *sorted(folder.glob("*/cfg.json"))] if folder.is_dir() else []
    for path in (path for path in found if path.is_file()):
        try:
            width = parse_json(path.read_text(encoding="utf-8"), str(path))["d_sae"]
        except (OSError, ValueError, KeyError, TypeError):
            return 0
        return width if isinstance(width, int) else 0
    return 0


def _names(kind: Any) -> set[str]:
    return {setting.name for setting in fields(kind)}
