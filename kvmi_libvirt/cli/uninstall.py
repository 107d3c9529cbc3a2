# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt uninstall``: take the libvirt hook away."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmi_libvirt.errors import ExitCode
from kvmi_libvirt.installer import HOOK_DIR, HOOK_NAME, uninstall_hook

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")


def run(args: argparse.Namespace) -> ExitCode:
    """Remove the hook; running VMs keep the introspection they have."""
    path = HOOK_DIR / HOOK_NAME
    if args.dry_run:
        print(f"would remove {path}")
        return ExitCode.OK
    print(f"removed {path}" if uninstall_hook() else f"{path} was not there")
    print("running VMs keep the introspection they have; 'kvmi-libvirt unhook' takes it off")
    return ExitCode.OK
