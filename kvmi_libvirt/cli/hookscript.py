# SPDX-License-Identifier: Apache-2.0
"""``install`` and ``uninstall --proxmox DIRECTORY``: Proxmox VE's hookscript."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvmi_libvirt.errors import ExitCode
from kvmi_libvirt.snippets import (
    HOOKSCRIPT_NAME,
    hookscript_is_current,
    install_hookscript,
    uninstall_hookscript,
)

if TYPE_CHECKING:
    import argparse


def add_proxmox_argument(parser: argparse.ArgumentParser) -> None:
    """Declare --proxmox."""
    parser.add_argument(
        "--proxmox",
        metavar="DIRECTORY",
        type=Path,
        help="instead: Proxmox VE's hookscript, in a storage's snippets directory",
    )


def install(directory: Path, *, dry_run: bool) -> ExitCode:
    """Install the hookscript and say what is left to do."""
    path = directory / HOOKSCRIPT_NAME
    if dry_run:
        is_there = hookscript_is_current(directory)
        print(f"{path} is in place already" if is_there else f"would install {path}")
        return ExitCode.OK
    changed = install_hookscript(directory)
    print(f"installed {path}" if changed else f"{path} is in place already")
    print(f"give it to a VM: qm set VMID --hookscript STORAGE:snippets/{HOOKSCRIPT_NAME}")
    return ExitCode.OK


def uninstall(directory: Path, *, dry_run: bool) -> ExitCode:
    """Remove the hookscript and say what is left to do."""
    path = directory / HOOKSCRIPT_NAME
    if dry_run:
        print(f"would remove {path}" if path.exists() else f"{path} was not there")
        return ExitCode.OK
    print(f"removed {path}" if uninstall_hookscript(directory) else f"{path} was not there")
    print("a VM that still names it does not start: qm set VMID --delete hookscript")
    return ExitCode.OK
