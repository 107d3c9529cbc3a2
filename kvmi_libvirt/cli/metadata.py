# SPDX-License-Identifier: Apache-2.0
"""What ``set``, ``unset`` and ``get`` have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvmi_libvirt import libvirtio
from kvmi_libvirt.policy.document import parse, written
from kvmi_libvirt.policy.element import domain_of, elements_of

if TYPE_CHECKING:
    import argparse

PREFIX: Final = "kvmi"


def add_metadata_arguments(parser: argparse.ArgumentParser, *, both: bool) -> None:
    """Declare DOMAIN, --connect, --live and --config."""
    parser.add_argument("domain", metavar="DOMAIN", help="name, uuid or id")
    parser.add_argument(
        "-c", "--connect", metavar="URI", default=libvirtio.DEFAULT_URI, help="libvirt to ask"
    )
    where: argparse._ActionsContainer = parser if both else parser.add_mutually_exclusive_group()
    where.add_argument("--live", action="store_true", help="of the running domain")
    where.add_argument("--config", action="store_true", help="of its next start")


def element_of(xml: bytes, *, source: str) -> str | None:
    """Return the introspection element in a domain's XML as text, or None without one."""
    domain = domain_of(parse(xml, source=source))
    elements = [] if domain is None else elements_of(domain)
    return written(elements[0]) if elements else None
