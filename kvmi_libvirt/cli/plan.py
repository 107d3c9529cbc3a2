# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt plan FILE``: the ioctls a policy amounts to, without doing them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from kvmi_libvirt.abi.revisions import REVISIONS, by_name
from kvmi_libvirt.cli.output import print_json
from kvmi_libvirt.errors import ExitCode
from kvmi_libvirt.plan import Plan, make_plan
from kvmi_libvirt.policy.document import parse, read_file
from kvmi_libvirt.policy.element import domain_of, parse_document
from kvmi_libvirt.policy.host import load_host_policy
from kvmi_libvirt.policy.resolve import decide, permit
from kvmi_libvirt.quoting import printable

if TYPE_CHECKING:
    import argparse

    from kvmi_libvirt.policy.model import Policy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    names = [abi.name for abi in REVISIONS]
    parser.add_argument(
        "file",
        metavar="FILE",
        help="domain XML, or an introspection element by itself; - for standard input",
    )
    parser.add_argument(
        "--abi",
        choices=names,
        default=names[0],
        help="the kernel's KVMI revision (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(args: argparse.Namespace) -> ExitCode:
    """Print the steps for a VM that is not hooked yet; none for a domain without the element."""
    abi = by_name(args.abi)
    source = printable(args.file)
    policy = _policy_of(read_file(args.file), source=source)
    if policy is None:
        print(f"{source}: no introspection element, nothing to do", file=sys.stderr)
        plan = Plan(abi=abi, steps=())
    else:
        plan = make_plan(policy, abi, None)
    if args.json:
        print_json(_as_json(plan))
    else:
        for step in plan.steps:
            print(step.describe())
    return ExitCode.OK


def _policy_of(xml: bytes, *, source: str) -> Policy | None:
    host = load_host_policy()
    if domain_of(parse(xml, source=source)) is not None:
        return decide(xml, host, source=source)[1]
    policy = parse_document(xml, source=source)
    return policy and permit(policy, host, source=source)


def _as_json(plan: Plan) -> dict[str, object]:
    return {
        "abi": plan.abi.name,
        "steps": [
            {
                "ioctl": step.ioctl.value,
                "request": f"{step.request:#010x}",
                "allow": step.allow,
                "id": step.id,
                "name": step.name,
            }
            for step in plan.steps
        ],
    }
