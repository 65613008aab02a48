"""`saepatch demo`."""

from pathlib import Path

from saepatch.cli.parser import CommandResult
from saepatch.settings.demo import DemoConfig


def demo(config: DemoConfig) -> CommandResult:
    from saepatch.demo import run_demo
    from saepatch.runs.catalogue import read_json

    outcome = run_demo(config)
    p, rates = outcome.patching, outcome.restoration.rates
    sixteen = p.denoise.sizes.index(16)
    out = config.out
    lines = [
        f"IOI at {p.site}, share of the logit difference restored [95 % interval]",
        f"     16 latents, each prompt's own: {p.denoise.top[sixteen]}",
        f"     16 latents, one set chosen on other names: {p.fixed.top[sixteen]}",
        f"     16 random latents: {p.denoise.random[sixteen]}",
        f"Jailbroken requests refused: {rates['jailbroken']}",
        f"     with {len(outcome.restoration.latents)} latents restored: {rates['restored']}",
        f"     with as many random latents: {rates['random']}",
        f"Report: {out}/report.html   Figures: {out}/summary.json   Rows: {out}/results.parquet",
    ]
    return CommandResult("\n".join(lines), {"out": out, "summary": read_json(Path(out) / "summary.json")})
