# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt hook``: hook a running VM now, as its policy says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvmi_libvirt.cli import progress
from kvmi_libvirt.cli.output import print_json
from kvmi_libvirt.cli.status import summary
from kvmi_libvirt.cli.target import add_target_arguments, open_target, state_dir
from kvmi_libvirt.errors import ExitCode, PolicyRefused
from kvmi_libvirt.introspect import hook_vm, public_fields
from kvmi_libvirt.policy.document import read_file
from kvmi_libvirt.policy.element import parse_document
from kvmi_libvirt.policy.resolve import permit
from kvmi_libvirt.quoting import printable

if TYPE_CHECKING:
    import argparse


_NO_POLICY: Final = (
    "no introspection element, and no assignment of the host fits; give one with --policy FILE"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_target_arguments(parser)
    parser.add_argument(
        "--policy",
        metavar="FILE",
        help="use this element, not what the host assigns nor the domain's own",
    )
    parser.add_argument("--json", action="store_true", help="print the state as JSON")


def run(args: argparse.Namespace) -> ExitCode:
    """Hook the VM; the VM runs on whatever happens."""
    with open_target(args) as target:
        if args.policy is None:
            domain, policy = target.decide()
        else:
            source = printable(args.policy)
            domain = target.domain()
            policy = parse_document(read_file(args.policy), source=source)
            policy = policy and permit(policy, target.host_policy(), source=source)
        if policy is None:
            raise PolicyRefused(_NO_POLICY, source=printable(args.policy or target.source))
        with progress.shown(f"hooking {target.name} for the tool at {policy.source.describe()}"):
            state = hook_vm(
                target.process,
                domain,
                policy,
                state=state_dir(),
                allow_standin=not target.is_managed,
            )
    if args.json:
        print_json(public_fields(state))
    else:
        print(summary(state))
    return ExitCode.OK
