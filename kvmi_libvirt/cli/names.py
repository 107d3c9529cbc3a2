# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt names``: what a policy can name."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, NamedTuple

from kvmi_libvirt.abi.revisions import REVISIONS, by_name
from kvmi_libvirt.cli.output import print_json, print_table
from kvmi_libvirt.errors import ExitCode, PolicyError, PolicyValueError
from kvmi_libvirt.policy import rules
from kvmi_libvirt.policy.groups import GROUPS
from kvmi_libvirt.policy.profile import Profiles
from kvmi_libvirt.quoting import printable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from kvmi_libvirt.abi.kvmi import KvmiAbi
    from kvmi_libvirt.policy.reading import Profile, RuleSet

logger = logging.getLogger(__name__)


class Selection(NamedTuple):
    """What is shown: canonical names of commands and events, groups, profiles."""

    commands: frozenset[str]
    events: frozenset[str]
    groups: tuple[str, ...]
    profiles: tuple[Profile, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    names = [abi.name for abi in REVISIONS]
    parser.add_argument(
        "names",
        metavar="NAME",
        nargs="*",
        help="only what this stands for: a command, an event, a group or a profile",
    )
    parser.add_argument(
        "--abi",
        choices=names,
        default=names[0],
        help="the kernel's KVMI revision (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the names as JSON")


def run(args: argparse.Namespace) -> ExitCode:
    """Print the names of one revision, with their ids there."""
    abi = by_name(args.abi)
    selection = _selected(args.names) if args.names else _everything()
    if args.json:
        print_json(_as_json(abi, selection))
    else:
        _print_tables(abi, selection)
    return ExitCode.OK


def _everything() -> Selection:
    return Selection(
        commands=rules.COMMANDS.names,
        events=rules.EVENTS.names,
        groups=tuple(GROUPS),
        profiles=tuple(_profiles()),
    )


def _selected(names: Sequence[str]) -> Selection:
    commands: set[str] = set()
    events: set[str] = set()
    groups: list[str] = []
    profiles: list[Profile] = []
    known = Profiles()
    for name in dict.fromkeys(names):
        command, event = (rules.canonical(name, kind) for kind in (rules.COMMANDS, rules.EVENTS))
        if name.lower() in GROUPS:
            groups.append(name.lower())
            commands |= GROUPS[name.lower()].commands
            events |= GROUPS[name.lower()].events
        elif command is not None:
            commands.add(command)
        elif event is not None:
            events.add(event)
        elif name in known.names():
            profile = known(name)
            profiles.append(profile)
            commands |= _allowed(profile.commands, rules.COMMANDS)
            commands |= rules.COMMANDS.always_allowed
            events |= _allowed(profile.events, rules.EVENTS)
        else:
            raise PolicyValueError(rules.unknown_right(name))
    return Selection(frozenset(commands), frozenset(events), tuple(groups), tuple(profiles))


def _allowed(found: RuleSet | None, vocabulary: rules.Vocabulary) -> frozenset[str]:
    if found is None:
        return frozenset()
    rights, _ = rules.weigh(found.rules, vocabulary, default_allow=found.default == "allow")
    return vocabulary.names if rights.everything else rights.allowed


def _as_json(abi: KvmiAbi, selection: Selection) -> dict[str, object]:
    return {
        "abi": abi.name,
        "commands": [
            {
                "name": command.name,
                "id": command.id,
                "scope": command.scope.value,
                "always_allowed": command.always_allowed,
                "meaning": command.meaning,
            }
            for command in abi.commands
            if command.name in selection.commands
        ],
        "events": [
            {
                "name": event.name,
                "id": event.id,
                "scope": event.scope.value,
                "meaning": event.meaning,
            }
            for event in abi.events
            if event.name in selection.events
        ],
        "groups": [
            {
                "name": name,
                "threat": GROUPS[name].threat,
                "commands": sorted(GROUPS[name].commands),
                "events": sorted(GROUPS[name].events),
            }
            for name in selection.groups
        ],
        "profiles": [
            {"name": profile.name, "title": profile.title, "file": profile.path}
            for profile in selection.profiles
        ],
    }


def _profiles() -> list[Profile]:
    # A profile that cannot be used is none; 'check' says why.
    profiles = Profiles()
    found = []
    for name in profiles.names():
        try:
            found.append(profiles(name))
        except PolicyError as error:
            logger.warning("profile %s: %s", name, error)
    return found


def _print_tables(abi: KvmiAbi, selection: Selection) -> None:
    commands = [
        (
            str(command.id),
            f"{command.name}{' *' if command.always_allowed else ''}",
            command.scope.value,
            command.meaning,
        )
        for command in abi.commands
        if command.name in selection.commands
    ]
    events = [
        (str(event.id), event.name, event.scope.value, event.meaning)
        for event in abi.events
        if event.name in selection.events
    ]
    groups = [
        (
            name,
            f"{len(GROUPS[name].commands)} commands, {len(GROUPS[name].events)} events",
            f"a compromised tool could {GROUPS[name].threat}",
        )
        for name in selection.groups
    ]
    profiles = [(profile.name, printable(profile.title)) for profile in selection.profiles]
    header = ("ID", "NAME", "SCOPE", "MEANING")
    tables: list[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = [
        (f"{abi.title}: commands (* always allowed)", header, commands),
        (f"{abi.title}: events", header, events),
        ("groups: all of one kind, of every revision", ("GROUP", "HOLDS", "THREAT"), groups),
        ("profiles", ("PROFILE", "FOR"), profiles),
    ]
    shown = [table for table in tables if table[2]]
    if not shown:
        print(f"{abi.title} has none of these", file=sys.stderr)
    for number, (title, columns, rows) in enumerate(shown):
        print(f"{title}\n" if number == 0 else f"\n{title}\n")
        print_table(columns, rows)
