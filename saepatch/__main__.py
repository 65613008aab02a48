"""The command line. Thin: it reads settings, calls the library and prints."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import saepatch
from saepatch.commandline import run_commands
from saepatch.config import DemoConfig, InspectConfig


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


COMMANDS: Mapping[str, tuple[type, Callable[[Any], None]]] = {
    "demo": (DemoConfig, demo),
    "inspect": (InspectConfig, inspect),
}


def _version() -> str:
    from importlib.metadata import version

    return f"saepatch {version('saepatch')}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    return run_commands(COMMANDS, "saepatch", saepatch.__doc__ or "", _version, arguments)


if __name__ == "__main__":
    sys.exit(main())
