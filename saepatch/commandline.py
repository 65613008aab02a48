"""What every command line of the project shares: settings from a dataclass, and one line for a user's mistake."""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from saepatch.errors import UserError

Config = TypeVar("Config")


def run_config(
    config: type[Config], run: Callable[[Config], None], prog: str, arguments: Sequence[str] | None = None
) -> int:
    """Read one dataclass from the command line (`[CONFIG.yaml] --key value …`) and run it; returns the exit code."""

    def read(given: list[str]) -> tuple[type[Config], Callable[[Config], None], dict[str, Any]]:
        parser = _parser(config, prog=prog)
        if given and not given[0].startswith("-"):
            if not Path(given[0]).is_file():
                raise UserError(
                    f"no config file {given[0]!r}: give a YAML file first, or only settings (--help lists them)"
                )
            given = ["--config", *given]
        return config, run, parser.instantiate(parser.parse_args(given)).as_dict()

    return _guarded(read, arguments)


def run_commands(
    commands: Mapping[str, tuple[type, Callable[[Any], None]]],
    prog: str,
    description: str,
    version: Callable[[], str],
    arguments: Sequence[str] | None = None,
) -> int:
    """Read a command and its dataclass from the command line and run it; returns the exit code."""

    def read(given: list[str]) -> tuple[type, Callable[[Any], None], dict[str, Any]]:
        from jsonargparse import ArgumentParser

        parser = ArgumentParser(prog=prog, description=description, exit_on_error=False)
        parser.add_argument("--version", action="version", version=version())
        several = parser.add_subcommands(dest="command", required=True)
        for name, (config, _) in commands.items():
            several.add_subcommand(name, _parser(config, positional=True), help=(config.__doc__ or "").strip())
        values = parser.parse_args(given)
        config, run = commands[values.command]
        return config, run, values[values.command].as_dict()

    return _guarded(read, arguments)


def _parser(config: type, prog: str | None = None, positional: bool = False) -> Any:
    from jsonargparse import ActionConfigFile, ArgumentParser

    parser = ArgumentParser(prog=prog, description=(config.__doc__ or "").strip(), exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the settings below")
    parser.add_class_arguments(config, as_group=False, as_positional=positional)
    return parser


def _guarded(
    read: Callable[[list[str]], tuple[type[Config], Callable[[Config], None], dict[str, Any]]],
    arguments: Sequence[str] | None,
) -> int:
    _show_log()
    try:
        from jsonargparse import ArgumentError, set_parsing_settings

        set_parsing_settings(docstring_parse_attribute_docstrings=True)  # a field's docstring is its --help

        try:
            config, run, values = read(list(sys.argv[1:] if arguments is None else arguments))
        except ArgumentError as error:
            raise UserError(" ".join(str(error).split())) from error
        values.pop("config", None)
        run(config(**values))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; files that were already written are whole\n")
        return 130
    return 0


def _show_log() -> None:
    # Ours alone: libraries have handlers of their own, and would say everything twice through the root logger.
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("saepatch", "training", "experiments"):
        logger = logging.getLogger(name)
        if not logger.handlers:
            logger.addHandler(handler)
        logger.setLevel(logging.INFO)
