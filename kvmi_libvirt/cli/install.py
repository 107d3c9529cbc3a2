# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt install``: put the libvirt hook, or Proxmox VE's hookscript, in place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvmi_libvirt.errors import ExitCode
from kvmi_libvirt.installer import (
    HOOK_DIR,
    HOOK_NAME,
    HOOKSCRIPT_NAME,
    install_hook,
    install_hookscript,
    reload_daemons,
)

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    parser.add_argument("--reload", action="store_true", help="make running libvirt daemons notice")
    parser.add_argument(
        "--proxmox",
        metavar="DIRECTORY",
        type=Path,
        help="instead: Proxmox VE's hookscript, into a storage's snippets directory",
    )


def run(args: argparse.Namespace) -> ExitCode:
    """Install the hook and say what is left to do."""
    directory: Path | None = args.proxmox
    path = HOOK_DIR / HOOK_NAME if directory is None else directory / HOOKSCRIPT_NAME
    if args.dry_run:
        print(f"would install {path}")
        return ExitCode.OK
    changed = install_hook() if directory is None else install_hookscript(directory)
    print(f"installed {path}" if changed else f"{path} is in place already")
    if directory is not None:
        print(f"give it to a VM: qm set VMID --hookscript STORAGE:snippets/{HOOKSCRIPT_NAME}")
        return ExitCode.OK
    if args.reload:
        for daemon in reload_daemons():
            print(f"reloaded {daemon}")
    else:
        print(
            "a libvirt daemon that had no qemu hook when it started must be reloaded: "
            "systemctl reload libvirtd (or virtqemud), or run this with --reload"
        )
    return ExitCode.OK
