"""Shared by all command lines of the project: settings from a dataclass, and one-line messages for user errors."""

import difflib
import json
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from saepatch.cli.guard import LOGGERS, guarded, own_process
from saepatch.cli.help import FIRST_STEPS, formatter, shorten, usage
from saepatch.cli.places import config_files, with_place
from saepatch.errors import UserError, reason_of
from saepatch.records.documents import bounded_yaml
from saepatch.settings.checks import RENAMED, check_values, under_current_names

Config = TypeVar("Config")


@dataclass(frozen=True)
class CommandResult:
    """Result of a command: text for people, and the same facts as JSON values."""

    text: str
    facts: Mapping[str, Any] = field(default_factory=dict)


def read_config(config: type[Config], prog: str, arguments: Sequence[str]) -> Config:
    """Read one dataclass from `[CONFIG.yaml] --key value …`.

    Raises:
        UserError: a setting does not exist, or does not accept its value.
    """
    given, full = _help(arguments)
    if given and not given[0].startswith("-"):
        if not Path(given[0]).is_file():
            raise UserError(f"no config file {given[0]!r}: give a YAML file first, or settings alone (see --help)")
        given = ["--config", *given]
    try:
        parser = _parser(config, prog=prog, full=full)  # type: ignore[arg-type]  # classes are hashable
        return _instantiate(parser, _parsed(parser, given), config)
    except UserError as error:
        raise with_place(error, given) from error


def run_config(
    config: type[Config],
    run: Callable[[Config], None],
    prog: str,
    arguments: Sequence[str] | None = None,
    interrupted: str = "written files are complete",
) -> int:
    """Read one dataclass from the command line and run it; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)

    def work() -> None:
        try:
            run(read_config(config, prog, given))
        except UserError as error:
            file_first = bool(given) and not given[0].startswith("-")
            raise with_place(error, ["--config", *given] if file_first else given) from error

    with own_process(arguments is None):
        return guarded(work, interrupted)


def run_commands(
    commands: Mapping[str, tuple[type, Callable[[Any], CommandResult | None]]],
    prog: str,
    description: str,
    version: Callable[[], str],
    arguments: Sequence[str] | None = None,
    forwarded: Mapping[str, tuple[str, Callable[[Sequence[str]], int]]] | None = None,
) -> int:
    """Read a command and its settings from the command line, run it and print its result; returns the exit code.

    A settings dataclass may have the fields `quiet` (print errors and the result only) and `json` (print the result as
    one JSON object). `forwarded` are commands that parse their own arguments, each with a line of help.
    """
    forwarded = forwarded or {}
    words = list(sys.argv[1:] if arguments is None else arguments)
    given, full = _help(words)

    def run() -> None:
        try:
            work()
        except UserError as error:
            raise with_place(error, given) from error

    def work() -> None:
        parser = _commands_parser(commands, forwarded, prog, given, full)
        parser.description = description
        parser.add_argument("--version", action="version", version=version())
        parsed = _parsed(parser, given)
        name = parsed.command
        kind, command = commands[name]
        config: Any = _instantiate(parser, parsed, kind, name)
        if track := getattr(config, "track", ""):
            from saepatch.tracking.open import read_spec

            read_spec(track)  # before any work
        as_json = getattr(config, "json", False)
        if as_json or getattr(config, "quiet", False):
            for logger in LOGGERS:
                logging.getLogger(logger).setLevel(logging.WARNING)
        if (result := command(config)) is not None:
            sys.stdout.write((_json(result.facts) if as_json else result.text) + "\n")
            sys.stdout.flush()

    if not given:
        sys.stdout.write(f"{description}\n\n{FIRST_STEPS}")
        return 0
    with own_process(arguments is None):
        if given[0] in forwarded:
            return forwarded[given[0]][1](words[1:])
        return guarded(run, "written files are complete")


def _help(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments with --help for --help_all, and whether all settings take part: they do where it is no help."""
    full = "--help_all" in arguments or not {"-h", "--help"} & set(arguments)
    return ["--help" if word == "--help_all" else word for word in arguments], full


