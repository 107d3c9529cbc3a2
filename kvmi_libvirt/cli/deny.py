# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt deny DOMAIN NAME...``: take rights from a hooked VM's tool now."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmi_libvirt.cli import rights

if TYPE_CHECKING:
    import argparse

    from kvmi_libvirt.errors import ExitCode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    rights.add_arguments(parser)


def run(args: argparse.Namespace) -> ExitCode:
    """Deny it, until the policy is next applied."""
    return rights.change(args, allow=False)
