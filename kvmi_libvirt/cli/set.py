# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt set DOMAIN FILE``: put an introspection element into a domain's metadata."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from kvmi_libvirt import libvirtio
from kvmi_libvirt.cli import progress
from kvmi_libvirt.cli.live import follow
from kvmi_libvirt.cli.metadata import PREFIX, add_metadata_arguments
from kvmi_libvirt.cli.status import summary
from kvmi_libvirt.errors import ExitCode, PolicySchemaError
from kvmi_libvirt.policy.document import parse, read_file, written_plain
from kvmi_libvirt.policy.element import domain_of, elements_of, parse_document
from kvmi_libvirt.policy.host import load_host_policy
from kvmi_libvirt.policy.model import NAMESPACE
from kvmi_libvirt.policy.resolve import permit
from kvmi_libvirt.quoting import printable

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_metadata_arguments(parser, both=True)
    parser.add_argument(
        "file",
        metavar="FILE",
        help="an introspection element, or domain XML with one; - for standard input",
    )


def run(args: argparse.Namespace) -> ExitCode:
    """Check the element as this host would, then store it; a hooked VM follows at once."""
    source = printable(args.file)
    data = read_file(args.file)
    policy = parse_document(data, source=source)
    if policy is None:
        error = PolicySchemaError("no introspection element in it", source=source)
        raise error.then("man kvmi-libvirt-policy")
    if libvirtio.is_local(args.connect):
        permit(policy, load_host_policy(), source=source)
    root = parse(data, source=source)
    domain = domain_of(root)
    element = root if domain is None else elements_of(domain)[0]
    with progress.shown(f"asking libvirt at {args.connect}"):
        before = libvirtio.set_metadata(
            args.domain,
            written_plain(element),
            namespace=NAMESPACE,
            prefix=PREFIX,
            uri=args.connect,
            live=args.live,
            config=args.config,
        )
    follow_up(before, args)
    return ExitCode.OK


def follow_up(before: libvirtio.DomainXml, args: argparse.Namespace) -> None:
    """Let a hooked VM follow what was changed in its live definition."""
    is_live = before.is_active and (args.live or not args.config)
    if is_live and libvirtio.is_local(args.connect):
        state = follow(before.name, before.uuid, uri=args.connect)
        if state is not None:
            print(summary(state), file=sys.stderr)
    elif is_live and libvirtio.is_remote(args.connect):
        print(
            f"kvmi-libvirt: {before.name} runs on another host, whose agent moves it to this; "
            f"without an agent, run 'kvmi-libvirt apply {before.name}' there",
            file=sys.stderr,
        )
