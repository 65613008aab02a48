"""The text of `--help`: at most two screens; settings that are seldom needed are under `--help_all`."""

import argparse
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Any

# Settings of loading, dividing and printing, the same for all commands.
SELDOM = frozenset({"revision", "device_map", "prepend_bos", "trust_remote_code", "every_position"})
SELDOM |= {"shard", "part", "batch_size", "min_gap", "align", "progress", "quiet", "ridge", "weight", "clamp"}

METAVARS: Mapping[type, str] = {int: "N", float: "X", str: "TEXT"}

FIRST_STEPS = """\
First steps, on the embedded model (nothing is downloaded):
  saepatch demo                          all of it in a few minutes, with a report
  saepatch play                          a page in the browser to search, steer and patch latents on
  saepatch latent resid_post.3:966       one latent: examples, histogram, the tokens it raises
  saepatch steer --latent resid_post.3:966 --strength 1.5 --positions last --chat --prompt "How do I rent a museum?"
  saepatch patch --pairs ioi --n 20 --site resid_post.3 --out runs/first
On a model and dictionaries of your own:
  saepatch inspect MODEL --sae RELEASE/SAE_ID            whether they fit together
  saepatch attribute --model MODEL --sae RELEASE/SAE_ID --pairs PAIRS.csv
All commands: saepatch --help. The settings of one: saepatch COMMAND --help.
"""


def usage(config: type, prog: str, optional: str = "") -> str:
    """The first line of a command's help."""
    required = [f.name.upper() for f in fields(config) if f.default is MISSING and f.default_factory is MISSING]
    given = [*required, *([f"[{optional.upper()}]"] if optional else [])]
    return " ".join([prog.replace("%", "%%"), *given, "[--config FILE.yaml] [--SETTING VALUE ...]"])


def shorten(parser: Any, full: bool, seldom: Collection[str] = ()) -> bool:
    """Name values by their kind and, unless `full`, hide settings that are seldom needed; returns whether any are.

    `seldom` are further ones of this command.
    """
    hidden = False
    for action in parser._actions:
        kind = getattr(action, "_typehint", None) or action.type
        if action.option_strings and action.metavar is None and kind in METAVARS:
            action.metavar = METAVARS[kind]
        if not action.option_strings:
            action.metavar = action.dest
        if not full and (action.dest in SELDOM or action.dest in seldom):
            action.help, hidden = argparse.SUPPRESS, True
        if action.dest == "print_config" and not full:
            action.help = "Print the settings that would be used, and exit"
    return hidden


@cache
def formatter() -> type:
    """argparse's formatter, except that it keeps the line breaks of examples and gives defaults without types."""
    from jsonargparse import ActionConfigFile, DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter):
        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return text if text.startswith(("examples:", "More")) else super()._fill_text(text, width, indent)

        def _get_help_string(self, action: argparse.Action) -> str:
            if isinstance(action, ActionConfigFile) or not action.option_strings:
                return action.help or ""
            if action.required:
                return f"{action.help} (required)"
            shown = not any(action.default is no for no in (None, False, argparse.SUPPRESS)) and action.default != ""
            return f"{action.help} (default: %(default)s)" if shown else action.help or ""

    return Formatter
