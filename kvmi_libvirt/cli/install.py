# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt install``: put the libvirt hook in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmi_libvirt.errors import ExitCode
from kvmi_libvirt.installer import HOOK_DIR, HOOK_NAME, install_hook, reload_daemons

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    parser.add_argument("--reload", action="store_true", help="make running libvirt daemons notice")


def run(args: argparse.Namespace) -> ExitCode:
    """Install the hook and say what is left to do."""
    path = HOOK_DIR / HOOK_NAME
    if args.dry_run:
        print(f"would install {path}")
        return ExitCode.OK
    print(f"installed {path}" if install_hook() else f"{path} is in place already")
    if args.reload:
        for daemon in reload_daemons():
            print(f"reloaded {daemon}")
    else:
        print(
            "a libvirt daemon that had no qemu hook when it started must be reloaded: "
            "systemctl reload libvirtd (or virtqemud), or run this with --reload"
        )
    return ExitCode.OK
