# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt emulate``: run a command on an emulated KVMI kernel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvmi_libvirt.emulator.faults import FAULTS, parse_faults
from kvmi_libvirt.emulator.revisions import EMULATED

if TYPE_CHECKING:
    import argparse

    from kvmi_libvirt.errors import ExitCode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.usage = "%(prog)s [OPTION...] -- COMMAND [ARGUMENT...]"
    parser.add_argument(
        "--abi",
        choices=[abi.name for abi in EMULATED],
        default=EMULATED[0].name,
        help="the KVMI revision to emulate (default: %(default)s)",
    )
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE.jsonl",
        help="append a JSON line for each introspection ioctl",
    )
    parser.add_argument(
        "--stand-in",
        action="store_true",
        help="serve kvmi_libvirt.emulator.standin, for machines without /dev/kvm",
    )
    parser.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="NAME",
        help="let the kernel do what this machine's cannot show: "
        + "; ".join(f"{name}: {what}" for name, what in FAULTS.items()),
    )
    parser.add_argument(
        "command",
        nargs="+",
        metavar="COMMAND",
        help="what to run, with its arguments; its exit code becomes this verb's",
    )


def run(args: argparse.Namespace) -> ExitCode:
    """Become the command; returns never."""
    from kvmi_libvirt.emulator.launch import launch

    abi = next(abi for abi in EMULATED if abi.name == args.abi)
    launch(
        args.command,
        abi=abi,
        trace=args.trace,
        stand_in=args.stand_in,
        faults=parse_faults(args.fault),
    )
