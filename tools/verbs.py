# SPDX-License-Identifier: Apache-2.0
"""The command line as data, read from the verbs' own argument parsers.

Completion and the manual page are made from it, so that neither can forget an option.
"""

from __future__ import annotations

import argparse
import importlib
from dataclasses import dataclass
from typing import Final

from kvmi_libvirt.cli import PROG, VERBS

GLOBAL_OPTIONS: Final = (
    ("--debug", "log every step, and show tracebacks"),
    ("--version", "print the version"),
    ("--help", "print a summary"),
)


@dataclass(frozen=True, kw_only=True)
class Argument:
    """One option or positional argument of a verb.

    Parameters
        flags     as written, short first; empty for a positional argument
        value     what stands for its value, None for an option without
        choices   the only values there are; empty for any
        many      how many there may be: "1", "?", "*" or "+"
        required  an option that must be given
    """

    name: str
    flags: tuple[str, ...]
    value: str | None
    choices: tuple[str, ...]
    many: str
    required: bool
    help: str


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One verb with its arguments, options first."""

    name: str
    summary: str
    usage: str
    epilog: str
    arguments: tuple[Argument, ...]

    @property
    def options(self) -> tuple[Argument, ...]:
        """Return those that start with a dash."""
        return tuple(argument for argument in self.arguments if argument.flags)

    @property
    def positionals(self) -> tuple[Argument, ...]:
        """Return those that do not."""
        return tuple(argument for argument in self.arguments if not argument.flags)


def verbs() -> list[Verb]:
    """Return every verb, in the order of the help."""
    return [_verb(name, summary) for name, summary in VERBS.items()]


def _verb(name: str, summary: str) -> Verb:
    module = importlib.import_module(f"kvmi_libvirt.cli.{name}")
    parser = argparse.ArgumentParser(prog=f"{PROG} {name}", allow_abbrev=False)
    module.add_arguments(parser)
    arguments = [_argument(parser, action) for action in parser._actions]
    return Verb(
        name=name,
        summary=summary,
        usage=parser.usage or "",
        epilog=parser.epilog or "",
        arguments=tuple(sorted(arguments, key=lambda argument: not argument.flags)),
    )


def _argument(parser: argparse.ArgumentParser, action: argparse.Action) -> Argument:
    takes_value = action.nargs != 0
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    # What --help prints, with defaults filled in.
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    return Argument(
        name=action.dest,
        flags=tuple(action.option_strings),
        value=metavar if takes_value else None,
        choices=tuple(map(str, action.choices or ())),
        many=str(action.nargs) if action.nargs in ("?", "*", "+") else "1",
        required=bool(action.option_strings) and action.required,
        help=text,
    )
