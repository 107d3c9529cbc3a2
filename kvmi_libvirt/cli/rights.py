# SPDX-License-Identifier: Apache-2.0
"""What ``allow`` and ``deny`` have in common: names on the command line, a new policy."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmi_libvirt.cli import progress
from kvmi_libvirt.cli.live import print_state
from kvmi_libvirt.cli.target import add_target_arguments, open_target, state_dir
from kvmi_libvirt.errors import ExitCode, PolicyRefused, PolicyValueError, UsageError
from kvmi_libvirt.introspect import change_vm
from kvmi_libvirt.policy.groups import GROUPS
from kvmi_libvirt.policy.model import Mode, Policy, Reason, Rights, parse_source
from kvmi_libvirt.policy.rules import COMMANDS, EVENTS, canonical, unknown_right

if TYPE_CHECKING:
    import argparse

    from kvmi_libvirt.policy.host import HostPolicy
    from kvmi_libvirt.state import VmState

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """Commands and events that were named.

    Parameters
        tolerated  those of them that a group brought in: a kernel may lack them
    """

    commands: frozenset[str] = frozenset()
    events: frozenset[str] = frozenset()
    tolerated: frozenset[str] = frozenset()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare both verbs' arguments."""
    add_target_arguments(parser)
    parser.add_argument(
        "names", metavar="NAME", nargs="*", help="of a command, an event, or a group of both"
    )
    parser.add_argument("--json", action="store_true", help="print the state as JSON")


def change(args: argparse.Namespace, *, allow: bool) -> ExitCode:
    """Change the rights in force of a hooked VM, until its policy is next applied."""
    if args.pid is not None and args.domain is not None:
        # Whatever stands beside --pid is a name.
        args.domain, args.names = None, [args.domain, *args.names]
    if not args.names:
        raise UsageError("name what to change; 'kvmi-libvirt names' lists it")
    named = read_names(args.names)
    with open_target(args) as target, progress.shown(f"changing the rights on {target.name}"):
        granted = within_ceiling(named, target.host_policy()) if allow else named

        def wanted(recorded: VmState) -> Policy:
            return changed(recorded, granted, allow=allow)

        state = change_vm(target.process, target.uuid, wanted, state=state_dir())
    print_state(state, as_json=args.json)
    return ExitCode.OK


def read_names(names: list[str]) -> Named:
    """Return what *names* mean.

    Raises
        PolicyValueError  one means nothing, or what nobody can allow or deny.
    """
    commands: set[str] = set()
    events: set[str] = set()
    grouped: set[str] = set()
    for name in names:
        group = GROUPS.get(name.lower())
        command, event = canonical(name, COMMANDS), canonical(name, EVENTS)
        if group is not None:
            commands |= group.commands - COMMANDS.always_allowed
            events |= group.events
            grouped |= group.commands | group.events
        elif command is not None and command in COMMANDS.always_allowed:
            text = f"{command} is always allowed; it can be neither granted nor denied"
            raise PolicyValueError(text).then("kvmi-libvirt names")
        elif command is not None:
            commands.add(command)
        elif event is not None:
            events.add(event)
        else:
            raise PolicyValueError(unknown_right(name))
    named = {canonical(name, COMMANDS) or canonical(name, EVENTS) for name in names}
    return Named(
        commands=frozenset(commands),
        events=frozenset(events),
        tolerated=frozenset(grouped - named),
    )


def within_ceiling(named: Named, host: HostPolicy) -> Named:
    """Return what of *named* this host's ceiling leaves.

    Raises
        PolicyRefused  something is above it and the host refuses such requests, or
                       nothing is left.
    """
    ceiling = host.ceiling
    if ceiling is None:
        return named
    commands = named.commands & ceiling.commands.allowed
    events = named.events & ceiling.events.allowed
    excess = sorted((named.commands - commands) | (named.events - events))
    if excess:
        place = Reason(rule="", source=host.path, line=ceiling.line).place()
        text = f"{', '.join(excess)}: above this host's ceiling ({place})"
        if not ceiling.trim or not (commands or events):
            raise PolicyRefused(f"{text}; not granted")
        logger.warning("%s; left out", text)
    return dataclasses.replace(named, commands=commands, events=events)


def changed(recorded: VmState, named: Named, *, allow: bool) -> Policy:
    """Return the policy that has the rights in force, and *named* or not.

    What is in force is never demanded of the kernel anew, only what is added by name.
    """
    return Policy(
        mode=Mode(recorded.mode),
        source=parse_source(recorded.source or ""),
        commands=_changed(recorded, "commands", named.commands, named.tolerated, allow=allow),
        events=_changed(recorded, "events", named.events, named.tolerated, allow=allow),
    )


def _changed(
    recorded: VmState, kind: str, names: frozenset[str], tolerated: frozenset[str], *, allow: bool
) -> Rights:
    in_force = frozenset(recorded.commands if kind == "commands" else recorded.events)
    everything = kind in recorded.all_ids and (allow or not names)
    if not allow:
        return Rights(allowed=in_force - names, optional=in_force - names, everything=everything)
    return Rights(
        allowed=in_force | names,
        optional=in_force | (names & tolerated),
        everything=everything,
    )
