# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt apply DOMAIN``: move a hooked VM to the policy it has now."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmi_libvirt.cli.live import apply_policy, print_state
from kvmi_libvirt.cli.target import add_target_arguments, open_target
from kvmi_libvirt.errors import ExitCode

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_target_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the state as JSON")


def run(args: argparse.Namespace) -> ExitCode:
    """Change its rights: what is no longer allowed goes first."""
    with open_target(args) as target:
        state = apply_policy(target)
    print_state(state, as_json=args.json)
    return ExitCode.OK
