# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt unhook``: take introspection off a running VM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmi_libvirt.cli.output import print_json
from kvmi_libvirt.cli.status import public_fields, summary
from kvmi_libvirt.cli.target import add_target_arguments, open_target, state_dir
from kvmi_libvirt.errors import ExitCode, TargetNotFound
from kvmi_libvirt.introspect import is_same_process, unhook_unrecorded, unhook_vm

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_target_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the state as JSON")


def run(args: argparse.Namespace) -> ExitCode:
    """Unhook the VM; the tool sees the end of its channel."""
    with open_target(args) as target:
        state = state_dir()
        recorded = state.load(target.uuid)
        if recorded is None or not is_same_process(recorded, target.process):
            if unhook_unrecorded(target.process, target.uuid, state=state):
                print(f"{target.name}: unhooked what an interrupted session had left")
                return ExitCode.OK
            raise TargetNotFound(f"domain '{target.name}' is not hooked by kvmi-libvirt")
        record = unhook_vm(target.process, recorded, state=state)
    if args.json:
        print_json(public_fields(record))
    else:
        print(summary(record))
    return ExitCode.OK
