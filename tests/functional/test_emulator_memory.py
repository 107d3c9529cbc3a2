# SPDX-License-Identifier: Apache-2.0
"""Guest memory by the protocol: real pages of a real process, in slots as it set them."""

from __future__ import annotations

import os
import signal
import struct
from typing import TYPE_CHECKING

import pytest
from emulator_harness import Emulated, asked, feature, wait_for_end

from kvmi_libvirt.abi.kvmi import Ioctl, KvmiAbi
from kvmi_libvirt.abi.v7 import V7
from kvmi_libvirt.abi.v11 import V11
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.emulator.memory import (
    KVM_SET_USER_MEMORY_REGION,
    KVM_SET_USER_MEMORY_REGION2,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

pytestmark = [pytest.mark.kvm, pytest.mark.seccomp]

PAGE = 4096
LOG_DIRTY_PAGES, READONLY = 1, 2
ENOENT = -2
LAYOUTS = {"v12": struct.Struct("<QHHI"), "v11": struct.Struct("<QHHI"), "v7": struct.Struct("<QQ")}


class Tool:
    """A tool that reads and writes memory."""

    def __init__(self, abi: KvmiAbi, sock: socket.socket) -> None:
        self._abi = abi
        self._sock = sock

    def _ask(self, name: str, payload: bytes = b"") -> tuple[int, bytes]:
        id_ = self._abi.commands_by_name[name].id
        reply = asked(self._sock, struct.pack("<HHI", id_, len(payload), 3) + payload)
        return struct.unpack_from("<i", reply, 8)[0], reply[16:]

    def _physical(self, gpa: int, size: int) -> bytes:
        layout = LAYOUTS[self._abi.name]
        return (
            layout.pack(gpa, size)
            if layout.size == 16 and self._abi is V7
            else layout.pack(gpa, size, 0, 0)
        )

    def read(self, gpa: int, size: int) -> tuple[int, bytes]:
        return self._ask("KVMI_VM_READ_PHYSICAL", self._physical(gpa, size))

    def write(self, gpa: int, data: bytes) -> int:
        payload = self._physical(gpa, len(data)) + data
        return self._ask("KVMI_VM_WRITE_PHYSICAL", payload)[0]

    def max_gfn(self) -> int:
        return int(struct.unpack("<Q", self._ask("KVMI_VM_GET_MAX_GFN")[1])[0])


@pytest.fixture
def victim() -> Iterator[Emulated]:
    with Emulated(V11) as made:
        yield made


def tool_of(victim: Emulated, vm: int, sock: socket.socket) -> Tool:
    assert victim.ioctl(Ioctl.COMMAND, vm, feature(1, -1)) == 0
    return Tool(victim.abi, sock)


@pytest.mark.parametrize("abi", [V12, V11, V7], ids=lambda abi: abi.name)
def test_memory_when_read_and_written_then_it_is_the_process_s_own(abi: KvmiAbi) -> None:
    with Emulated(abi) as victim:
        vm = victim.make_vm()
        address = victim.do(
            "add_memory", vm=vm, gpa=0x10000, data=(b"guest" + bytes(PAGE - 5)).hex()
        )
        with victim.hook(vm) as sock:
            tool = tool_of(victim, vm, sock)

            assert tool.read(0x10000, 6) == (0, b"guest\0")
            assert tool.write(0x10100, b"written by the tool") == 0
            shown = victim.do("memory", address=address + 0x100, length=19)
            assert bytes.fromhex(shown) == b"written by the tool"
            assert tool.read(0x0FFFF, 1) == (ENOENT, b"")
            assert tool.read(0x11000, 1) == (ENOENT, b"")
            assert tool.write(0x11000, b"x") == ENOENT


def test_memory_when_slots_change_then_the_latest_count(victim: Emulated) -> None:
    vm = victim.make_vm()
    first = victim.do("add_memory", vm=vm, gpa=0, data=(b"1" * PAGE).hex(), slot=0)
    victim.do("add_memory", vm=vm, gpa=0x5000, data=(b"2" * PAGE).hex(), slot=1)
    with victim.hook(vm) as sock:
        tool = tool_of(victim, vm, sock)
        assert tool.max_gfn() == 6
        assert tool.read(0x5000, 1) == (0, b"2")

        victim.do("set_region", vm=vm, slot=1, gpa=0x5000, length=0, address=0)
        assert tool.read(0x5000, 1) == (ENOENT, b"")
        assert tool.max_gfn() == 1

        victim.do("set_region", vm=vm, slot=0, gpa=0, length=0, address=0)
        victim.do("set_region", vm=vm, slot=0, gpa=0x8000, length=PAGE, address=first)
        assert tool.read(0x8000, 1) == (0, b"1")
        assert tool.read(0, 1) == (ENOENT, b"")
        assert tool.max_gfn() == 9

        # Moved in one call, and then without writes to be logged and with them again.
        for gpa, flags in ((0x3000, 0), (0x3000, LOG_DIRTY_PAGES), (0x3000, 0)):
            victim.do("set_region", vm=vm, slot=0, gpa=gpa, length=PAGE, address=first, flags=flags)
            assert tool.read(gpa, 1) == (0, b"1")
            assert tool.write(gpa, b"1") == 0
        assert tool.read(0x8000, 1) == (ENOENT, b"")
        assert tool.max_gfn() == 4


def test_memory_when_a_slot_is_read_only_then_there_is_no_page(victim: Emulated) -> None:
    vm = victim.make_vm()
    address = victim.do("add_memory", vm=vm, gpa=0, data=bytes(PAGE).hex(), flags=READONLY)
    with victim.hook(vm) as sock:
        tool = tool_of(victim, vm, sock)

        assert tool.read(0, 1) == (ENOENT, b"")
        assert tool.write(0, b"x") == ENOENT
        assert tool.max_gfn() == 1
        # As firmware does it: the slot goes, and comes back as memory.
        victim.do("set_region", vm=vm, slot=0, gpa=0, length=0, address=0)
        victim.do("set_region", vm=vm, slot=0, gpa=0, length=PAGE, address=address)
        assert tool.write(0, b"x") == 0
        assert tool.read(0, 2) == (0, b"x\0")


def test_memory_when_a_slot_is_of_system_management_then_the_guest_s_own_counts(
    victim: Emulated,
) -> None:
    vm = victim.make_vm()
    victim.do("add_memory", vm=vm, gpa=0xA0000, data=(b"s" * PAGE).hex(), slot=1 << 16)
    with victim.hook(vm) as sock:
        tool = tool_of(victim, vm, sock)

        assert tool.read(0xA0000, 1) == (ENOENT, b"")
        assert tool.max_gfn() == 0
        victim.do("add_memory", vm=vm, gpa=0xA0000, data=(b"g" * PAGE).hex(), slot=0)
        assert tool.read(0xA0000, 1) == (0, b"g")
        victim.do("set_region", vm=vm, slot=1 << 16, gpa=0xA0000, length=0, address=0)
        assert tool.read(0xA0000, 1) == (0, b"g")


def test_memory_when_another_process_sets_a_slot_then_it_does_not_count(victim: Emulated) -> None:
    vm = victim.make_vm()
    address = victim.do("add_memory", vm=vm, gpa=0, data=(b"o" * PAGE).hex())
    region = struct.pack("=IIQQQ", 0, 0, 0x9000, PAGE, address).hex()
    call = {"op": "ioctls", "fd": vm, "request": KVM_SET_USER_MEMORY_REGION, "arguments": [region]}
    with victim.hook(vm) as sock:
        assert victim.do("in_fork", calls=[call]) == [["EIO"]]

        tool = tool_of(victim, vm, sock)
        assert tool.read(0, 1) == (0, b"o")
        assert tool.read(0x9000, 1) == (ENOENT, b"")


def test_memory_when_its_pages_are_unmapped_then_enoent_and_the_tool_goes_on(
    victim: Emulated,
) -> None:
    vm = victim.make_vm()
    victim.do("set_region", vm=vm, slot=0, gpa=0, length=PAGE, address=0x10000)
    with victim.hook(vm) as sock:
        tool = tool_of(victim, vm, sock)

        assert tool.read(0, 1) == (ENOENT, b"")
        assert tool.write(0, b"x") == ENOENT


def set_region2(victim: Emulated, vm: int, region: bytes) -> list[int | str]:
    """Make KVM_SET_USER_MEMORY_REGION2; return its result."""
    request, arguments = KVM_SET_USER_MEMORY_REGION2, [region.hex()]
    answers: list[int | str] = victim.do("ioctls", fd=vm, request=request, arguments=arguments)
    return answers


def test_region2_when_the_kernel_has_it_then_it_is_noted_and_answered_by_the_kernel(
    victim: Emulated,
) -> None:
    vm = victim.make_vm()
    address = victim.do("add_memory", vm=vm, gpa=0, data=(b"r" * PAGE).hex())
    region = struct.pack("=IIQQQ128x", 1, 0, 0x4000, PAGE, address)
    (answer,) = set_region2(victim, vm, region)
    if answer != 0:
        pytest.skip(f"this kernel has no KVM_SET_USER_MEMORY_REGION2 ({answer})")
    with victim.hook(vm) as sock:
        tool = tool_of(victim, vm, sock)
        assert tool.read(0x4000, 1) == (0, b"r")
        assert tool.max_gfn() == 5
        for flags, read in ((READONLY, (ENOENT, b"")), (0, (0, b"r"))):
            # What a slot may be is said when it is made.
            for length in (0, PAGE):
                region = struct.pack("=IIQQQ128x", 1, flags, 0x4000, length, address)
                assert set_region2(victim, vm, region) == [0]
            assert tool.read(0x4000, 1) == read
        # Both calls are about the same slots.
        victim.do("set_region", vm=vm, slot=1, gpa=0x4000, length=0, address=0)
        assert tool.read(0x4000, 1) == (ENOENT, b"")


def test_two_vms_when_each_has_memory_then_a_tool_sees_its_own_vm_s(victim: Emulated) -> None:
    vms = [victim.make_vm(), victim.make_vm()]
    for vm, byte in zip(vms, b"ab", strict=True):
        victim.do("add_memory", vm=vm, gpa=0, data=bytes([byte] * PAGE).hex())
    with victim.hook(vms[0]) as first, victim.hook(vms[1]) as second:
        assert tool_of(victim, vms[0], first).read(0, 1) == (0, b"a")
        assert tool_of(victim, vms[1], second).read(0, 1) == (0, b"b")


def test_target_when_killed_while_its_memory_is_read_then_the_supervisor_ends(
    victim: Emulated,
) -> None:
    vm = victim.make_vm()
    victim.do("add_memory", vm=vm, gpa=0, data=bytes(PAGE).hex())
    sock = victim.hook(vm)
    tool_of(victim, vm, sock)
    message = struct.pack("<HHIQHHI", 12, 16, 1, 0, 4096, 0, 0)
    os.kill(victim.pid, signal.SIGKILL)
    try:
        sock.sendall(message * 100)
    except BrokenPipeError:
        pass
    victim.process.wait()

    wait_for_end(victim.supervisor_pidfd, what="the supervisor")
    sock.close()
