# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt unset DOMAIN``: take the introspection element out of a domain's metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmi_libvirt import libvirtio
from kvmi_libvirt.cli import progress
from kvmi_libvirt.cli.metadata import PREFIX, add_metadata_arguments
from kvmi_libvirt.cli.set import follow_up
from kvmi_libvirt.errors import ExitCode
from kvmi_libvirt.policy.model import NAMESPACE

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_metadata_arguments(parser, both=True)


def run(args: argparse.Namespace) -> ExitCode:
    """Remove it; a hooked VM is unhooked, or moved to what the host assigns it."""
    with progress.shown(f"asking libvirt at {args.connect}"):
        before = libvirtio.set_metadata(
            args.domain,
            None,
            namespace=NAMESPACE,
            prefix=PREFIX,
            uri=args.connect,
            live=args.live,
            config=args.config,
        )
    follow_up(before, args)
    return ExitCode.OK
