# SPDX-License-Identifier: Apache-2.0
"""The revisions this package speaks, and the names a policy may use."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from kvmi_libvirt.abi.kvmi import Command, Event, Ioctl, KvmiAbi
from kvmi_libvirt.abi.v7 import V7
from kvmi_libvirt.abi.v11 import V11, V11_OR_V12
from kvmi_libvirt.abi.v12 import V12

REVISIONS: Final = (V12, V11, V7)
"""Newest first, the order in which a kernel is probed."""

BY_NAME: Final = MappingProxyType({abi.name: abi for abi in (*REVISIONS, V11_OR_V12)})


def _first_of_each(kind: str) -> dict[str, Command | Event]:
    found: dict[str, Command | Event] = {}
    for abi in REVISIONS:
        for entry in abi.commands if kind == "commands" else abi.events:
            found.setdefault(entry.name, entry)
    return found


ALL_COMMANDS: Final = frozenset(_first_of_each("commands"))
"""Canonical names of every command any revision knows."""

ALL_EVENTS: Final = frozenset(_first_of_each("events"))
"""Canonical names of every event any revision knows."""

ALWAYS_ALLOWED: Final = frozenset(c.name for c in V12.commands if c.always_allowed)
"""Commands no revision can deny: the tool may always ask what it may do."""


def by_name(name: str) -> KvmiAbi:
    """Return the revision called *name* ("v12", "v11", "v7"); KeyError otherwise."""
    return BY_NAME[name]


def candidates(abi: KvmiAbi) -> tuple[KvmiAbi, ...]:
    """Return the revisions a kernel may be of that was found to be *abi*."""
    return (V11, V12) if abi is V11_OR_V12 else (abi,)


def pinned(found: KvmiAbi, pin: str | None) -> KvmiAbi | None:
    """Return what a kernel counts as that answers as *found*, where its host says *pin*.

    Between v11 and v12, which share their numbers, the host decides where the kernel
    does not tell. Where it tells otherwise there is doubt, in which no id is granted
    that differs: a pin may have outlived a change of the kernel.

    Returns
        None when the kernel cannot be what *pin* says
    """
    if pin is None or pin == found.name:
        return found
    said = by_name(pin)
    if said.request(Ioctl.COMMAND) != found.request(Ioctl.COMMAND):
        return None
    return said if found is V11_OR_V12 else V11_OR_V12
