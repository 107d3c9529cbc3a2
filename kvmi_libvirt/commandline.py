# SPDX-License-Identifier: Apache-2.0
"""What a QEMU's command line tells of its machine, where no domain XML does.

Written for the command lines of Proxmox VE: qemu-server's config_to_command(). May import
``policy.element``.
"""

from __future__ import annotations

import itertools
import re
import uuid
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.policy.element import Domain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_MIB: Final = 1 << 20
_UNITS: Final = {"": _MIB, "b": 1, "k": 1 << 10, "m": _MIB, "g": 1 << 30, "t": 1 << 40}
_SIZE: Final = re.compile(r"([0-9]{1,15})([bkmgt]?)", re.IGNORECASE)
_WITHOUT_UUID: Final = uuid.UUID("6b766d69-7076-4500-8000-000000000000")
"""Names the VMs that were given no SMBIOS UUID, by their number."""


def domain_of(vmid: int, arguments: Sequence[str]) -> Domain:
    """Return what a command line says of the VM *vmid*.

    Its name is its number, not the one after ``-name``, which anybody with rights on the
    VM can change.
    """
    return Domain(
        name=str(vmid),
        uuid=_uuid(vmid, arguments),
        vcpus=_vcpus(arguments),
        memory_bytes=_memory_bytes(arguments),
        machine=_machine(arguments),
        policy=None,
        vmid=vmid,
        origin=f"command line of VM {vmid}",
    )


def is_started_paused(arguments: Sequence[str]) -> bool:
    """Say whether QEMU was told not to run the guest at once."""
    return "-S" in arguments


def is_incoming(arguments: Sequence[str]) -> bool:
    """Say whether QEMU was told to take its state from elsewhere."""
    return not {"-incoming", "-loadstate", "-loadvm"}.isdisjoint(arguments)


def _values(arguments: Sequence[str], option: str) -> Iterator[dict[str, str]]:
    # "-smp 4,sockets=1" -> {"": "4", "sockets": "1"}; a comma in a value is doubled.
    for name, value in itertools.pairwise(arguments):
        if name == option:
            fields = {}
            for part in value.replace(",,", "\0").split(","):
                key, equals, text = part.partition("=")
                fields[key if equals else ""] = (text if equals else part).replace("\0", ",")
            yield fields


def _uuid(vmid: int, arguments: Sequence[str]) -> str:
    for fields in _values(arguments, "-smbios"):
        if fields.get("type") == "1" and "uuid" in fields:
            try:
                return str(uuid.UUID(fields["uuid"]))
            except ValueError:
                break
    return str(uuid.uuid5(_WITHOUT_UUID, str(vmid)))


def _vcpus(arguments: Sequence[str]) -> int:
    for fields in _values(arguments, "-smp"):
        text = fields.get("cpus", fields.get("", ""))
        if text.isascii() and text.isdecimal():
            return int(text[:9])
    return 1  # QEMU's default


def _memory_bytes(arguments: Sequence[str]) -> int:
    for fields in _values(arguments, "-m"):
        match = _SIZE.fullmatch(fields.get("size", fields.get("", "")))
        if match is not None:
            return int(match[1]) * _UNITS[match[2].lower()]
    return 0


def _machine(arguments: Sequence[str]) -> str:
    for fields in _values(arguments, "-machine"):
        return fields.get("type", fields.get("", ""))
    return "pc"
