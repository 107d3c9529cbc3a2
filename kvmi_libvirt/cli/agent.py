# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt agent``: keep introspection right while VMs and tools come and go."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from kvmi_libvirt.errors import ExitCode, UsageError

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "--config", metavar="FILE", type=Path, help="instead of /etc/kvmi-libvirt/agent.conf"
    )
    parser.add_argument(
        "--check-config", action="store_true", help="read the configuration and end"
    )


def run(args: argparse.Namespace) -> ExitCode:
    """Be the agent, in the foreground, until SIGTERM."""
    from kvmi_libvirt.agent.settings import load_settings

    settings = load_settings(args.config)
    if args.check_config:
        return ExitCode.OK
    if os.geteuid() != 0:
        raise UsageError("the agent must run as root")
    from kvmi_libvirt.agent import daemon

    daemon.run(settings)
    return ExitCode.OK
