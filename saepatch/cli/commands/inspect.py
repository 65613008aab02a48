"""`saepatch inspect` and `saepatch plan`."""

from saepatch.cli.parser import CommandResult
from saepatch.settings.inspect import InspectConfig, PlanConfig


def inspect(config: InspectConfig) -> CommandResult:
    from saepatch.dictionaries.loading import load_saes
    from saepatch.reading import inspection
    from saepatch.runs.interpret import read_model

    model = read_model(config)
    dictionaries = load_saes(config.sae, model.device, every_position=config.every_position) if config.sae else {}
    inspected = inspection.inspect(model, dictionaries)
    return CommandResult(inspected.text(), inspected.facts())


def plan(config: PlanConfig) -> CommandResult:
    from saepatch.measure.requirements import requirements

    needed = requirements(config)
    return CommandResult(needed.text(), needed.facts())