def _commands_parser(
    commands: Mapping[str, tuple[type, Any]],
    forwarded: Mapping[str, tuple[str, Any]],
    prog: str,
    given: Sequence[str],
    full: bool,
) -> Any:
    """The parser of all commands, of which only the given one has its settings."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(add_print_completion_argument=True)
    parser = ArgumentParser(
        prog=prog, exit_on_error=False, epilog=COMPLETION, formatter_class=formatter(), allow_abbrev=False
    )
    several = parser.add_subcommands(dest="command", required=True)
    # A command's parser takes 30 ms to build: where the command is known, the others get empty ones.
    only = given[:1] if given and given[0] in commands else commands
    for name, (config, _) in commands.items():
        empty = name not in only
        settings = ArgumentParser(exit_on_error=False) if empty else _parser(config, f"{prog} {name}", True, full)
        several.add_subcommand(name, settings, help=(config.__doc__ or "").strip())
    for name, (summary, _) in forwarded.items():
        several.add_subcommand(name, ArgumentParser(exit_on_error=False), help=summary)
    return parser


COMPLETION = 'Shell completion: eval "$(saepatch --print_completion shtab-bash)", or shtab-zsh, shtab-fish, …'


def _json(facts: Mapping[str, Any]) -> str:
    from saepatch.records.files import plain

    return json.dumps(plain(dict(facts)), ensure_ascii=False, allow_nan=False, indent=2)


@cache  # none of it changes when arguments are parsed
def _parser(config: type, prog: str, positional: bool = False, full: bool = True) -> Any:
    from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

    _bound_yaml()
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # a field's docstring is its --help
    summary = (config.__doc__ or "").strip().split("\n\n")[0]
    examples = getattr(config, "examples", ())
    epilog = "\n  ".join(["examples:", *examples]) if examples else None
    optional = getattr(config, "positional", "") if positional else ""  # a field that may be given without its name
    parser = ArgumentParser(
        prog=prog,
        usage=usage(config, prog, optional),
        description=summary,
        exit_on_error=False,
        epilog=epilog,
        formatter_class=formatter(),
        allow_abbrev=False,  # an abbreviation may be a mistake, or another setting in a later version
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the settings below")
    parser.add_class_arguments(config, as_group=False, as_positional=positional, skip={optional} if optional else set())
    if optional:
        default = getattr(config, optional)
        parser.add_argument(optional, type=str, nargs="?", default=default, help=f"default: {default}")
    for action in parser._actions:
        if getattr(action, "_typehint", None) in (bool, bool | None, bool | str):  # `--quiet` alone means true
            action.nargs, action.const = "?", True
    if shorten(parser, full, getattr(config, "seldom", ())):
        parser.epilog = f"{epilog or ''}\n\nMore settings: {prog} --help_all".strip()
    return parser


def _parsed(parser: Any, given: Sequence[str]) -> Any:
    from jsonargparse import ArgumentError

    names = _NAMES.set(frozenset(_keys(parser, given)))
    try:
        return parser.parse_args(list(given))
    except ArgumentError as error:
        raise UserError(_plainly(" ".join(str(error).split()), parser, given)) from error
    except (
        ValueError,
        RecursionError,
        TypeError,
    ) as error:  # such as a file that is not UTF-8
        raise UserError(f"cannot read the settings ({reason_of(error)}): see --help") from error
    finally:
        _NAMES.reset(names)


_NAMES: ContextVar[frozenset[str]] = ContextVar("names of the settings that are read", default=frozenset())


@cache
def _bound_yaml() -> None:
    """Limit the YAML that the parser reads, from files and in values, to what `bounded_yaml` allows.

    Files of an earlier version may have former names of settings.
    """
    import yaml
    from jsonargparse import get_loader, set_loader

    load = get_loader("yaml")

    def bounded(text: str) -> Any:
        value = bounded_yaml(text, load)
        return under_current_names(value, _NAMES.get()) if isinstance(value, dict) and _NAMES.get() else value

    set_loader("yaml", bounded, (yaml.YAMLError,))


KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "list": "a list, as in '[a,b]'",
    "tuple": "a list, as in '[a,b]'",
    "dict": "a mapping, as in '{a: 1}'",
}


def _plainly(message: str, parser: Any, given: Sequence[str]) -> str:
    """Rewrite the parser's message in terms of the command line instead of Python types."""
    if match := re.search(r'Parser key "([^"]+)":.*?Expected an? (.+?)\. Got value: (.*)$', message):
        key, kind, value = match.groups()
        choices = re.search(r"Literal\[(.+?)\]", kind)
        wanted = f"one of {choices[1].replace(chr(39), '')}" if choices else KINDS.get(kind[8:-2], kind)
        shown = "a mapping (is the file for another command?)" if value.startswith("{") else repr(value)
        return f"--{key} takes {wanted}, not {shown}"
    if match := re.search(r'Problems parsing config: (.*?)(?: in "<unicode string>", line (\d+)|$)', message):
        files = " or ".join(map(str, config_files(given))) or "the config file"
        where = f"{files}, line {match[2]}" if match[2] else files
        return f"{where} is no YAML ({match[1]}): write one NAME: VALUE per line, sections indented by two spaces"
    if message.startswith("Unexpected config:"):
        return "the config file holds no settings: write one NAME: VALUE per line (see --help)"
    if match := re.search(r"argument command: invalid choice: '([^']+)' \(choose from (.+)\)", message):
        near = difflib.get_close_matches(match[1], re.findall(r"'([^']+)'", match[2]), 1)
        meant = f"did you mean {near[0]}?" if near else f"use one of {match[2].replace(chr(39), '')}"
        return f"there is no command {match[1]!r}: {meant}"
    if match := re.search(r"required: (\S+)", message):
        command, _, setting = match[1].rpartition(".")
        return f"{setting!r} is missing: see {' '.join(['saepatch', *command.split('.')[:1]]).strip()} --help"
    if match := re.search(r"does not accept option '([^']+)'|Option '([^']+)' is not accepted", message):
        group = re.search(r"Group '([^']+)'", message)
        return _unknown(f"{group[1]}.{match[1]}" if group else match[1] or match[2], _keys(parser, given))
    if match := re.search(r"unrecognized arguments: (?:--([^\s=]+))?", message):
        where = _place(match[1], _keys(parser, given)) if match[1] else ""
        return f"{message} ({where or 'see --help'})"
    return message


