# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt unhook``: take introspection off a running VM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmi_libvirt.cli import progress
from kvmi_libvirt.cli.output import print_json
from kvmi_libvirt.cli.status import summary
from kvmi_libvirt.cli.target import add_target_arguments, open_target, state_dir
from kvmi_libvirt.errors import ExitCode, TargetNotFound
from kvmi_libvirt.introspect import (
    is_same_process,
    public_fields,
    take_leave,
    unhook_unrecorded,
    unhook_vm,
)
from kvmi_libvirt.state import HOOKED

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_target_arguments(parser)
    parser.add_argument(
        "--now", action="store_true", help="do not ask the tool, nor wait for it to let go"
    )
    parser.add_argument("--json", action="store_true", help="print the state as JSON")


def run(args: argparse.Namespace) -> ExitCode:
    """Ask the tool to let go, wait for it as long as the policy says, and unhook the VM."""
    with open_target(args) as target:
        state = state_dir()
        recorded = state.load(target.uuid)
        if recorded is None or not is_same_process(recorded, target.process):
            if unhook_unrecorded(target.process, target.uuid, state=state):
                print(f"{target.name}: unhooked what an interrupted session had left")
                return ExitCode.OK
            error = TargetNotFound(f"domain '{target.name}' is not hooked by kvmi-libvirt")
            raise error.then("kvmi-libvirt status")
        if args.now or recorded.state != HOOKED:
            with progress.shown(f"unhooking {target.name}"):
                record = unhook_vm(target.process, recorded, state=state)
        else:
            with progress.shown(f"waiting for {recorded.source} to let {target.name} go"):
                record = take_leave(target.process, recorded, state=state)
    if args.json:
        print_json(public_fields(record))
    else:
        print(summary(record))
    return ExitCode.OK
