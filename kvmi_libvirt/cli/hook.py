# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt hook``: hook a running VM now, as its policy says."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from kvmi_libvirt.cli.output import print_json
from kvmi_libvirt.cli.status import summary
from kvmi_libvirt.cli.target import add_target_arguments, open_target, state_dir
from kvmi_libvirt.errors import ExitCode
from kvmi_libvirt.introspect import hook_vm, public_fields
from kvmi_libvirt.policy.document import read_file
from kvmi_libvirt.policy.element import parse_document
from kvmi_libvirt.policy.host import load_host_policy
from kvmi_libvirt.policy.resolve import permit, resolve

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_target_arguments(parser)
    parser.add_argument(
        "--policy", metavar="FILE", help="use this element instead of the domain's own"
    )
    parser.add_argument("--json", action="store_true", help="print the state as JSON")


def run(args: argparse.Namespace) -> ExitCode:
    """Hook the VM; the VM runs on whatever happens."""
    with open_target(args) as target:
        domain = target.domain
        host = load_host_policy()
        if args.policy is None:
            resolved = resolve(domain, host)
        else:
            policy = parse_document(read_file(args.policy), source=args.policy)
            resolved = policy and permit(policy, host, source=args.policy)
        if resolved is None:
            print(
                f"kvmi-libvirt: no introspection element in {args.policy or domain.name}; "
                "give one with --policy FILE",
                file=sys.stderr,
            )
            return ExitCode.POLICY
        state = hook_vm(
            target.process,
            domain,
            resolved,
            state=state_dir(),
            allow_standin=not target.is_libvirt,
        )
    if args.json:
        print_json(public_fields(state))
    else:
        print(summary(state))
    return ExitCode.OK
