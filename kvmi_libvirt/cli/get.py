# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt get DOMAIN``: print a domain's introspection element."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

from kvmi_libvirt import libvirtio
from kvmi_libvirt.cli import progress
from kvmi_libvirt.cli.metadata import add_metadata_arguments, element_of
from kvmi_libvirt.cli.output import print_json
from kvmi_libvirt.errors import ExitCode, TargetNotFound

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_metadata_arguments(parser, both=False)
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(args: argparse.Namespace) -> ExitCode:
    """Print the element as a file that ``set`` takes; exit code 1 without one."""
    with progress.shown(f"asking libvirt at {args.connect}"):
        found = libvirtio.domain_xml(args.domain, uri=args.connect, of_config=args.config)
    if args.live and not found.is_active:
        error = TargetNotFound(f"domain '{found.name}' does not run")
        raise error.then(f"virsh start {shlex.quote(found.name)}")
    element = element_of(found.xml, source=f"XML of domain '{found.name}'")
    if args.json:
        print_json({"domain": found.name, "uuid": found.uuid, "element": element})
    elif element is not None:
        print(element)
    else:
        print(
            f"kvmi-libvirt: domain '{found.name}' has no introspection element; "
            f"next: kvmi-libvirt set {shlex.quote(found.name)} FILE",
            file=sys.stderr,
        )
    return ExitCode.FAILED if element is None else ExitCode.OK
