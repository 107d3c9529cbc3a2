# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt uninstall``: take away what ``install`` put in place."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvmi_libvirt import daemons
from kvmi_libvirt.cli import hookscript, progress
from kvmi_libvirt.cli.hookscript import add_proxmox_argument
from kvmi_libvirt.cli.install import add_place_arguments, below, own_command, require_places, tell
from kvmi_libvirt.cli.status import seen_states
from kvmi_libvirt.doctor.look_agent import look_at_agent
from kvmi_libvirt.errors import ExitCode, StateError
from kvmi_libvirt.installation import AGENT_UNIT, UNIT_DIR, Change, Installer, Kind, items
from kvmi_libvirt.installer import HOOK_DIR, HOOK_NAME, hook_is_current, uninstall_hook
from kvmi_libvirt.state import HOOKED

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_place_arguments(parser)
    add_proxmox_argument(parser)
    parser.add_argument(
        "--purge",
        action="store_true",
        help="remove the configuration too, policy, profiles and secrets, and the logs",
    )


def run(args: argparse.Namespace) -> ExitCode:
    """Remove the hook and what goes with it; running VMs keep what they have."""
    if args.proxmox is not None:
        return hookscript.uninstall(args.proxmox, dry_run=args.dry_run)
    require_places(args)
    hook_dir = below(args.root, HOOK_DIR)
    is_here = args.root.resolve() == Path("/")
    if args.dry_run:
        hook_is_current(hook_dir=hook_dir)  # it refuses what is not ours, as it would
        was_there = (hook_dir / HOOK_NAME).exists()
    else:
        was_there = uninstall_hook(hook_dir=hook_dir)
    tell(Change.REMOVED if was_there else Change.GONE, hook_dir / HOOK_NAME, args)
    if is_here and not args.dry_run:
        daemons.forget()
    installer = Installer(args.root, dry_run=args.dry_run)
    if is_here:
        _stop_agent(dry_run=args.dry_run)
    for item in reversed(items(command=own_command(), prefix=args.prefix)):
        change = installer.remove(item, purge=args.purge)
        if change in (Change.REMOVED, Change.KEPT):
            tell(change, below(args.root, item.path), args)
            if change is Change.REMOVED and item.path.name == AGENT_UNIT and is_here:
                _forget_unit(dry_run=args.dry_run)
        elif item.kind is Kind.CONFIG and not args.purge:
            path = below(args.root, item.path)
            if path.exists():
                print(f"left {path}: it is configuration; --purge removes it")
    if args.purge:
        for path in installer.purge():
            tell(Change.REMOVED, path, args)
    if is_here:
        _tell_vms(dry_run=args.dry_run)
    return ExitCode.OK


def _stop_agent(*, dry_run: bool) -> None:
    # A package's unit is the package's to stop. Ours goes: what runs must not stay.
    if not daemons.is_booted_with_systemd() or not (UNIT_DIR / AGENT_UNIT).is_file():
        return
    if dry_run:
        print(f"would stop and disable {AGENT_UNIT}")
        return
    with progress.shown("waiting for the agent to end"):
        problem = daemons.disable_service(AGENT_UNIT)
    if problem is None:
        print(f"stopped and disabled {AGENT_UNIT}; hooked VMs stay hooked")
    else:
        print(f"kvmi-libvirt: {AGENT_UNIT} could not be stopped: {problem}", file=sys.stderr)


def _forget_unit(*, dry_run: bool) -> None:
    # systemd goes by the unit that was until it is told.
    if not dry_run and daemons.is_booted_with_systemd():
        daemons.forget_units()


def _tell_vms(*, dry_run: bool) -> None:
    problems: list[StateError] = []
    hooked = [state for state in seen_states(problems.append) if state.state == HOOKED]
    for problem in problems:
        print(f"kvmi-libvirt: {problem}", file=sys.stderr)
    for state in hooked:
        if dry_run:
            print(f"{state.domain} would stay hooked by {state.source}")
        else:
            print(f"{state.domain} stays hooked by {state.source}, as it is")
    if not hooked:
        print("no running VM is hooked")
    agent = look_at_agent().pid
    if agent is not None:
        print(f"an agent runs (process {agent}) and goes on to hook VMs: end it if it is not to")
    else:
        print(
            "from now on VMs start without introspection, also those that require it; libvirt "
            "needs no reload"
        )
    if hooked:
        print(f"to take introspection off: kvmi-libvirt unhook {hooked[0].domain}")
