# SPDX-License-Identifier: Apache-2.0
"""Programs and tools that mean ill: the supervisor must answer as its model does, and live on."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
from emulator_harness import (
    GET_VERSION,
    Emulated,
    asked,
    feature,
    hook_argument,
    received,
    tool_pair,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmi_libvirt.abi.kvmi import Ioctl, KvmiAbi
from kvmi_libvirt.abi.v7 import V7
from kvmi_libvirt.abi.v11 import V11
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.emulator.kernel import Answer, SendUnhookEvent, TakeSocket, VmState
from kvmi_libvirt.emulator.protocol import ChannelBroken, Decoder
from kvmi_libvirt.emulator.revisions import kernel_for, service_for

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.kvm, pytest.mark.seccomp]

VCPUS = 2
MEMORY_LEN = 0x3000
GROWTH_KIB = 4096
Step: TypeAlias = "tuple[str, Any]"


class Model:
    """The pure parts, put together as the supervisor does: what must be answered."""

    def __init__(self, abi: KvmiAbi, memory: bytes) -> None:
        self.kernel = kernel_for(abi)
        self.vm = VmState()
        self.memory = bytearray(memory)
        self.service = service_for(abi, self.vm, self)
        self.decoder = Decoder()

    def vcpu_count(self) -> int:
        return VCPUS

    def read_physical(self, gpa: int, length: int) -> bytes | None:
        return bytes(self.memory[gpa : gpa + length]) if gpa < MEMORY_LEN else None

    def write_physical(self, gpa: int, data: bytes) -> bool:
        if gpa >= MEMORY_LEN:
            return False
        self.memory[gpa : gpa + len(data)] = data
        return True

    def max_gfn(self) -> int:
        return MEMORY_LEN // 4096

    def ioctl(self, ioctl: Ioctl, argument: bytes) -> tuple[int | str, bytes]:
        """Return the result, or the errno's name, and what the tool is sent."""
        sent = b""
        outcome = self.kernel.handle(self.vm, ioctl, argument, same_mm=True)
        if isinstance(outcome, TakeSocket):
            outcome = self.kernel.complete_hook(
                self.vm, outcome, is_socket=outcome.fd >= 0, vcpu_count=VCPUS
            )
            self.decoder = Decoder()
        if isinstance(outcome, SendUnhookEvent):
            sent = self.service.unhook_event(outcome.seq) if self.vm.connected else b""
            outcome = self.kernel.complete_preunhook(sent=self.vm.connected)
        assert isinstance(outcome, Answer)
        return (errno.errorcode[outcome.errno] if outcome.errno else 0), sent

    def send(self, data: bytes) -> tuple[bytes, bool]:
        """Return what the tool is sent back, and whether the channel is alive then."""
        replies = b""
        self.decoder.feed(data)
        try:
            while (message := self.decoder.take()) is not None:
                replies += self.service.reply(message)
        except ChannelBroken:
            self.kernel.channel_died(self.vm)
            return replies, False
        return replies, True


FEATURES = st.tuples(
    st.sampled_from(["COMMAND", "EVENT"]),
    st.tuples(
        st.one_of(st.integers(0, 3), st.just(2**32 - 1)),
        st.one_of(st.integers(-3, 66), st.just(-1), st.just(2**31 - 1)),
    ),
)
PHYSICAL = st.builds(
    lambda gpa, size, data: struct.pack("<QQ", gpa, size) + data,
    st.one_of(st.integers(0, MEMORY_LEN + 1), st.integers(0, 2**64 - 1)),
    st.one_of(st.integers(0, 24), st.sampled_from([4095, 4096, 4097, 1 << 16, 1 << 32])),
    st.binary(max_size=24),
)
SMALL = st.builds(
    lambda first, second, third, rest: struct.pack("<HBBI", first, second, third, rest),
    st.integers(0, 70),
    st.sampled_from([0, 0, 1, 1, 2, 255]),
    st.sampled_from([0, 0, 0, 1]),
    st.sampled_from([0, 0, 0, 1]),
)
MESSAGES = st.tuples(
    st.just("send"),
    st.builds(
        lambda message_id, seq, payload: (
            struct.pack("<HHI", message_id, len(payload), seq) + payload
        ),
        st.one_of(st.integers(0, 66), st.just(0xFFFF)),
        st.integers(0, 2**32 - 1),
        st.one_of(SMALL, PHYSICAL, st.binary(max_size=40)),
    ),
)
STEPS = st.lists(
    st.one_of(
        FEATURES,
        MESSAGES,
        MESSAGES,
        st.tuples(st.sampled_from(["PREUNHOOK", "UNHOOK"]), st.none()),
        st.tuples(st.just("HOOK"), st.sampled_from(["pair", "pair", "no socket", "padding"])),
    ),
    min_size=1,
    max_size=25,
)


