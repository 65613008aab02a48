"""Sweeps in the format of W&B: the file that `wandb sweep` takes says which runs there are here, too.

Format: the configuration of W&B sweeps (https://docs.wandb.ai/models/sweeps/define-sweep-configuration).
"""

import json
import math
import random
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from saepatch.errors import UserError
from saepatch.records.documents import bounded_yaml

# Keys of the format that change nothing here: they are for W&B's server and its agents.
_OTHERS = frozenset(["program", "command", "name", "description", "metric", "project", "entity", "early_terminate"])
_KEYS = frozenset(["method", "parameters", "run_cap"]) | _OTHERS
_DRAWS = ("uniform", "int_uniform", "log_uniform_values")


def read_sweep(path: str, seed: int) -> list[dict[str, Any]]:
    """The values of every run, in the order of the settings' names: all combinations (`grid`) or draws (`random`).

    Args:
        path: The YAML file.
        seed: Seed of random draws, which are the same each time.

    Raises:
        UserError: the file cannot be read, is not in this format, or says what only W&B's server can do.
    """
    content = _read(path)
    if unknown := sorted(set(content) - _KEYS):
        raise UserError(f"{path}: {unknown[0]!r} is no key of a sweep: use {', '.join(sorted(_KEYS))}")
    parameters = content.get("parameters")
    if not isinstance(parameters, Mapping) or not parameters:
        raise UserError(f"{path} has no parameters: write them as in parameters: {{sae.k: {{values: [8, 16]}}}}")
    parameters = dict(sorted(parameters.items()))  # W&B keeps no order of its own
    for name, parameter in parameters.items():
        _check(path, name, parameter)
    method, cap = content.get("method"), content.get("run_cap")
    if cap is not None and (not isinstance(cap, int) or isinstance(cap, bool) or cap < 1):
        raise UserError(f"{path}: run_cap is {cap!r}: use a whole number above 0")
    if method == "grid":
        lists = [_values(path, name, parameter) for name, parameter in parameters.items()]
        return [dict(zip(parameters, each)) for each in product(*lists)][:cap]
    if method == "random":
        if cap is None:
            raise UserError(f"{path}: a random sweep has no end of its own: give run_cap, the number of runs")
        draws = random.Random(seed)
        runs = [{name: _draw(parameter, draws) for name, parameter in parameters.items()} for _ in range(cap)]
        return list({json.dumps(run): run for run in runs}.values())  # the same values again are the same run
    raise UserError(f"{path}: method is {method!r}: use grid or random; bayes needs W&B's server and its agents")


def _read(path: str) -> Mapping[str, Any]:
    import yaml

    try:
        content = bounded_yaml(Path(path).read_text(encoding="utf-8-sig"), yaml.safe_load)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the sweep {path!r} ({type(error).__name__}): give a YAML file") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} is no sweep: write method: grid, and parameters: with values for each setting")
    return content


def _check(path: str, name: str, parameter: Any) -> None:
    """Raises UserError for a parameter of no kind that runs here."""
    where = f"{path}: parameter {name!r}"
    if not isinstance(parameter, Mapping) or not parameter:
        raise UserError(f"{where} is {parameter!r}: write value: …, values: […], or min: … and max: …")
    if "parameters" in parameter:
        raise UserError(f"{where} is nested: write the setting's full name instead, as in sae.k")
    given = set(parameter) - {"distribution"}
    if given == {"value"}:
        return
    if "values" in given and given <= {"values", "probabilities"}:
        values, shares = parameter["values"], parameter.get("probabilities")
        if not isinstance(values, list) or not values:
            raise UserError(f"{where} has no values: give a list, as in values: [8, 16]")
        if shares is not None and not (
            isinstance(shares, list)
            and len(shares) == len(values)
            and all(isinstance(share, int | float) and share >= 0 for share in shares)
            and math.isclose(sum(shares), 1, abs_tol=1e-6)
        ):
            raise UserError(f"{where}: give one probability for each value, with a sum of 1")
        return
    if given != {"min", "max"} or _distribution(parameter) not in _DRAWS:
        said = (
            f"distribution {parameter['distribution']!r}" if "distribution" in parameter else ", ".join(sorted(given))
        )
        raise UserError(
            f"{where} has {said}: here a parameter has value, values (with or without probabilities), or min and max "
            f"with one of the distributions {', '.join(_DRAWS)}"
        )
    low, high = parameter["min"], parameter["max"]
    kinds = int if _distribution(parameter) == "int_uniform" else int | float
    numbers = all(isinstance(end, kinds) and not isinstance(end, bool) for end in (low, high))
    if not numbers or not -math.inf < low <= high < math.inf:
        whole = "whole " if kinds is int else ""
        raise UserError(f"{where}: min {low!r} and max {high!r}: use finite {whole}numbers, the smaller first")
    if _distribution(parameter) == "log_uniform_values" and low <= 0:
        raise UserError(f"{where}: min {low!r}: a logarithmic distribution needs numbers above 0")


def _distribution(parameter: Mapping[str, Any]) -> str:
    """The distribution between min and max: as W&B does, uniform over whole numbers where both ends are whole."""
    whole = isinstance(parameter["min"], int) and isinstance(parameter["max"], int)
    return str(parameter.get("distribution", "int_uniform" if whole else "uniform"))


def _values(path: str, name: str, parameter: Mapping[str, Any]) -> Sequence[Any]:
    """The values of a parameter in a grid."""
    if "value" in parameter:
        return [parameter["value"]]
    if "values" in parameter:
        return list({json.dumps(value): value for value in parameter["values"]}.values())
    if _distribution(parameter) == "int_uniform":
        return range(parameter["min"], parameter["max"] + 1)
    raise UserError(f"{path}: parameter {name!r} is continuous, and a grid has none: give values, or method: random")


def _draw(parameter: Mapping[str, Any], draws: random.Random) -> Any:
    if "value" in parameter:
        return parameter["value"]
    if "values" in parameter:
        return draws.choices(parameter["values"], parameter.get("probabilities"))[0]
    low, high = parameter["min"], parameter["max"]
    match _distribution(parameter):
        case "int_uniform":
            return draws.randint(low, high)
        case "log_uniform_values":
            return math.exp(draws.uniform(math.log(low), math.log(high)))
        case _:
            return draws.uniform(low, high)
