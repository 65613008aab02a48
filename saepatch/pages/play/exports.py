"""What the page shows, as a command and as Python: each gives the same answer again."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from saepatch.model.positions import At, Positions, Turn
from saepatch.model.sites import Site
from saepatch.runs.commands.session import Session
from saepatch.runs.interpret import read_positions
from saepatch.settings.mixins import DictionarySettings, ModelSettings
from saepatch.settings.play import PlayConfig
from saepatch.settings.steer import SteerConfig
from saepatch.settings.sweeps import PatchConfig

LOADED = ("device", "dtype", "prepend_bos", "trust_remote_code", "device_map", "revision")  # arguments of load_model


def shared_settings(config: ModelSettings) -> dict[str, Any]:
    """The settings of a model and its dictionaries, which commands share."""
    return {f.name: getattr(config, f.name) for kind in (ModelSettings, DictionarySettings) for f in fields(kind)}


def as_command(config: SteerConfig | PatchConfig) -> str:
    """The command with these settings: those that differ from their defaults."""
    words = ["saepatch", "patch" if isinstance(config, PatchConfig) else "steer"]
    for setting in fields(config):
        value = getattr(config, setting.name)
        if value != setting.default:
            text = (
                str(value).lower() if isinstance(value, bool) else f"{value:.9g}" if isinstance(value, float) else value
            )
            words += [f"--{setting.name}={text}"] if str(text).startswith("-") else [f"--{setting.name}", str(text)]
    return shlex.join(words)


def steered_in_python(session: Session, prompt: str) -> str:
    """A script that prints both answers to a prompt."""
    config, several = session.config, len(session.latents) > 1
    edits = [_edit(session, site, several) for site in session.latents]
    edit = edits[0] if len(edits) == 1 else f"[\n    {', '.join(edits)}\n]"
    length = [f"max_new_tokens={config.max_new_tokens}"]
    drawn = [f"temperature={config.temperature!r}", f"seed={config.seed}"] if config.temperature else []
    asked = f"model.chat({prompt!r})" if session.chats else repr(prompt)
    lines = [
        *_loading(config, tuple(session.latents), ["from saepatch.steering.streaming import Sampling, side_by_side"]),
        f"prompt = {asked}",
        f"edit = {edit}",
        f"sampling = Sampling({', '.join(length + drawn)})",
        "*_, (before, after) = side_by_side(model, sae, edit, (prompt, prompt), sampling)",
        "print(before.text)",
        "print(after.text)",
    ]
    return "\n".join(lines) + "\n"


def _edit(session: Session, site: Site, several: bool) -> str:
    config = session.config
    ids, units = session.latents[site], session.units[site]
    arguments = [repr(ids[0]) if len(ids) == 1 else repr(list(ids))]
    if config.act != "ablate":
        amount = "strength" if config.act == "add" else "value"
        unit = f"{units[0]:.9g}" if len(set(units)) == 1 else "(" + ", ".join(f"{each:.9g}" for each in units) + ")"
        arguments += [f"{amount}={session.strength!r}", f"unit={unit}"]
        if config.decay != 1:
            arguments.append(f"decay={config.decay!r}")
    arguments.append(f"positions={_positions(read_positions(config.positions))}")
    if several:
        arguments.append(f"site={str(site)!r}")
    kind = {"add": "Steer", "clamp": "Clamp", "at-least": "AtLeast", "ablate": "Ablate"}[config.act]
    return f"sp.{kind}({', '.join(arguments)})"


def patched_in_python(config: PlayConfig, prompts: tuple[str, str], site: Site, ids: Sequence[int], where: str) -> str:
    """A script that prints the answer to the second prompt, and that with latents of the first."""
    other, prompt = prompts
    lines = [
        *_loading(config, (site,)),
        f"other, prompt = {other!r}, {prompt!r}",
        "source = sp.record_latents(model, sae, [other])",
        f"patch = sp.Patch(source, latents={list(ids)}, positions={_positions(read_positions(where))})",
        "print(model.generate([prompt], 24)[0])",
        "with sp.splice(model, sae, patch):",
        "    print(model.generate([prompt], 24)[0])",
    ]
    return "\n".join(lines) + "\n"


def _loading(config: ModelSettings, sites: Sequence[Site], imports: Sequence[str] = ()) -> list[str]:
    settings = shared_settings(config)
    defaults = {f.name: f.default for f in fields(ModelSettings)}
    given = {name: settings[name] for name in LOADED if settings[name] != defaults[name]}
    every: dict[str, Any] = {"every_position": True} if settings["every_position"] else {}
    loads = [
        f"sp.load_sae({_arguments(settings['sae'], {'site': str(site)} | _moved(settings) | every)})" for site in sites
    ]
    sae = loads[0] if len(loads) == 1 else "[\n    " + ",\n    ".join(loads) + ",\n]"
    model = f"model = sp.load_model({_arguments(settings['model'], given)})"
    return ["import saepatch as sp", *imports, "", model, f"sae = {sae}"]


def _moved(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"device": settings["device"]} if settings["device"] != "cpu" else {}


def _arguments(first: str, named: Mapping[str, Any]) -> str:
    return ", ".join([repr(first), *(f"{name}={value!r}" for name, value in named.items())])


def _positions(positions: Positions) -> str:
    if isinstance(positions, Turn):
        return f"sp.Turn({positions.role!r}, {positions.occurrence})"
    return f"sp.At({positions.text!r})" if isinstance(positions, At) else repr(positions)