@pytest.fixture(scope="module", params=[V12, V11, V7], ids=lambda abi: abi.name)
def victim(request: pytest.FixtureRequest) -> Iterator[Emulated]:
    with Emulated(request.param) as made:
        made.make_vm()
        for index in range(VCPUS):
            made.do("create_vcpu", vm=made.vm, index=index)
        made.do("sigpipe", is_ignored=True)
        made.do("add_memory", vm=made.vm, gpa=0, data=(bytes(range(256)) * 48).hex())
        yield made


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=STEPS, grants=st.booleans())
def test_any_calls_and_messages_when_made_then_the_answers_are_the_model_s(
    victim: Emulated, steps: list[Step], grants: bool
) -> None:
    vm = victim.vm
    assert victim.ioctl(Ioctl.UNHOOK, vm) == 0
    memory = bytes.fromhex(victim.do("guest_memory", index=0))
    model = Model(victim.abi, memory)
    begin: list[Step] = [("HOOK", "pair")]
    if grants:  # else the most that is answered is "not allowed"
        begin += [("COMMAND", (1, -1)), ("EVENT", (1, -1))]
    with contextlib.ExitStack() as sockets:
        tool: socket.socket | None = None
        for what, argument in begin + steps:
            if what == "send":
                if tool is None or not model.vm.connected:
                    continue
                replies, is_alive = model.send(argument)
                tool.sendall(argument)
                assert received(tool, len(replies)) == replies, (what, argument)
                if not is_alive:
                    assert received(tool, 1) == b""
                continue
            ioctl = Ioctl[what]
            packed, fd, made = b"", -1, None
            if ioctl is Ioctl.HOOK:
                if argument != "no socket":
                    made, kernel_end = tool_pair()
                    sockets.enter_context(made)
                    with kernel_end:
                        fd = victim.give(kernel_end)
                packed = bytes.fromhex(hook_argument(fd, padding=argument == "padding"))
            elif argument is not None:
                packed = bytes.fromhex(feature(*argument))
            expected, event = model.ioctl(ioctl, packed)
            assert victim.ioctl(ioctl, vm, packed.hex()) == expected, (what, argument)
            if fd >= 0:
                victim.do("close", fd=fd)
            if ioctl is Ioctl.HOOK and expected == 0:
                tool = made
            elif tool is not None:
                assert received(tool, len(event)) == event
    assert bytes.fromhex(victim.do("guest_memory", index=0)) == bytes(model.memory)


# -- a program that does whatever it can -----------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_program_when_its_threads_and_children_do_anything_then_the_supervisor_serves_on(
    seed: int,
) -> None:
    with Emulated(V12) as program:
        held = program.make_vm()
        with program.hook(held) as tool:
            answers = program.do("chaos", seed=seed, rounds=200, held=held)

            # None of it was told what the kernel would not have told.
            assert set(answers) <= {
                *("0", "EFAULT", "EINVAL", "EPERM", "EEXIST", "ENOENT", "EIO", "EBADF", "ENOTTY"),
            }
            assert {"0", "EFAULT", "EINVAL", "EIO", "EBADF"} <= set(answers)
            assert program.ioctl(Ioctl.COMMAND, held, feature(1, 8)) == 0
            assert asked(tool, GET_VERSION)[8:16] == bytes(8)
        other = program.make_vm()
        program.hook(other).close()


def test_supervisor_when_it_serves_a_lot_then_it_needs_no_more_memory_and_no_more_descriptors() -> (
    None
):
    with Emulated(V12) as program:
        vm = program.make_vm()
        program.do("add_memory", vm=vm, gpa=0, data=bytes(4096).hex())

        def serve_a_lot() -> None:
            for _ in range(30):
                with program.hook(vm) as tool:
                    features = [feature(1, i) for i in range(-2, 32)] * 10
                    request = V12.request(Ioctl.COMMAND)
                    program.do("ioctls", fd=vm, request=request, arguments=features)
                    read = struct.pack("<HHIQHHI", 12, 16, 1, 0, 4096, 0, 0)
                    for _ in range(5):
                        tool.sendall(read)
                        received(tool, 16 + 4096)
                    assert program.ioctl(Ioctl.UNHOOK, vm) == 0
            for _ in range(10):
                program.do("in_fork", calls=[program.call(Ioctl.UNHOOK, vm)])

        serve_a_lot()
        before = resident_kib(program.supervisor), descriptors(program.supervisor)
        for _ in range(3):
            serve_a_lot()
        after = resident_kib(program.supervisor), descriptors(program.supervisor)

    assert after[0] < before[0] + GROWTH_KIB
    assert after[1] <= before[1] + 2


def resident_kib(pid: int) -> int:
    """Return how much memory a process has of its own, in KiB."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    (line,) = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1])


def descriptors(pid: int) -> int:
    """Return how many descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))
