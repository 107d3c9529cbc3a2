# SPDX-License-Identifier: Apache-2.0
"""Where a guest's physical memory lies in its VMM, learnt from the slots it sets.

Pure: what the VMM passed to KVM_SET_USER_MEMORY_REGION comes in, addresses in the
VMM come out. Imports ``abi`` only.
"""

from __future__ import annotations

import ctypes
from typing import Final, NamedTuple

from kvmi_libvirt.abi import ioc
from kvmi_libvirt.abi.kvmi import KVMIO

PAGE_LEN: Final = 4096

KVM_MEM_READONLY: Final = 1 << 1
_ADDRESS_SPACE_SHIFT: Final = 16


class kvm_userspace_memory_region(ctypes.Structure):  # noqa: N801 - the kernel's name
    """Argument of KVM_SET_USER_MEMORY_REGION."""

    _fields_ = (
        ("slot", ctypes.c_uint32),  # address space in the upper half
        ("flags", ctypes.c_uint32),
        ("guest_phys_addr", ctypes.c_uint64),
        ("memory_size", ctypes.c_uint64),  # bytes; 0 deletes the slot
        ("userspace_addr", ctypes.c_uint64),
    )


class kvm_userspace_memory_region2(ctypes.Structure):  # noqa: N801 - the kernel's name
    """Argument of KVM_SET_USER_MEMORY_REGION2 (since Linux 6.8); begins as the other."""

    _fields_ = (
        ("region", kvm_userspace_memory_region),
        ("guest_memfd_offset", ctypes.c_uint64),
        ("guest_memfd", ctypes.c_uint32),
        ("pad1", ctypes.c_uint32),
        ("pad2", ctypes.c_uint64 * 14),
    )


KVM_SET_USER_MEMORY_REGION: Final = ioc.iow(KVMIO, 0x46, kvm_userspace_memory_region)
KVM_SET_USER_MEMORY_REGION2: Final = ioc.iow(KVMIO, 0x49, kvm_userspace_memory_region2)
REGION_LEN: Final = ctypes.sizeof(kvm_userspace_memory_region)
"""How much of either structure matters here, in bytes."""


class _Slot(NamedTuple):
    start: int
    end: int
    address: int
    is_readonly: bool


class GuestMemory:
    """The memory slots of one VM, as its VMM set them."""

    def __init__(self) -> None:
        self._slots: dict[int, _Slot] = {}

    def set_region(self, argument: bytes) -> None:
        """Take note of a region: the first REGION_LEN bytes of either call's structure.

        Other address spaces than the first (x86: system management mode) are left
        out, as the introspection commands do not see them either.
        """
        region = kvm_userspace_memory_region.from_buffer_copy(argument)
        if region.slot >> _ADDRESS_SPACE_SHIFT:
            return
        if not region.memory_size:
            self._slots.pop(region.slot, None)
            return
        self._slots[region.slot] = _Slot(
            region.guest_phys_addr,
            region.guest_phys_addr + region.memory_size,
            region.userspace_addr,
            bool(region.flags & KVM_MEM_READONLY),
        )

    def locate(self, gpa: int) -> int | None:
        """Return the address in the VMM of guest physical *gpa*; None where there is none.

        Read-only slots count as none, for reading as well: the kernel's
        ``gfn_to_hva()`` looks for memory that can be written.
        """
        for slot in self._slots.values():
            if slot.start <= gpa < slot.end:
                return None if slot.is_readonly else slot.address + gpa - slot.start
        return None

    def max_gfn(self) -> int:
        """Return one past the highest guest frame number; 0 without memory."""
        return max((slot.end for slot in self._slots.values()), default=0) // PAGE_LEN
