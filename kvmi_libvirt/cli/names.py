# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt names``: what a policy can name."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kvmi_libvirt.abi.revisions import REVISIONS, by_name
from kvmi_libvirt.cli.output import print_json, print_table
from kvmi_libvirt.errors import ExitCode, PolicyError
from kvmi_libvirt.policy.groups import GROUPS
from kvmi_libvirt.policy.profile import Profiles
from kvmi_libvirt.quoting import printable

if TYPE_CHECKING:
    import argparse

    from kvmi_libvirt.abi.kvmi import KvmiAbi
    from kvmi_libvirt.policy.reading import Profile

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    names = [abi.name for abi in REVISIONS]
    parser.add_argument(
        "--abi",
        choices=names,
        default=names[0],
        help="the kernel's KVMI revision (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the names as JSON")


def run(args: argparse.Namespace) -> ExitCode:
    """Print every name of one revision, with its id there."""
    abi = by_name(args.abi)
    if args.json:
        print_json(_as_json(abi))
    else:
        _print_tables(abi)
    return ExitCode.OK


def _as_json(abi: KvmiAbi) -> dict[str, object]:
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
        ],
        "events": [
            {
                "name": event.name,
                "id": event.id,
                "scope": event.scope.value,
                "meaning": event.meaning,
            }
            for event in abi.events
        ],
        "groups": [
            {
                "name": name,
                "threat": group.threat,
                "commands": sorted(group.commands),
                "events": sorted(group.events),
            }
            for name, group in GROUPS.items()
        ],
        "profiles": [
            {"name": profile.name, "title": profile.title, "file": profile.path}
            for profile in _profiles()
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


def _print_tables(abi: KvmiAbi) -> None:
    print(f"{abi.title}: commands (* always allowed)\n")
    rows = [
        (
            str(command.id),
            f"{command.name}{' *' if command.always_allowed else ''}",
            command.scope.value,
            command.meaning,
        )
        for command in abi.commands
    ]
    print_table(("ID", "NAME", "SCOPE", "MEANING"), rows)
    print(f"\n{abi.title}: events\n")
    events = [(str(e.id), e.name, e.scope.value, e.meaning) for e in abi.events]
    print_table(("ID", "NAME", "SCOPE", "MEANING"), events)
    print("\ngroups: all of one kind, of every revision\n")
    groups = [
        (
            name,
            f"{len(group.commands)} commands, {len(group.events)} events",
            f"a compromised tool could {group.threat}",
        )
        for name, group in GROUPS.items()
    ]
    print_table(("GROUP", "HOLDS", "THREAT"), groups)
    print("\nprofiles\n")
    rows_of_profiles = [(p.name, printable(p.title)) for p in _profiles()]
    print_table(("PROFILE", "FOR"), rows_of_profiles)
