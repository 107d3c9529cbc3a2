# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt status``: what is hooked, with which rights, and what failed."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from typing import TYPE_CHECKING, Any

from kvmi_libvirt import agentclient
from kvmi_libvirt.cli import progress
from kvmi_libvirt.cli.output import print_json, print_table
from kvmi_libvirt.cli.target import state_dir
from kvmi_libvirt.errors import ExitCode, StateError, TargetNotFound
from kvmi_libvirt.introspect import interrupted, look_at, public_fields
from kvmi_libvirt.quoting import counted
from kvmi_libvirt.state import HOOKED

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from pathlib import Path

    from kvmi_libvirt.state import VmState


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("domain", nargs="?", metavar="DOMAIN", help="name or uuid; all if left out")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> ExitCode:
    """Print what is recorded, checked against what can be seen now."""
    problems: list[StateError] = []
    with progress.shown("looking at the VMs"):
        states = seen_states(problems.append)
    for problem in problems:
        print(f"kvmi-libvirt: {problem}", file=sys.stderr)
    _show(args, states)
    return ExitCode.FAILED if problems else ExitCode.OK


def seen_states(damaged: Callable[[StateError], None]) -> list[VmState]:
    """Return what is known of the VMs that run, checked against what can be seen now.

    Also of those about which only the journal of an interrupted session tells.

    Parameters
        damaged  is told of files that are no record
    """
    state = state_dir()
    told = _told_by_agent(state.path)
    states = [
        seen for found in state.all(damaged) if (seen := _confirmed(found, told) or look_at(found))
    ]
    recorded = {found.uuid for found in states}
    for left in state.journals(damaged):
        if left.uuid not in recorded and (found := interrupted(left, state)) is not None:
            states.append(found)
    return states


def _told_by_agent(directory: Path) -> dict[str, dict[str, Any]]:
    # It watches the channels, and knows why it waits: no need to look at a thousand VMs.
    answer = agentclient.ask(directory, "status") or {}
    return {vm["uuid"]: vm for vm in answer.get("vms", ())}


def _confirmed(state: VmState, told: dict[str, dict[str, Any]]) -> VmState | None:
    vm = told.get(state.uuid)
    if vm is None or (vm["pid"], vm["state"], vm["since"]) != (state.pid, state.state, state.since):
        return None
    if state.state == HOOKED and not vm.get("watched"):
        return None  # its tool may have gone since the agent last asked the kernel
    return dataclasses.replace(state, error=vm["error"])


def _show(args: argparse.Namespace, states: list[VmState]) -> None:
    if args.domain is not None:
        states = [state for state in states if args.domain in (state.domain, state.uuid)]
        if not states:
            raise TargetNotFound(
                f"nothing is known of a running domain '{args.domain}': "
                "it does not run, or never had introspection"
            ).then(f"kvmi-libvirt doctor {shlex.quote(args.domain)}")
    if args.json:
        print_json([public_fields(state) for state in states])
        return
    if args.domain is not None:
        for state in states:
            _print_one(state)
        return
    print_table(
        ("DOMAIN", "STATE", "MODE", "ABI", "RIGHTS", "TOOL", "SINCE"),
        [
            (
                state.domain,
                state.state,
                state.mode,
                state.abi or "-",
                f"{counted(len(state.commands), 'command')}, {counted(len(state.events), 'event')}",
                state.source or "-",
                state.since,
            )
            for state in states
        ],
    )
    for state in states:
        if state.error:
            print(f"{state.domain}: {state.error}")


def summary(state: VmState) -> str:
    """Return one line that says what is in force."""
    if state.state != "hooked":
        return f"{state.domain}: {state.state}"
    return (
        f"{state.domain}: hooked by {state.source} ({state.abi}), "
        f"{counted(len(state.commands), 'command')} and "
        f"{counted(len(state.events), 'event')} allowed"
    )


def _print_one(state: VmState) -> None:
    for name, value in public_fields(state).items():
        if isinstance(value, list):
            print(f"{name + ':':10} {value[0] if value else '-'}")
            for entry in value[1:]:
                print(f"{'':10} {entry}")
        else:
            print(f"{name + ':':10} {'-' if value is None else value}")
