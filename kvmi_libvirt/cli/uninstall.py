# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt uninstall``: take the libvirt hook, or Proxmox VE's hookscript, away."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvmi_libvirt.errors import ExitCode
from kvmi_libvirt.installer import (
    HOOK_DIR,
    HOOK_NAME,
    HOOKSCRIPT_NAME,
    uninstall_hook,
    uninstall_hookscript,
)

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    parser.add_argument(
        "--proxmox",
        metavar="DIRECTORY",
        type=Path,
        help="instead: Proxmox VE's hookscript, from a storage's snippets directory",
    )


def run(args: argparse.Namespace) -> ExitCode:
    """Remove the hook; running VMs keep the introspection they have."""
    directory: Path | None = args.proxmox
    path = HOOK_DIR / HOOK_NAME if directory is None else directory / HOOKSCRIPT_NAME
    if args.dry_run:
        print(f"would remove {path}")
        return ExitCode.OK
    changed = uninstall_hook() if directory is None else uninstall_hookscript(directory)
    print(f"removed {path}" if changed else f"{path} was not there")
    print("running VMs keep the introspection they have; 'kvmi-libvirt unhook' takes it off")
    if directory is not None:
        print("a VM that still names it does not start: qm set VMID --delete hookscript")
    return ExitCode.OK