def _unknown(key: str, keys: Sequence[str]) -> str:
    """Message for a key of a file that is not a setting in that place."""
    section, _, name = key.rpartition(".")
    where = _place(key, keys) or "see --help"
    return f"{name!r} is not a setting {f'under {section!r}' if section else 'at the top level'}: {where}"


def _place(key: str, keys: Sequence[str]) -> str:
    """Where a misplaced key belongs, or the key that was probably meant; empty if no key is similar."""
    names = {known: known.rpartition(".")[2] for known in keys}
    if key in RENAMED and RENAMED[key] in keys:
        return f"it is called --{RENAMED[key]} now"
    near = difflib.get_close_matches(key.rpartition(".")[2], sorted(set(names.values())), 1)
    if not near:
        return ""
    homes = [known for known in keys if names[known] == near[0]]
    home = max(homes, key=lambda known: difflib.SequenceMatcher(None, key, known).ratio())
    section, _, name = home.rpartition(".")
    if section == key.rpartition(".")[0] or name != key.rpartition(".")[2]:
        return f"did you mean --{home}?"
    return f"it belongs {f'under {section!r}' if section else 'at the top level'}, --{home} on the command line"


def _keys(parser: Any, given: Sequence[str]) -> list[str]:
    """All settings; those of a section as `section.key`."""
    return [
        option.removeprefix("--")
        for each in _parsers(parser, given)
        for option in each._option_string_actions
        if option.startswith("--")
    ]


def _parsers(parser: Any, given: Sequence[str]) -> list[Any]:
    """The parser, and the parser of the given command."""
    commands = [action.choices for action in parser._actions if isinstance(getattr(action, "choices", None), dict)]
    return [parser, *(own for choices in commands for name, own in choices.items() if name in given)]


def _instantiate(parser: Any, parsed: Any, config: type[Config], command: str | None = None) -> Config:
    named = parsed if command is None else parsed[command]
    check_values(config, named.as_dict())
    values = parser.instantiate(parsed)
    fields = (values if command is None else values[command]).as_dict()
    fields.pop("config", None)
    return config(**fields)
