"""`saepatch inspect`."""

from saepatch.cli.parser import CommandResult
from saepatch.settings.inspect import InspectConfig


def inspect(config: InspectConfig) -> CommandResult:
    from saepatch.dictionaries.loading import load_saes
    from saepatch.reading.inspection import dictionary_lines, facts, model_lines
    from saepatch.runs.interpret import read_model

    model = read_model(config)
    dictionaries = load_saes(config.sae, model.device, every_position=config.every_position) if config.sae else {}
    lines = model_lines(model) + (dictionary_lines(model, dictionaries) if config.sae else [])
    return CommandResult("\n".join(lines), facts(model, dictionaries))
