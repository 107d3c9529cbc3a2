# SPDX-License-Identifier: Apache-2.0
"""What all KVMI revisions share, and the shape in which they differ.

A :class:`KvmiAbi` is a value: one table per published revision. Which one the
running kernel speaks is found by probing (see ``session.py``), never by kernel
version. Names are those of the v12 kernel header, the canonical set; a revision
that spells a command differently keeps its own spelling in ``kernel_name``.

Source: the patch series "VM introspection", v12 (October 2021), v11 (December
2020) and the downstream v7 tree that KVM-VMI ships; ``include/uapi/linux/kvmi.h``
and ``include/uapi/linux/kvm.h`` of each.
"""

from __future__ import annotations

import ctypes
import enum
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.abi import ioc

if TYPE_CHECKING:
    from collections.abc import Mapping

KVMIO: Final = 0xAE
KVM_CREATE_VM: Final = ioc.io(KVMIO, 0x01)
KVM_CHECK_EXTENSION: Final = ioc.io(KVMIO, 0x03)
KVM_RUN: Final = ioc.io(KVMIO, 0x80)

ALL_IDS: Final = -1
"""``id`` in :class:`kvm_introspection_feature` that means every command or event."""

PROBE_ID: Final = -2
"""Below every revision's first id: an ioctl with it fails (EINVAL) and changes nothing.

Not a large one: v7 kernels shift by the id, beyond the width of their mask.
"""


class kvm_introspection_hook(ctypes.Structure):  # noqa: N801 - the kernel's name
    """Argument of KVM_INTROSPECTION_HOOK."""

    _fields_ = (
        ("fd", ctypes.c_int32),  # a socket connected to the tool, in the caller's table
        ("padding", ctypes.c_uint32),  # must be zero, else EINVAL
        ("uuid", ctypes.c_uint8 * 16),  # for the kernel's messages only
    )


class kvm_introspection_feature(ctypes.Structure):  # noqa: N801 - the kernel's name
    """Argument of KVM_INTROSPECTION_COMMAND and _EVENT: allow first, id second."""

    _fields_ = (
        ("allow", ctypes.c_uint32),  # 0 or 1
        ("id", ctypes.c_int32),  # -1 = all
    )


class Scope(enum.Enum):
    """Who answers a command, or what an event is about."""

    VM = "vm"
    VCPU = "vcpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One introspection command of one revision.

    ``name`` is canonical; ``kernel_name`` is this revision's own spelling.
    ``always_allowed`` commands cannot be denied: the kernel answers EPERM.
    """

    id: int
    name: str
    kernel_name: str
    scope: Scope
    meaning: str
    always_allowed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One introspection event of one revision."""

    id: int
    name: str
    kernel_name: str
    scope: Scope
    meaning: str


class Ioctl(enum.Enum):
    """The five introspection ioctls of a VM fd, with the kernel's names."""

    HOOK = "KVM_INTROSPECTION_HOOK"
    UNHOOK = "KVM_INTROSPECTION_UNHOOK"
    PREUNHOOK = "KVM_INTROSPECTION_PREUNHOOK"
    COMMAND = "KVM_INTROSPECTION_COMMAND"
    EVENT = "KVM_INTROSPECTION_EVENT"


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """The ``nr`` byte of each ioctl, from which the requests are computed."""

    hook: int
    unhook: int
    preunhook: int
    command: int
    event: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KvmiAbi:
    """One KVMI revision.

    ``command_slots`` and ``event_slots`` are the sizes of the kernel's bitmaps:
    ids at or above them are out of range. ``handshake_size`` is the length in
    bytes of ``struct qemu_vmi_to_introspector`` for this revision.
    """

    name: str
    title: str
    capability: int
    numbers: Numbers
    command_slots: int
    event_slots: int
    handshake_size: int
    commands: tuple[Command, ...]
    events: tuple[Event, ...]

    def request(self, ioctl: Ioctl) -> int:
        """Return the request value to pass to ioctl(2)."""
        n = self.numbers
        if ioctl is Ioctl.HOOK:
            return ioc.iow(KVMIO, n.hook, kvm_introspection_hook)
        if ioctl is Ioctl.COMMAND:
            return ioc.iow(KVMIO, n.command, kvm_introspection_feature)
        if ioctl is Ioctl.EVENT:
            return ioc.iow(KVMIO, n.event, kvm_introspection_feature)
        return ioc.io(KVMIO, n.unhook if ioctl is Ioctl.UNHOOK else n.preunhook)

    @property
    def commands_by_name(self) -> Mapping[str, Command]:
        """Return this revision's commands by canonical name."""
        return MappingProxyType({command.name: command for command in self.commands})

    @property
    def events_by_name(self) -> Mapping[str, Event]:
        """Return this revision's events by canonical name."""
        return MappingProxyType({event.name: event for event in self.events})

    @property
    def always_allowed_ids(self) -> frozenset[int]:
        """Return the ids of the commands that can never be denied."""
        return frozenset(command.id for command in self.commands if command.always_allowed)
