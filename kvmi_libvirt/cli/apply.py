# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt apply DOMAIN``: move a hooked VM to the policy it has now."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmi_libvirt.cli.live import add_state_arguments, apply_policy, print_state
from kvmi_libvirt.errors import ExitCode

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("domain", metavar="DOMAIN", help="name, uuid or id")
    add_state_arguments(parser)


def run(args: argparse.Namespace) -> ExitCode:
    """Change its rights: what is no longer allowed goes first."""
    print_state(apply_policy(args.domain, uri=args.connect), as_json=args.json)
    return ExitCode.OK
