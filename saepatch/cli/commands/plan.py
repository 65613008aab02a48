"""`saepatch plan`."""

from saepatch.cli.parser import CommandResult
from saepatch.settings.plan import PlanConfig


def plan(config: PlanConfig) -> CommandResult:
    from saepatch.measure.requirements import requirements

    found = requirements(config)
    return CommandResult(found.text(), found.facts())
