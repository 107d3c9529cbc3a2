# SPDX-License-Identifier: Apache-2.0
"""Every recorded answer of a real kernel, against the emulator's pure parts.

The same records through a real process: tests/functional/test_emulator_conformance.py.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

import pytest
from emulator_replay import excused_records, replay, replayed_records, steps

from kvmi_libvirt.abi.kvmi import Ioctl, KvmiAbi
from kvmi_libvirt.abi.v11 import V11
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.emulator.faults import Faults
from kvmi_libvirt.emulator.kernel import (
    Answer,
    SendUnhookEvent,
    TakeSocket,
    VmState,
)
from kvmi_libvirt.emulator.protocol import ChannelBroken, Decoder
from kvmi_libvirt.emulator.revisions import kernel_for, service_for

if TYPE_CHECKING:
    from emulator_replay import Machine


class PureMachine:
    """One VM on the pure kernel, with a tool that only keeps bytes."""

    def __init__(self, abi: KvmiAbi, *, introspection: bool) -> None:
        self.kernel = kernel_for(abi, faults=Faults(introspection_off=not introspection))
        self.fresh_vm(0)

    def fresh_vm(self, vcpus: int) -> None:
        self.vcpus = vcpus
        self.received = b""
        self.vm = VmState()
        self.service = service_for(self.kernel.abi, self.vm, self)
        self.decoder = Decoder()
        self.memory = bytearray()

    def add_vcpus(self, count: int) -> None:
        self.vcpus = count

    def vcpu_count(self) -> int:
        return self.vcpus

    def add_memory(self, data: bytes) -> None:
        self.memory[:] = data

    def guest_memory(self, gpa: int, length: int) -> bytes:
        return bytes(self.memory[gpa : gpa + length])

    def read_physical(self, gpa: int, length: int) -> bytes | None:
        return self.guest_memory(gpa, length) or None

    def write_physical(self, gpa: int, data: bytes) -> bool:
        if gpa >= len(self.memory):
            return False
        self.memory[gpa : gpa + len(data)] = data
        return True

    def max_gfn(self) -> int:
        return len(self.memory) // 4096

    def tool_end(self, *, is_patient: bool) -> None:
        return None

    def send_into_the_end(self, data: bytes, *, is_patient: bool) -> None:
        try:
            self.exchange([data], 0)
        except ChannelBroken:
            self.kernel.channel_died(self.vm)

    def close_tool(self) -> None:
        self.kernel.channel_died(self.vm)

    def features(self, ioctl: Ioctl, arguments: list[tuple[int, int]]) -> list[str | None]:
        return [self._ioctl(ioctl, struct.pack("=Ii", *argument)) for argument in arguments]

    def bad_pointer(self, ioctl: Ioctl, pointer: str) -> str | None:
        return self._ioctl(ioctl, None)

    def hook(self, *, padding: int, uuid: bytes, is_socket: bool, kind: str) -> str | None:
        argument = struct.pack("=iI16s", 5, padding, uuid)
        return self._ioctl(Ioctl.HOOK, argument, is_socket=is_socket)

    def simple(self, ioctl: Ioctl, argument: int) -> str | None:
        return self._ioctl(ioctl, b"")

    def exchange(self, pieces: list[bytes], length: int) -> bytes:
        for piece in pieces:
            self.decoder.feed(piece)
            while (message := self.decoder.take()) is not None:
                self.received += self.service.reply(message)
        taken, self.received = self.received, b""
        return taken

    def _ioctl(self, ioctl: Ioctl, argument: bytes | None, *, is_socket: bool = True) -> str | None:
        outcome = self.kernel.handle(self.vm, ioctl, argument, same_mm=True)
        if isinstance(outcome, TakeSocket):
            self.decoder, self.received = Decoder(), b""
            outcome = self.kernel.complete_hook(
                self.vm, outcome, is_socket=is_socket, vcpu_count=self.vcpus
            )
        if isinstance(outcome, SendUnhookEvent):
            # Not connected is what the supervisor finds on the socket.
            sent = self.vm.connected
            self.received += self.service.unhook_event(outcome.seq) if sent else b""
            outcome = self.kernel.complete_preunhook(sent=sent)
        assert isinstance(outcome, Answer)
        return errno.errorcode[outcome.errno] if outcome.errno else None


@pytest.mark.parametrize(("introspection", "count"), [(True, 409), (False, 15)], ids=["on", "off"])
@pytest.mark.parametrize("abi", [V11, V12], ids=lambda abi: abi.name)
def test_recorded_kernel_when_replayed_then_every_answer_is_equal(
    abi: KvmiAbi, introspection: bool, count: int
) -> None:
    machine: Machine = PureMachine(abi, introspection=introspection)

    compared, differing = replay(machine, steps(abi, introspection=introspection))

    assert differing == []
    assert compared == count


@pytest.mark.parametrize(("run", "record_count"), [("main", 475), ("off", 31), ("qemu", 27)])
def test_record_when_it_is_no_step_then_the_reason_is_written_down(
    run: str, record_count: int
) -> None:
    replayed = replayed_records(run)
    excused = excused_records(run)

    assert set(range(record_count)) - replayed - set(excused) == set()
    assert all(excused.values())
