# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt doctor``: what is wrong with this host, or why a VM is not hooked."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from kvmi_libvirt import libvirtio
from kvmi_libvirt.cli import progress
from kvmi_libvirt.cli.output import in_colour, print_json
from kvmi_libvirt.doctor.examine import Question, examine
from kvmi_libvirt.doctor.report import as_json, as_text, exit_code
from kvmi_libvirt.errors import UsageError
from kvmi_libvirt.quoting import printable

if TYPE_CHECKING:
    import argparse

    from kvmi_libvirt.errors import ExitCode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "domain",
        nargs="?",
        metavar="DOMAIN",
        help="name, uuid or id: why is it not hooked? The host, and a line about each VM, "
        "if left out",
    )
    parser.add_argument(
        "-c", "--connect", metavar="URI", default=libvirtio.DEFAULT_URI, help="libvirt to ask"
    )
    parser.add_argument(
        "--emulated",
        action="store_true",
        help="VMs here run on the emulated KVMI kernel: the host's needs none",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="how long libvirt may take for an answer (default: %(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> ExitCode:
    """Print a line for everything that was looked at; the first FAIL decides the exit code."""
    if not 0 < args.timeout <= 3600:
        raise UsageError(f"--timeout {args.timeout:g} is not between 0 and 3600 seconds")
    if not libvirtio.is_local(args.connect):
        raise UsageError(f"--connect {printable(args.connect)} is another host: run this there")
    question = Question(
        domain=args.domain,
        uri=args.connect,
        is_emulated=args.emulated,
        timeout_s=args.timeout,
    )
    with progress.shown("looking at this host and its VMs"):
        lines, vm = examine(question)
    if args.json:
        log = None if vm is None else {"place": vm.log_place or None, "lines": list(vm.log)}
        print_json({"checks": [as_json(line) for line in lines], "log": log})
        return exit_code(lines)
    is_coloured = in_colour(sys.stdout)
    for line in lines:
        print(as_text(line, in_colour=is_coloured))
    if vm is not None and vm.log:
        print(f"\nlast lines about it in {vm.log_place}:")
        for text in vm.log:
            print(f"  {printable(text)}")
    return exit_code(lines)
